import pickle
from dataclasses import replace

import numpy as np
import pytest

from bhlog.analysis.log import Log
from bhlog.analysis.nulls import has_p_values, load_null, null_model, null_or_empirical
from bhlog.capture.contract.errors import CorruptKde, InvalidOption, KdeMismatch
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, normal_null, without_logits, write_run

LAYERS = (0, 1, 4)


@pytest.fixture
def run(tmp_path):
    return write_run(
        tmp_path / "run", layers=LAYERS, options=BhOptions(alpha=0.3), kde=normal_kde(LAYERS)
    )


@pytest.fixture
def empirical(tmp_path):
    run = write_run(tmp_path / "empirical", layers=LAYERS)
    routing = Routing("bh", BhOptions(alpha=0.3, p_values="empirical"))
    replace(Log(run).manifest, routing=routing).write(run)
    return run


def test_the_null_model_is_the_one_given_or_the_run_own(run, tmp_path):
    log = Log(run)
    other = KdeModel({i: normal_null(i, sd=3.0) for i in LAYERS})
    assert null_model(log, other) is other
    assert null_model(log).to_bytes() == log.kde.to_bytes()
    with pytest.raises(KdeMismatch, match="not 4"):
        null_model(log, normal_kde((0, 1)))
    native = Log(write_run(tmp_path / "native"))
    with pytest.raises(KdeMismatch, match="has no null model of its own; fit one"):
        null_model(native)


def test_a_run_without_logits_is_not_told_to_fit_a_null_model(tmp_path):
    log = Log(without_logits(write_run(tmp_path / "run", n_shards=1)))
    with pytest.raises(InvalidOption, match="has no logits"):
        null_model(log)


def test_a_null_model_is_named_in_any_form(run, tmp_path):
    kde = normal_kde(LAYERS)
    kde.save(tmp_path / "null.parquet")
    for named in (kde, tmp_path / "null.parquet", str(run), Log(run), run / "kde.parquet"):
        assert load_null(named).to_bytes() == kde.to_bytes()
    assert load_null(f"file://{run}").to_bytes() == kde.to_bytes()
    assert load_null(f"file://{tmp_path}/null.parquet").to_bytes() == kde.to_bytes()


def test_a_folder_of_old_pickles_is_a_null_model(tmp_path):
    x = np.linspace(-5, 5, 101)
    pickled = {"x": x, "cdf": 1 / (1 + np.exp(-x))}
    for layer in LAYERS:
        path = tmp_path / f"distribution_model_layer_{layer}.pkl"
        path.write_bytes(pickle.dumps(pickled))
    assert set(load_null(tmp_path)) == set(LAYERS)


def test_a_name_of_nothing_says_so(tmp_path):
    with pytest.raises(CorruptKde, match="nothing"):
        load_null(tmp_path / "nothing.parquet")
    with pytest.raises(KdeMismatch, match="no null model of its own"):
        load_null(Log(write_run(tmp_path / "native")))


def test_empirical_p_values_are_those_of_a_run_routed_by_them_unless_a_null_is_named(
    run, empirical, tmp_path
):
    native = Log(write_run(tmp_path / "native", layers=LAYERS))
    kde = normal_kde(LAYERS)
    assert null_or_empirical(Log(empirical)) is None
    assert null_or_empirical(Log(empirical), kde) is kde
    assert null_or_empirical(Log(run)) is not None
    with pytest.raises(KdeMismatch):
        null_or_empirical(native)
    assert [has_p_values(Log(path)) for path in (run, empirical)] == [True, True]
    assert not has_p_values(native)
    assert has_p_values(native, kde)


def test_a_null_model_beside_an_empirical_run_is_not_in_force(empirical):
    normal_kde(LAYERS).save(empirical / "kde.parquet")
    assert null_or_empirical(Log(empirical)) is None
