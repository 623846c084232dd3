"""The public names: the same objects from bhlog, capture and analysis."""

import subprocess
import sys

import pytest

import analysis
import bhlog
import bhlog.analysis
import capture
from bhlog.capture.contract import errors

ERRORS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.RouterLogError)
}
NOTEBOOK = {
    "BHRoutingLogger",
    "OLMoERouterPatcher",
    "benjamini_hochberg_routing",
    "compute_pvalues_empirical",
    "compute_pvalues_kde",
    "load_kde_models",
}
ONLINE = {
    "CaptureOptions",
    "KdeFit",
    "RouterPatcher",
    "WriterOptions",
    "harness_model",
    "load_model",
    "named_requests",
    "observe",
    "route",
}
OFFLINE = {"FitOptions", "Policy", "Profile", "Run", "open_log", "write_run"}
SHARED = {"BhOptions", "KdeModel", *ERRORS}


def test_every_name_is_meant_to_be_there():
    assert set(bhlog.__all__) == ONLINE | OFFLINE | SHARED | NOTEBOOK
    assert set(capture.__all__) == ONLINE | SHARED | NOTEBOOK
    assert set(analysis.__all__) == OFFLINE | SHARED


@pytest.mark.parametrize("name", sorted(OFFLINE | SHARED))
def test_a_name_of_analysis_is_the_same_object_in_bhlog(name):
    assert getattr(analysis, name) is getattr(bhlog, name) is getattr(bhlog.analysis, name)


@pytest.mark.parametrize("name", sorted(SHARED))
def test_a_name_of_both_halves_is_one_object(name):
    assert getattr(capture, name) is getattr(analysis, name)


def test_the_offline_names_need_no_torch():
    names = sorted(OFFLINE | SHARED)
    code = (
        f"import sys; from bhlog import {', '.join(names)}; from analysis import open_log; "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
