import dataclasses

import numpy as np
import pytest
from scipy.stats import beta, ks_2samp, kstest, norm, wasserstein_distance

from bhlog.analysis.fold import Scope
from bhlog.analysis.null.calibration import (
    PValues,
    _bits,
    _from_bits,
    check,
    check_frame,
    expert_frame,
)
from bhlog.analysis.null.difference import compare
from bhlog.analysis.null.estimate import FitOptions, fit_kde
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.histogram import HistogramAccumulator
from bhlog.capture.contract.null.model import KdeModel, LayerNull, NullCurve
from bhlog.capture.contract.rule import decide, decide_by_expert
from tests.synthetic import normal_kde, normal_null, write_run

E, T = 16, 600
SHAPE = {"layers": (0, 3), "n_experts": E, "n_sequences": 2, "length": T // 2}


def write(folder, logits):
    return open_log(
        write_run(folder, **SHAPE, n_shards=1, logits=logits.astype(np.float32)[:, None])
    )


def null_normal(mean=0.0, sd=1.0):
    """The standard normal null, on layers 0 and 3."""
    grid = np.arange(-10, 10, 2.0**-8)
    curve = NullCurve(
        expert=None, n=0, x0=-10.0, dx=2.0**-8, tail=norm.sf(grid, mean, sd), source=("normal",)
    )
    return KdeModel({layer: LayerNull(layer, (curve,)) for layer in (0, 3)})


@pytest.fixture(scope="module")
def normal_logits():
    return np.random.default_rng(0).normal(size=(2, T, E)).astype(np.float32)


@pytest.fixture(scope="module")
def normal_log(tmp_path_factory, normal_logits):
    return write(tmp_path_factory.mktemp("runs") / "normal", normal_logits)


def test_p_values_of_the_null_itself_are_found_uniform(normal_log, normal_logits):
    first, second = check(null_normal(), normal_log)
    assert (first.layer, second.layer, first.n_experts) == (0, 3, E)
    p = norm.sf(normal_logits[0])
    # log2 of the odds is binned in 2^-10: a p-value moves by less than 2e-4
    assert first.trimmed.ks == pytest.approx(kstest(p.ravel(), "uniform").statistic, abs=2e-4)
    assert first.trimmed.n == pytest.approx(T * E)
    for level in (0.05, 0.01):
        assert first.trimmed.share_below(level) == pytest.approx((p <= level).mean(), abs=2e-3)
    for expert, values in enumerate(first.by_expert):
        expected = kstest(p[:, expert], "uniform").statistic
        assert values.ks == pytest.approx(expected, abs=4e-3)  # 1024 bins, mid-p of 600
        assert values.n == T
    for k in (1, 2, 4, 8):
        kth = np.sort(p, axis=1)[:, k - 1]
        expected = kstest(kth, beta(k, E - k + 1).cdf).statistic
        assert first.rank_ks(k) == pytest.approx(expected, abs=3e-3)


def test_popularity_is_the_share_of_rows_in_the_models_top_k(normal_log, normal_logits):
    (first, _) = check(null_normal(), normal_log)
    top = np.argsort(-normal_logits[0], axis=1)[:, :8]
    assert first.popularity == pytest.approx(np.bincount(top.ravel(), minlength=E) / T)


def test_trimmed_rows_are_checked_where_the_null_was_trimmed(normal_log):
    model = fit_kde(normal_log, FitOptions(trim_high=4, keep=((0, 0),)))
    found = check(model, normal_log)[0]
    assert found.trimmed.n == pytest.approx(T * (E - 4))
    assert sum(values.n for values in found.by_expert) == T * (E - 4)
    assert found.trimmed.ks < 0.02  # fitted on the very same logits
    assert found.rank_ks(1) > 0.5  # the largest logit is no draw from a trimmed null


def test_the_pooled_nulls_bias_shows_expert_by_expert(tmp_path, normal_logits):
    shifted = normal_logits + np.where(np.arange(E) == 5, 1.0, 0.0)
    log = write(tmp_path / "shifted", shifted)
    pooled, by_expert = (fit_kde(log, FitOptions(null=null)) for null in ("pooled", "expert"))
    found = check_frame(check(pooled, log))
    assert found["worst_expert"].to_list() == [5, 5]
    assert found["ks_worst"].min() > 0.3
    assert check_frame(check(by_expert, log))["ks_worst"].max() < 0.06
    experts = expert_frame(check(pooled, log)).filter(layer=0)
    assert experts["popularity"].arg_max() == experts["p_0.05"].arg_max() == 5


def test_nan_logits_are_counted_and_have_no_p_value(tmp_path, normal_logits):
    broken = normal_logits.copy()
    broken[0, :3, 2] = np.nan
    first, second = check(null_normal(), write(tmp_path / "broken", broken))
    assert (first.left_out, second.left_out) == (3, 0)
    assert first.trimmed.n == pytest.approx(T * E - 3)
    assert first.by_expert[2].n == T - 3


def test_threads_and_samples_of_a_check(normal_log):
    one, many = (
        check_frame(check(null_normal(), normal_log, scope=Scope(threads=n))) for n in (1, 3)
    )
    assert one.equals(many)
    some = check(null_normal(), normal_log, scope=Scope(sample=0.25))[0]
    assert 0.15 < some.trimmed.n / (T * E) < 0.35
    with pytest.raises(InvalidOption, match="no rows to check"):
        check(null_normal(), normal_log, scope=Scope(where="position > 9999"))
    with pytest.raises(KdeMismatch, match="but not 3"):
        check(KdeModel({0: normal_null(0)}), normal_log)


def test_lumps_count_by_their_middle():
    # one lump at p = 1/2 holds everything: its middle is calibrated
    assert PValues(np.array([0.5]), np.array([10.0])).ks == 0
    assert PValues(np.array([0.25, 0.75]), np.array([1.0, 1.0])).ks == 0
    assert np.isnan(PValues(np.zeros(0), np.zeros(0)).ks)


def test_two_normals_differ_as_their_formulas_say():
    frame = compare(null_normal(), null_normal(mean=0.5))
    assert frame["layer"].to_list() == [0, 3]
    assert frame["ks"][0] == pytest.approx(2 * norm.cdf(0.25) - 1, abs=1e-5)
    assert frame["wasserstein"][0] == pytest.approx(0.5, abs=1e-5)
    same = compare(null_normal(), null_normal())
    assert (same["ks"][0], same["wasserstein"][0]) == (0, 0)


def test_fitted_models_differ_as_their_samples_do(tmp_path, normal_logits):
    other = np.random.default_rng(1).normal(0.3, 1.5, normal_logits.shape)
    logs = [write(tmp_path / "a", normal_logits), write(tmp_path / "b", other)]
    narrow = FitOptions(bandwidth=0.01)
    frame = compare(*(fit_kde(log, narrow) for log in logs))
    a, b = normal_logits[0].ravel(), other[0].ravel()
    assert frame["ks"][0] == pytest.approx(ks_2samp(a, b).statistic, abs=2e-3)
    assert frame["wasserstein"][0] == pytest.approx(wasserstein_distance(a, b), abs=2e-3)


@pytest.mark.parametrize("null", ["pooled", "expert"])
def test_mean_experts_are_those_of_the_decision_rule(normal_log, normal_logits, null):
    a = fit_kde(normal_log, FitOptions(null=null, keep=((0, 4),)))
    b = a.refit(trim_high=4)
    frame = compare(a, b, alpha=0.3, log=normal_log, min_k=1, max_k=8, scope=Scope(threads=3))
    for name, model in (("experts_a", a), ("experts_b", b)):
        t = model[0].thresholds(0.3, E)
        if null == "pooled":
            chosen = decide(normal_logits[0], t, min_k=1, max_k=8)
        else:
            p = model[0].p_value(normal_logits[0])
            chosen = decide_by_expert(normal_logits[0], t, p, min_k=1, max_k=8)
        assert frame[name][0] == pytest.approx(chosen.n_selected.mean())
    assert frame["experts_b"][0] > frame["experts_a"][0]


def test_without_a_run_rows_are_drawn_from_what_the_first_was_fitted_from(normal_log):
    a = fit_kde(normal_log, FitOptions(keep=((0, 4),)))
    drawn = compare(a, a.refit(trim_high=4), alpha=0.3, n_experts=E)
    seen = compare(a, a.refit(trim_high=4), alpha=0.3, log=normal_log)
    # the rows of this run are independent draws themselves: 600 of them, against 4096
    assert drawn["experts_b"][0] == pytest.approx(seen["experts_b"][0], rel=0.15)
    own = compare(a, a.refit(trim_high=4), alpha=0.3)
    assert own.equals(drawn)  # a fitted model knows its experts
    from_tails = compare(null_normal(), null_normal(-1), alpha=0.3, n_experts=E)
    assert from_tails["experts_b"][0] > from_tails["experts_a"][0]


def test_what_cannot_be_compared_is_refused(normal_log):
    with pytest.raises(KdeMismatch, match="no layer in common: 0, 3 in the first, 1 in the second"):
        compare(null_normal(), normal_kde([1]))
    with pytest.raises(KdeMismatch, match="routers of 16 experts, but these have 4"):
        compare(fit_kde(normal_log), null_normal(), alpha=0.1, n_experts=4)
    with pytest.raises(InvalidOption, match="need the number of experts"):
        compare(null_normal(), null_normal(), alpha=0.1)
    with pytest.raises(InvalidOption, match="alpha must be between 0 and 1"):
        compare(null_normal(), null_normal(), alpha=2.0, n_experts=4)
    by_expert = fit_kde(normal_log, FitOptions(null="expert"))
    assert compare(by_expert, null_normal())["ks"][0] > 0
    few = KdeModel({0: LayerNull(0, by_expert[0].curves[:4])})
    with pytest.raises(KdeMismatch, match="4 experts in the first null model, 16 in the second"):
        compare(few, by_expert)


@pytest.mark.parametrize("end", ["near 0", "near 1", "everywhere"])
def test_p_values_are_told_apart_at_both_ends(end):
    u = np.random.default_rng(0).random(20_000)
    p = {"near 0": u * 1e-6, "near 1": 1 - u * 1e-6, "everywhere": u}[end]
    counting = HistogramAccumulator()
    counting.update(0, _bits(p)[:, None])
    (histogram,) = counting.histograms().values()
    found = _from_bits(histogram)
    assert found.n == len(p)
    assert found.ks == pytest.approx(kstest(p, "uniform").statistic, abs=2e-4)
    width = {"near 0": 1e-9, "near 1": 1e-9, "everywhere": 2e-4}[end]
    for share in (0.1, 0.5, 0.9):
        place = np.interp(share, found.mid_cdf, found.p)
        assert place == pytest.approx(np.quantile(p, share), abs=width)


def test_shares_of_all_logits_count_what_was_trimmed_too(tmp_path, normal_logits):
    kde = null_normal()
    trimmed = KdeModel(
        {
            i: LayerNull(i, (dataclasses.replace(null.curves[0], trim_high=4),))
            for i, null in kde.items()
        }
    )
    logits = normal_logits.copy()
    logits[0, :50, 3] = np.nan
    first, second = check(trimmed, write(tmp_path / "run", logits))
    for found, values in ((first, logits[0]), (second, logits[1])):
        p = norm.sf(values[np.isfinite(values)].astype(float))
        assert found.below == {
            level: pytest.approx((p <= level).mean(), abs=1e-4) for level in (0.05, 0.01, 0.001)
        }
        assert found.pi0 == pytest.approx(min(1, (p > 0.5).mean() * 2), abs=1e-3)
    frame = check_frame([first, second])
    assert (frame["all_0.05"] > 2 * frame["p_0.05"]).all()  # the largest four are not in the latter


def test_pi0_is_the_share_of_logits_that_are_of_the_null(tmp_path):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(2, T, E)).astype(np.float32)
    logits[1, :, :4] += 6  # a quarter are signals, far away
    first, second = check(null_normal(), write(tmp_path / "run", logits))
    assert first.pi0 == pytest.approx(1.0, abs=0.03)
    assert second.pi0 == pytest.approx(0.75, abs=0.03)
