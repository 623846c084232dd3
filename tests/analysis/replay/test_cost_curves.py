import numpy as np
import polars as pl
import pytest

import bhlog.analysis.replay.sampling as sampling
from bhlog.analysis.fold import Scope
from bhlog.analysis.replay.comparison import compare
from bhlog.analysis.replay.cost_curves import MOST_POINTS, cost_curves
from bhlog.analysis.replay.families.topk import TopK
from bhlog.analysis.replay.registry import families, parse_policy
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.rule import Bounds
from tests.synthetic import normal_kde, write_run

LAYERS, E = (0, 1), 16


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves") / "run"
    run = write_run(folder, layers=LAYERS, n_experts=E, n_sequences=12, length=20, n_shards=12)
    normal_kde(LAYERS).save(run / "kde.parquet")
    return open_log(run)


def policies(*texts):
    return [parse_policy(text, open_value=True) for text in texts]


def usual():
    return [name for name in families() if name != "lfdr"]  # which needs a central null


def compared(log, some, **options):
    frame = compare(log, some, **options).filter(pl.col("layer").is_null())
    return frame.select("mean_experts", "probability_kept").rows()


def test_a_mark_is_what_compare_says_of_the_policy(log):
    some = policies(*(name for name in usual() if name != "seqtopk"))  # of whole forwards
    options = {"bounds": Bounds(max_k=9), "scope": Scope([1], "position > 4")}
    curves = cost_curves(log, some, **options)
    assert curves.whole and curves.rows == 180
    marks = [(mark.mean_experts, mark.probability_kept) for mark in curves.marks]
    expected = compared(log, some, **options)
    assert np.allclose(marks, expected, rtol=1e-6)  # float32 sums over other blocks
    assert [mark.text for mark in curves.marks] == [str(policy) for policy in some]


@pytest.mark.parametrize("name", ["bh", "storey", "hc", "topp", "threshold"])
def test_a_point_of_a_curve_is_what_compare_says_there(log, name):
    (curve,) = cost_curves(log, policies(name)).curves
    assert len(curve.mean_experts) <= MOST_POINTS + 2
    assert (np.diff(curve.mean_experts) >= 0).all()
    kind = families()[name]
    settings = [kind(kind.value_at(position, E)) for position in (0.0, 0.5, 1.0)]
    for mean, kept in compared(log, settings):
        at = np.argmin(np.hypot(curve.mean_experts - mean, curve.probability_kept - kept))
        assert curve.mean_experts[at] == pytest.approx(mean, rel=1e-6)
        assert curve.probability_kept[at] == pytest.approx(kept, rel=1e-6)


def test_the_native_curve_is_top_k_at_every_k_without_bounds(log):
    native = cost_curves(log, policies("topp"), bounds=Bounds(max_k=4)).native
    expected = compared(log, [TopK(k) for k in range(1, E + 1)])
    assert native.label == "topk"
    assert np.allclose(np.column_stack([native.mean_experts, native.probability_kept]), expected)
    assert native.at(2.5) == pytest.approx(native.at([2, 3]).mean())
    assert np.isnan(native.at(0.5))


def test_no_curve_lies_above_that_of_the_threshold(log):
    curves = cost_curves(log, policies(*usual()), bounds=Bounds(1, E))
    (best,) = (curve for curve in curves.curves if curve.label == "threshold")
    for curve in (curves.native, *curves.curves):
        inside = curve.mean_experts <= curves.most_experts
        # between the points of a bent curve a chord lies a little lower
        assert (
            curve.probability_kept[inside] <= best.at(curve.mean_experts[inside]) + 0.003
        ).all(), curve.label


def test_a_family_has_one_curve_for_each_set_of_options(log):
    curves = cost_curves(log, policies("bh:0.1", "bh:0.4", "bh:0.4,max_k=3", "topk:4"))
    assert [curve.label for curve in curves.curves] == ["bh", "bh,max_k=3"]
    assert [mark.label for mark in curves.marks] == ["bh", "bh", "bh,max_k=3", "topk"]
    assert curves.curves[1].mean_experts.max() <= 3


def test_a_long_log_is_sampled(log, monkeypatch):
    monkeypatch.setattr(sampling, "MOST_ROWS", 40)
    read = []
    original = log.read
    monkeypatch.setattr(
        log, "read", lambda group, *a, **k: read.append(group) or original(group, *a, **k)
    )
    curves = cost_curves(log, policies("topp:0.7"))
    assert not curves.whole and curves.rows == 2 * 40
    assert len(read) == 2 * 8  # of 12 row groups a layer
    ((mean, _),) = compared(log, policies("topp:0.7"))
    assert curves.marks[0].mean_experts == pytest.approx(mean, abs=1.5)  # 80 rows of spread 3


def test_no_rows_is_an_error(log):
    with pytest.raises(InvalidOption, match="no rows where position > 99"):
        cost_curves(log, policies("topk:4"), scope=Scope(where="position > 99"))
