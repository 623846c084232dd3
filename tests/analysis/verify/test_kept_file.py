from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.null.estimate import FitOptions, fit_kde
from bhlog.analysis.run import open_log
from bhlog.analysis.verify.kept_file import verify_file
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.null.model import KdeModel
from tests.synthetic import normal_kde, write_run


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return open_log(write_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(params=["pooled", "expert", "profile"])
def path(request, log, tmp_path):
    path = tmp_path / "kept"
    if request.param == "profile":
        log.sweep(normal_kde(log.layers)).save(path)
    else:
        fit_kde(log, FitOptions(null=request.param, trim_high=2)).save(path)
    return path


def statuses(path):
    return [finding.status for finding in verify_file(path)]


def test_what_is_whole_is_said_to_be(path):
    (finding,) = verify_file(path)
    assert finding.status == "ok" and "3 layers" in finding.detail
    assert finding.where == str(path)


def test_any_bit_that_flips_is_an_error_or_says_nothing(path):
    data, draw = path.read_bytes(), np.random.default_rng(0)
    found = []
    for _ in range(30):
        changed = bytearray(data)
        changed[draw.integers(len(data))] ^= 1 << draw.integers(8)
        path.write_bytes(changed)
        found += statuses(path)[:1]
    assert found.count("error") > 15  # others meet what no reader looks at


def test_a_tail_that_is_not_of_its_histogram_is_an_error_under_a_right_checksum(log, tmp_path):
    model = fit_kde(log, FitOptions())
    (curve,) = model[1].curves
    wrong = LayerNull(1, (replace(curve, tail=curve.tail**1.01),))
    KdeModel({**model.layers, 1: wrong}, model.n_experts).save(tmp_path / "null")
    first, second = verify_file(tmp_path / "null")
    assert (first.status, second.status) == ("ok", "error")
    assert "layer 1: its tail is off that of its histogram by" in second.detail


def test_what_cannot_be_checked_is_said(log, tmp_path):
    model = fit_kde(log, FitOptions())
    bare = {
        i: LayerNull(i, (replace(null.curves[0], histogram=None, rule="imported"),))
        for i, null in model.items()
    }
    KdeModel(bare, model.n_experts).save(tmp_path / "imported")
    assert [f.detail for f in verify_file(tmp_path / "imported") if f.status == "warning"] == [
        "imported: its tails have no histogram that they could be fitted from again"
    ]
    model.save(tmp_path / "old")
    table = pq.read_table(tmp_path / "old")
    metadata = {k: v for k, v in table.schema.metadata.items() if k != b"bhlog.sha256"}
    metadata[b"bhlog.kde_schema_version"] = b"1"
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "old")
    assert [f.detail[:12] for f in verify_file(tmp_path / "old") if f.status == "warning"] == [
        "of version 1"
    ]


@pytest.mark.parametrize("data", [None, b"", b"PAR1", b"no null model"])
def test_what_is_no_null_model_and_no_profile_is_an_error(tmp_path, data):
    if data is not None:
        (tmp_path / "file").write_bytes(data)
    (finding,) = verify_file(tmp_path / "file")
    assert finding.status == "error" and "\n" not in finding.detail
