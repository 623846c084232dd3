"""The rule in numpy against the rule as a textbook states it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control
from statsmodels.stats.multitest import multipletests

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.model import LayerNull, NullCurve
from bhlog.capture.contract.rule import (
    BhOptions,
    Bounds,
    count_rejected,
    critical_values,
    decide,
    decide_by_expert,
    decide_by_p_value,
    empirical_p_values,
    finite_keys,
    no_finite_logit,
    softmax_weights,
)
from tests.synthetic import normal_logits, normal_null

SIZES = st.one_of(st.integers(2, 12), st.sampled_from([64, 128, 512]))
ALPHAS = st.sampled_from([1e-6, 0.05, 0.3, 0.999])


def step_up(p, alpha):
    """n_rejected of one row, as Benjamini and Hochberg state it; None marks a non-finite logit."""
    tested = sorted(math.inf if x is None else x for x in p)
    E = len(p)
    return max((k for k in range(1, E + 1) if tested[k - 1] <= k * alpha / E), default=0)


def choices(logits, p, alpha, min_k, max_k):
    """(experts in order, n_rejected) of one row, written out in plain Python."""
    finite = [math.isfinite(x) for x in logits]
    if not any(finite):
        return [], 0
    n_rejected = step_up([x if ok else None for x, ok in zip(p, finite, strict=True)], alpha)
    n_selected = min(max(n_rejected, min_k), max_k)

    def key(i):
        return (p[i], -logits[i], i) if finite[i] else (math.inf, math.inf, i)

    return sorted(range(len(logits)), key=key)[:n_selected], n_rejected


def assert_decisions(decisions, expected):
    for row, (experts, n_rejected) in enumerate(expected):
        assert decisions.n_rejected[row] == n_rejected
        assert decisions.n_selected[row] == len(experts)
        assert decisions.order[row, : len(experts)].tolist() == experts


@st.composite
def rows(draw, most=6):
    """(T, E) float32 logits with ties, infinities, NaN and constant rows."""
    E, T = draw(SIZES), draw(st.integers(1, most))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    l = normal_logits(rng, T, E)
    kind = draw(st.sampled_from(["plain", "ties", "constant", "odd"]))
    if kind == "ties":
        l = np.round(l)
    elif kind == "constant":
        l[:] = l[0, 0]
    elif kind == "odd":
        where = rng.random(l.shape) < 0.3
        l[where] = rng.choice([np.nan, np.inf, -np.inf, 3.4e38, 0.0], int(where.sum()))
    return l.astype(np.float32)


@st.composite
def nulls(draw, experts=(None,)):
    """A null with a steep or stepped tail: plateaus are where thresholds could go wrong."""
    curves = []
    for expert in experts:
        levels = draw(
            st.lists(
                st.sampled_from([1.0, 0.9, 0.3, 0.3, 0.05, 0.0125, 1e-9, 0.0]),
                min_size=2,
                max_size=9,
            )
        )
        tail = np.array(sorted(levels, reverse=True))
        x0, dx = draw(st.sampled_from([(-3.0, 0.75), (-4.0, 1.0), (-0.1, 0.01)]))
        curves.append(NullCurve(expert=expert, n=0, x0=x0, dx=dx, tail=tail))
    return LayerNull(0, tuple(curves))


@st.composite
def bounds(draw, E):
    min_k = draw(st.integers(0, E))
    return min_k, draw(st.integers(max(1, min_k), E))


@settings(deadline=None)
@given(st.data(), rows(), ALPHAS)
def test_thresholds_decide_as_the_textbook_does_on_p_values(data, l, alpha):
    null = data.draw(st.one_of(nulls(), st.just(normal_null(0))))
    E = l.shape[1]
    min_k, max_k = data.draw(bounds(E))
    p = null.p_value(l)
    decisions = decide(l, null.thresholds(alpha, E), min_k=min_k, max_k=max_k)
    # a pooled p-value falls with the logit, so the order is that of the logits alone
    counts = [choices(x, q, alpha, 0, E)[1] for x, q in zip(l, p, strict=True)]
    for row, (n, x) in enumerate(zip(counts, l, strict=True)):
        n_selected = min(max(n, min_k), max_k) if np.isfinite(x).any() else 0
        by_logit = choices(x, -x.astype(float), 0.5, E, E)[0]
        assert decisions.n_rejected[row] == n
        assert decisions.n_selected[row] == n_selected
        assert decisions.order[row, :n_selected].tolist() == by_logit[:n_selected]


@settings(deadline=None)
@given(st.data(), rows(), ALPHAS)
def test_a_null_per_expert_decides_as_the_textbook_does(data, l, alpha):
    l = l[:, :12]
    E = l.shape[1]
    null = data.draw(nulls(range(E)))
    min_k, max_k = data.draw(bounds(E))
    p = null.p_value(l)
    decisions = decide_by_expert(l, null.thresholds(alpha, E), p, min_k=min_k, max_k=max_k)
    expected = [choices(x, q, alpha, min_k, max_k) for x, q in zip(l, p, strict=True)]
    assert_decisions(decisions, expected)


@settings(deadline=None)
@given(st.data(), rows(), ALPHAS)
def test_empirical_p_values_decide_as_the_textbook_does(data, l, alpha):
    min_k, max_k = data.draw(bounds(l.shape[1]))
    p = empirical_p_values(l)
    decisions = decide_by_p_value(l, p, alpha=alpha, min_k=min_k, max_k=max_k)
    expected = [choices(x, q, alpha, min_k, max_k) for x, q in zip(l, p, strict=True)]
    assert_decisions(decisions, expected)


@settings(deadline=None)
@given(rows())
def test_empirical_p_values_are_the_share_of_logits_at_least_as_large(l):
    p = empirical_p_values(l)
    T, E = l.shape
    for row in range(T):
        for i in range(min(E, 8)):
            x = l[row, i]
            pool = l[0] if T == 1 else l[:, i]
            pool = [float(y) for y in pool if math.isfinite(y)]
            share = sum(y >= x for y in pool) / len(pool) if math.isfinite(x) else 1.0
            assert p[row, i] == share


@settings(deadline=None)
@given(SIZES, st.integers(0, 2**32), st.sampled_from([0.05, 0.3, 0.9]))
def test_n_rejected_is_that_of_scipy_and_statsmodels(E, seed, alpha):
    rng = np.random.default_rng(seed)
    # multiples of 1/1009 are never k * alpha / E, so no comparison hangs on rounding
    p = rng.integers(1, 1009, (4, E)) / 1009 * rng.choice([1.0, 0.1], (4, E))
    n_rejected = decide_by_p_value(
        (-p).astype(np.float32), p, alpha=alpha, min_k=0, max_k=E
    ).n_rejected
    for row, n in zip(p, n_rejected, strict=True):
        assert n == (false_discovery_control(row, method="bh") <= alpha).sum()
        assert n == multipletests(row, alpha, method="fdr_bh")[0].sum()


@settings(deadline=None)
@given(rows(), st.sampled_from([0.01, 0.1, 0.45]))
def test_raising_alpha_never_rejects_fewer(l, alpha):
    null, E = normal_null(0), l.shape[1]
    low, high = (
        decide(l, null.thresholds(a, E), min_k=0, max_k=E).n_rejected for a in (alpha, 2 * alpha)
    )
    assert (low <= high).all()


@settings(deadline=None)
@given(rows())
def test_one_null_for_all_experts_decides_as_the_same_null_for_each(l):
    l = l[:, :64]
    E, curve = l.shape[1], normal_null(0).curves[0]
    t = curve.thresholds(0.3, E)
    pooled = decide(l, t, min_k=0, max_k=E)
    each = decide_by_expert(l, np.tile(t[:, None], E), curve.p_value(l), min_k=0, max_k=E)
    assert pooled.n_rejected.tolist() == each.n_rejected.tolist()


def test_step_up_rejects_ranks_above_their_own_threshold():
    p = np.array([[0.05, 0.9, 0.01, 0.055]])  # held against 0.02, 0.04, 0.06, 0.08
    decisions = decide_by_p_value((-p).astype(np.float32), p, alpha=0.08, min_k=0, max_k=4)
    assert decisions.n_rejected.tolist() == [3]
    assert decisions.order[0, :3].tolist() == [2, 0, 3]


def test_a_tie_goes_to_the_lower_expert():
    l = np.zeros((1, 8), np.float32)
    decisions = decide(l, np.full(8, np.inf, np.float32), min_k=3, max_k=8)
    assert decisions.order[0, :3].tolist() == [0, 1, 2]
    assert decisions.n_rejected[0] == 0 and decisions.n_selected[0] == 3


def test_critical_values_are_k_alpha_over_e():
    assert critical_values(0.3, 3).tolist() == [1 * 0.3 / 3, 2 * 0.3 / 3, 3 * 0.3 / 3]


def test_a_later_rank_counts_even_where_earlier_ones_fail():
    sorted_keys = np.array([[1.0, 0.9, 0.8]], np.float32)
    thresholds = np.array([9.0, 8.0, 0.8], np.float32)
    assert count_rejected(sorted_keys, thresholds).tolist() == [3]


def test_nonfinite_logits_rank_last_and_weigh_nothing():
    l = np.array([[np.nan, 1.0, np.inf, 0.0, -np.inf]], np.float32)
    decisions = decide(l, np.full(5, -1.0, np.float32), min_k=0, max_k=5)
    assert decisions.n_rejected.tolist() == [2]
    assert decisions.order[0, :2].tolist() == [1, 3]
    weights = softmax_weights(l, decisions)
    # float32 rounding of a softmax over two values
    np.testing.assert_allclose(weights[0, :2], [1 / (1 + np.exp(-1)), 1 / (1 + np.e)], rtol=1e-6)
    assert weights[0, 2:].tolist() == [0, 0, 0]
    assert np.isfinite(finite_keys(l)).sum() == 2


def test_a_row_without_a_finite_logit_is_left_to_the_model():
    l = np.array([[np.nan, np.inf], [0.0, 1.0]], np.float32)
    assert no_finite_logit(l).tolist() == [True, False]
    decisions = decide(l, np.full(2, -9.0, np.float32), min_k=1, max_k=2)
    assert decisions.n_selected.tolist() == [0, 2]
    assert decisions.n_rejected.tolist() == [0, 2]
    assert softmax_weights(l, decisions)[0].tolist() == [0, 0]


@given(rows(), st.sampled_from([0.5, 1.0, 3.0]), st.booleans())
@settings(deadline=None)
def test_weights_are_the_softmax_over_all_experts(l, temperature, renormalize):
    l = np.nan_to_num(np.clip(l, -50, 50))
    decisions = decide(l, normal_null(0).thresholds(0.3, l.shape[1]), min_k=1, max_k=l.shape[1])
    weights = softmax_weights(l, decisions, temperature=temperature, renormalize=renormalize)
    scaled = l.astype(np.float64) / temperature
    exact = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    exact /= exact.sum(axis=1, keepdims=True)
    for row, n in enumerate(decisions.n_selected):
        kept = exact[row, decisions.order[row, :n]]
        expected = kept / kept.sum() if renormalize else kept
        # float32 exponentials of scaled logits up to 100: relative error 100 * 2^-24 and sums
        np.testing.assert_allclose(weights[row, :n], expected, rtol=5e-5, atol=1e-30)
        assert not weights[row, n:].any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"alpha": math.nan},
        {"min_k": -1},
        {"min_k": 3, "max_k": 2},
        {"max_k": 0, "min_k": 0},
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"renormalize": "yes"},
        {"p_values": "t-test"},
    ],
)
def test_options_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(InvalidOption, match=f"^{next(iter(wrong))}|max_k"):
        BhOptions(**wrong)


def test_bounds_above_the_experts_are_refused():
    assert BhOptions().bounds(64) == (1, 64)
    with pytest.raises(InvalidOption, match="max_k is 65, but the model has 64 experts"):
        BhOptions(max_k=65).bounds(64)
    with pytest.raises(InvalidOption, match="min_k is 9"):
        BhOptions(min_k=9).bounds(8)


def test_renormalize_follows_the_model_unless_told():
    assert [BhOptions(renormalize="model").renormalizes(n) for n in (True, False)] == [True, False]
    assert [BhOptions(renormalize=True).renormalizes(n) for n in (True, False)] == [True, True]
    assert [BhOptions(renormalize=False).renormalizes(n) for n in (True, False)] == [False, False]


@pytest.mark.parametrize(
    ("bounds", "resolved"),
    [
        (Bounds(), (1, 16)),
        (Bounds(0), (0, 16)),
        (Bounds(None, 4), (1, 4)),
        (Bounds(2, 5), (2, 5)),
        (Bounds(16, 16), (16, 16)),
    ],
)
def test_open_bounds_are_one_and_all_experts(bounds, resolved):
    assert bounds.resolve(16) == resolved


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (lambda: Bounds(-1), "min_k must be at least 0, got -1"),
        (lambda: Bounds(5, 2), r"max_k must be at least 1 and at least min_k \(5\), got 2"),
        (lambda: Bounds(0, 0), r"max_k must be at least 1 and at least min_k \(0\), got 0"),
        (lambda: Bounds(17).resolve(16), "min_k is 17, but the model has 16 experts"),
        (lambda: Bounds(1, 17).resolve(16), "max_k is 17, but the model has 16 experts"),
        (lambda: Bounds(None, 4).filled(Bounds(5)), r"at least min_k \(5\), got 4"),
    ],
)
def test_bounds_that_leave_no_number_are_errors(bounds, message):
    with pytest.raises(InvalidOption, match=message):
        bounds()


def test_what_is_open_is_filled_from_others():
    assert Bounds(2).filled(Bounds(3, 9)) == Bounds(2, 9)
    assert Bounds().filled(Bounds(0)) == Bounds(0)
    assert Bounds(1, 4).filled(Bounds(2, 5)) == Bounds(1, 4)
