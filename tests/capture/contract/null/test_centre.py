from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bhlog.analysis.replay.families.bh import Bh
from bhlog.analysis.replay.rows import Rows
from bhlog.analysis.sweep.critical import CriticalAlphas
from bhlog.capture.contract.errors import CorruptKde, InvalidOption, KdeMismatch
from bhlog.capture.contract.null.centre import centred, row_medians
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.null.histogram import Histogram
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions, Bounds
from tests.synthetic import normal_null

MEDIAN = FitOptions(centre="median")
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, -3e38, 1e-40]


def rows_of(most=9):
    shapes = st.tuples(st.integers(1, 6), st.integers(2, most))
    values = st.one_of(st.floats(-9, 9, width=32), st.sampled_from(SPECIAL).map(np.float32))
    return shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=values))


def slow_centred(row):
    finite = sorted(float(x) for x in row if np.isfinite(x))
    if not finite:
        return [-np.inf] * len(row)
    median = np.float32(finite[(len(finite) - 1) // 2])
    with np.errstate(over="ignore"):
        return [
            min(np.float32(x) - median, np.finfo(np.float32).max) if np.isfinite(x) else -np.inf
            for x in row
        ]


@settings(deadline=None, max_examples=60)
@given(rows_of())
def test_a_row_loses_the_lower_median_of_its_finite_logits(logits):
    np.testing.assert_array_equal(centred(logits), [slow_centred(row) for row in logits])


def centred_null(n_experts=None):
    """Pooled, or a curve for each of some experts."""
    means = [0.0] if n_experts is None else np.linspace(-0.4, 0.4, n_experts)
    curves = [normal_null(0, mean=float(mean), sd=1.0).curves[0] for mean in means]
    experts = [None] if n_experts is None else range(n_experts)
    return LayerNull(
        0,
        tuple(
            replace(curve, expert=expert, centre="median")
            for curve, expert in zip(curves, experts, strict=True)
        ),
    )


def slow_decide(row, null, alpha):
    """n_rejected and the chosen experts, from p-values of what is slowly centred."""
    x = slow_centred(row)
    E = len(row)
    p = [null.curves[0 if null.pooled else i].p_value(np.array([v]))[0] for i, v in enumerate(x)]
    finite = [i for i in range(E) if np.isfinite(row[i])]
    ranked = sorted(finite, key=lambda i: (p[i] if not null.pooled else 0, -row[i], i))
    n = max((k for k, i in enumerate(ranked, 1) if p[i] <= k * alpha / E), default=0)
    if null.pooled:
        ps = sorted(p[i] for i in finite)
        n = max((k for k, q in enumerate(ps, 1) if q <= k * alpha / E), default=0)
    return n, set(ranked[:n])


@pytest.mark.parametrize("by_expert", [False, True])
@settings(deadline=None, max_examples=40)
@given(logits=rows_of(), alpha=st.sampled_from([0.05, 0.3, 0.8]))
def test_replay_and_the_rule_test_what_is_centred_and_order_what_is_not(by_expert, logits, alpha):
    E = logits.shape[1]
    null = centred_null(E if by_expert else None)
    found = Bh(alpha).decide(Rows(logits, null), Bounds(0))
    rule = null.decide(logits, null.thresholds(alpha, E), min_k=0, max_k=E)
    for i, row in enumerate(logits):
        n, chosen = slow_decide(row, null, alpha)
        assert found.n_rejected[i] == rule.n_rejected[i] == n
        if np.isfinite(row).any():
            assert set(np.flatnonzero(found.chosen[i])) == chosen
            assert set(rule.order[i, :n].tolist()) == chosen


def test_a_shift_of_a_row_changes_nothing():
    rng = np.random.default_rng(0)
    logits = (rng.integers(-256, 256, (200, 16)) / 64).astype(np.float32)
    shifted = logits + (rng.integers(-64, 64, (200, 1)) / 8).astype(np.float32)  # exact
    null = centred_null()
    plain = LayerNull(0, (replace(null.curves[0], centre="none"),))

    def counts(x, null):
        return Bh(0.3).decide(Rows(x, null), Bounds(0)).n_rejected

    np.testing.assert_array_equal(counts(logits, null), counts(shifted, null))
    assert (counts(logits, plain) != counts(shifted, plain)).any()


def test_sweeps_count_what_is_centred():
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(300, 8)) + rng.normal(size=(300, 1))).astype(np.float32)
    null, alphas = centred_null(), np.array([0.05, 0.3, 0.6])
    rows = CriticalAlphas.under(null.curves[0], alphas, 8).count(null.tested(logits)).rows
    for j, alpha in enumerate(alphas):
        n = Bh(float(alpha)).decide(Rows(logits, null), Bounds(0)).n_rejected
        assert rows[:, : j + 1].sum() == n.sum()


@pytest.mark.parametrize("null", ["pooled", "expert"])
def test_a_fit_counts_centred_logits_and_the_file_says_so(null, tmp_path):
    rng = np.random.default_rng(2)
    logits = (rng.normal(size=(50, 8)) + 5 * rng.normal(size=(50, 1))).astype(np.float32)
    logits[0, 0] = np.nan
    options = replace(MEDIAN, null=null, trim_high=2)
    counts = options.accumulator()
    counts.update(0, logits[:20])
    more = options.accumulator()
    more.update(0, logits[20:])
    counts.merge(more)
    model = KdeModel.fit(counts.histograms(), options, source=["run"], n_experts=8)
    kept = np.sort(centred(logits), axis=1)[:, :-2]
    if null == "pooled":
        histogram = model[0].curves[0].histogram
        expected = Histogram.of(kept[np.isfinite(kept)])
        np.testing.assert_array_equal(histogram.counts, expected.counts)
        assert histogram.left_out == 1
    model.save(tmp_path / "null.parquet")
    loaded = KdeModel.load(tmp_path / "null.parquet")
    assert model.centre == loaded.centre == "median" and "median" not in repr(logits)
    assert loaded.to_bytes() == model.to_bytes() == model.refit().to_bytes()
    plain = replace(options, centre="none").accumulator()
    plain.update(0, logits)
    other = KdeModel.fit(plain.histograms(), replace(options, centre="none"), source=["run"])
    with pytest.raises(InvalidOption, match=r"fitted differently.*less the median"):
        model.merge(other)
    assert (row_medians(logits) != 0).any()


def test_a_null_of_one_kind_is_refused_for_the_other():
    models = {
        "none": KdeModel({0: normal_null(0, mean=0.0, sd=1.0)}),
        "median": KdeModel({0: centred_null()}),
    }
    for asked in models:
        for kind, model in models.items():
            if asked == kind:
                BhOptions(centre=asked).check_null(model)
                continue
            with pytest.raises(KdeMismatch) as error:
                BhOptions(centre=asked).check_null(model)
            assert f"--centre {kind}" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(CorruptKde, match="some curves are of centred logits"):
        KdeModel({0: normal_null(0, mean=0.0, sd=1.0), 1: replace(centred_null(), layer=1)})
    with pytest.raises(KdeMismatch, match="whole rows"):
        models["median"].p_value(0, [0.0, 1.5])


@pytest.mark.parametrize(
    "options", [{"policy": "topk:4"}, {"p_values": "empirical"}, {"policy": "minp:0.2"}]
)
def test_what_no_null_model_tests_is_not_centred(options):
    with pytest.raises(InvalidOption, match="leave centre out"):
        BhOptions(centre="median", **options)
    with pytest.raises(InvalidOption, match="centre must be"):
        BhOptions(centre="mean")
