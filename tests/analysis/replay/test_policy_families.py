"""Every family against its formula row by row, and BH and BY against scipy and statsmodels."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control
from statsmodels.stats.multitest import multipletests

from bhlog.analysis.replay.families.bh import Bh
from bhlog.analysis.replay.families.by import By
from bhlog.analysis.replay.families.entropy import Entropy
from bhlog.analysis.replay.families.higher_criticism import HigherCriticism, HigherCriticismPlus
from bhlog.analysis.replay.families.lfdr import Lfdr
from bhlog.analysis.replay.families.minp import MinP
from bhlog.analysis.replay.families.storey import Storey
from bhlog.analysis.replay.families.threshold import Threshold
from bhlog.analysis.replay.families.topk import TopK
from bhlog.analysis.replay.families.topp import TopP
from bhlog.analysis.replay.registry import families, parse_policy
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.errors import KdeMismatch
from bhlog.capture.contract.null.curve import NullCurve
from bhlog.capture.contract.null.fit import FitOptions, fit_histograms
from bhlog.capture.contract.null.histogram import Histogram, HistogramKey
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.null.trim import Trim
from bhlog.capture.contract.rule import Bounds, empirical_p_values
from tests.analysis.replay import slow
from tests.synthetic import normal_null

VALUES = [-np.inf, np.inf, np.nan, -1.0, 0.0, 0.5, 0.5, 1.0, 2.0, 3.0, 4.5]
LOGGED = [1, 0]
SLACK = 1e-12  # sums and products of some hundred float64 round by less
NULLS = ("normal", "plateaus", "by expert", "empirical")

unit = st.floats(0.001, 0.999)
many = settings(max_examples=40, deadline=None)


def plateaus():
    """A pooled null of few steps, flat between them, that ends above 0 and starts below 1."""
    tail = np.repeat([0.98, 0.5, 0.125, 0.02, 0.001], 8)
    return LayerNull(0, (NullCurve(expert=None, n=0, x0=-2.0, dx=0.125, tail=tail),))


def nulls_by_expert(E):
    """A curve an expert, each at a place of its own."""
    curve = normal_null(0).curves[0]
    shift = np.random.default_rng(E).normal(0, 0.7, E)
    return LayerNull(0, tuple(replace(curve, expert=i, x0=curve.x0 + shift[i]) for i in range(E)))


@st.composite
def logits_of(draw, most_experts=512):
    sizes = [E for E in (2, 3, 8, 63, 64, 65, 130, 512) if most_experts >= E]
    E = draw(st.sampled_from(sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["few values", "normal", "constant", "half broken"]))
    if kind == "few values":
        return rng.choice(np.array(VALUES, np.float32), (4, E))
    if kind == "constant":
        return np.full((4, E), rng.normal(0, 3), np.float32)
    logits = rng.normal(0, 2, (4, E)).astype(np.float32)
    if kind == "half broken":
        logits[rng.random((4, E)) < 0.5] = rng.choice([np.nan, np.inf, -np.inf])
    return logits


@st.composite
def rows_with_p(draw):
    """Rows with p-values, and the (T, E) p-values."""
    kind = draw(st.sampled_from(NULLS))
    logits = draw(logits_of(most_experts=65 if kind == "by expert" else 512))
    if kind == "empirical":
        p = empirical_p_values(logits)
        return Rows(logits, p=p, logged=logged(logits)), p
    null = {"normal": normal_null(0), "plateaus": plateaus()}.get(kind)
    null = null or nulls_by_expert(logits.shape[1])
    return Rows(logits, null, logged=logged(logits)), null.p_value(logits)


def logged(logits):
    return pa.array([LOGGED] * len(logits), pa.list_(pa.uint16()))


def assert_chosen(policy, rows, order_of, counts_of):
    """Hold a policy to its slow rule.

    Args:
        order_of: gives a row's experts in order of preference, from its index and logits.
        counts_of: gives the counts before the bounds that are right for the row.
    """
    for bounds in (Bounds(0), Bounds(1, 2)):
        low, high = policy.bounds(rows.n_experts, bounds)
        choice = policy.decide(rows, bounds)
        for i, row in enumerate(rows.logits.tolist()):
            experts = set(np.flatnonzero(choice.chosen[i]).tolist())
            n = int(choice.n_selected[i])
            if not slow.finite(row):
                assert (experts, n) == (set(LOGGED), len(LOGGED))
                continue
            right = counts_of(i, row)
            assert n in {min(max(count, low), high) for count in right}
            assert experts == set(order_of(i, row)[:n])
            if policy.tests:
                assert choice.n_rejected[i] in right
            else:
                assert choice.n_rejected is None
            if not experts <= set(slow.finite(row)):
                assert set(slow.finite(row)) <= experts


def assert_tested(policy, rows, p, counts_of):
    def order_of(i, row):
        return slow.by_logit(row) if rows.p_follows_logits else slow.by_p(row, p[i])

    assert_chosen(policy, rows, order_of, lambda i, row: counts_of(row, p[i].tolist()))


def assert_by_logit(policy, logits, counts_of):
    rows = Rows(logits, logged=logged(logits))
    assert_chosen(policy, rows, lambda i, row: slow.by_logit(row), lambda i, row: counts_of(row))


def between(count):
    """The counts that rounding may give: from those at both ends of the slack."""
    ends = sorted((count(-SLACK), count(SLACK)))
    return range(ends[0], ends[1] + 1)


@many
@given(tested=rows_with_p(), alpha=unit)
def test_bh_is_the_step_up_rule(tested, alpha):
    assert_tested(Bh(alpha), *tested, lambda row, p: {slow.bh(row, p, alpha)})


@many
@given(tested=rows_with_p(), alpha=unit)
def test_by_divides_alpha_by_the_harmonic_sum(tested, alpha):
    assert_tested(
        By(alpha), *tested, lambda row, p: between(lambda slack: slow.by(row, p, alpha, slack))
    )


@many
@given(tested=rows_with_p(), alpha=unit, lambda_=unit)
def test_storey_divides_alpha_by_the_share_of_nulls(tested, alpha, lambda_):
    assert_tested(
        Storey(alpha, lambda_),
        *tested,
        lambda row, p: between(lambda slack: slow.storey(row, p, alpha, lambda_, slack)),
    )


@many
@given(tested=rows_with_p(), beta=st.floats(0.001, 1.0), plus=st.booleans())
def test_higher_criticism_takes_the_rank_of_the_largest_score(tested, beta, plus):
    policy = HigherCriticismPlus(beta) if plus else HigherCriticism(beta)
    assert_tested(policy, *tested, lambda row, p: slow.higher_criticism(row, p, beta, plus=plus))


@many
@given(logits=logits_of(), k=st.integers(1, 512))
def test_topk_takes_k(logits, k):
    assume(k <= logits.shape[1])
    assert_by_logit(TopK(k), logits, lambda row: {k})


@many
@given(logits=logits_of(), p=st.floats(0.001, 1.0))
def test_topp_takes_the_smallest_set_that_reaches_p(logits, p):
    assert_by_logit(TopP(p), logits, lambda row: between(lambda slack: slow.top_p(row, p, slack)))


@many
@given(logits=logits_of(), q=unit)
def test_threshold_takes_every_expert_at_or_above_q(logits, q):
    assert_by_logit(
        Threshold(q), logits, lambda row: between(lambda slack: slow.threshold(row, q, slack))
    )


@many
@given(logits=logits_of(), t=st.floats(0.001, 1.0))
def test_minp_takes_every_logit_within_ln_t_of_the_largest(logits, t):
    assert_by_logit(MinP(t), logits, lambda row: {slow.min_p(row, t)})


@many
@given(logits=logits_of(), k=st.floats(0.1, 600))
def test_entropy_takes_k_times_the_relative_entropy(logits, k):
    assert_by_logit(
        Entropy(k), logits, lambda row: between(lambda slack: slow.entropy(row, k, slack))
    )


def test_entropy_takes_one_of_a_router_that_is_sure_and_k_of_one_that_does_not_choose():
    rows = Rows(np.array([[50, 0, 0, 0], [1, 1, 1, 1], [1, 1, np.nan, -np.inf]], np.float32))
    assert Entropy(3.5).decide(rows, Bounds(0)).n_selected.tolist() == [1, 4, 2]
    assert Entropy(3.5).unsure(rows).tolist() == [False, False, False]


@pytest.mark.parametrize("t", [1e-6, 0.01, 0.2, 0.7])
def test_minp_takes_probabilities_of_at_least_t_times_the_largest(t):
    logits = np.random.default_rng(0).normal(-1, 2, (300, 64)).astype(np.float32)
    counts = MinP(t).decide(Rows(logits), Bounds(0)).n_selected
    for row, n in zip(logits.tolist(), counts, strict=True):
        # the cut is a float32 below 16, so off by at most 1e-6 logits
        few, many = (slow.min_p_of_probabilities(row, t, slack) for slack in (2e-6, -2e-6))
        assert few <= n <= many


def test_minp_at_1_takes_those_that_tie_with_the_best():
    rows = Rows(np.array([[1, 3, 3, 2], [np.nan, -1, np.inf, -1.0000001]], np.float32))
    assert MinP(1.0).decide(rows).n_selected.tolist() == [2, 1]


def test_bh_and_by_count_what_scipy_and_statsmodels_count():
    rng = np.random.default_rng(0)
    for E in (2, 64, 200):
        logits = rng.normal(-0.4, 1.5, (50, E)).astype(np.float32)
        null = normal_null(0)
        rows, p = Rows(logits, null), null.p_value(logits)
        for policy, scipy_name, statsmodels_name in (
            (Bh, "bh", "fdr_bh"),
            (By, "by", "fdr_by"),
        ):
            for alpha in (0.01, 0.1, 0.3, 0.7):
                counts = policy(alpha).decide(rows).n_rejected.tolist()
                adjusted = false_discovery_control(p, axis=1, method=scipy_name)
                assert (adjusted <= alpha).sum(axis=1).tolist() == counts
                rejected = [multipletests(row, alpha, method=statsmodels_name)[0] for row in p]
                assert [int(row.sum()) for row in rejected] == counts


@many
@given(tested=rows_with_p(), alpha=unit, lambda_=unit)
def test_storey_never_takes_fewer_than_bh(tested, alpha, lambda_):
    rows, _ = tested
    adaptive = Storey(alpha, lambda_).decide(rows).n_rejected
    assert (adaptive >= Bh(alpha).decide(rows).n_rejected).all()


@many
@given(tested=rows_with_p(), positions=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_no_row_gets_fewer_experts_further_on(tested, positions):
    rows, _ = tested
    for name, kind in families().items():
        if name == "lfdr":  # needs a central null
            continue
        few, more = (
            parse_policy(name, open_value=True)
            .at(kind.value_at(position, rows.n_experts))
            .decide(rows, Bounds(0))
            .n_selected
            for position in sorted(positions)
        )
        assert (few <= more).all(), name


def test_higher_criticism_by_hand():
    # sorted 0.08 0.1 0.55 0.99: the scores are 2 (k / 4 - p) / sqrt(p (1 - p)) = 1.3 2.7 0.8 0.2
    p = np.array([[0.1, 0.08, 0.55, 0.99]])
    rows = Rows(np.zeros((1, 4), np.float32), p=p)
    assert HigherCriticism().decide(rows).n_rejected.tolist() == [2]
    assert HigherCriticism(0.25).decide(rows).n_rejected.tolist() == [1]
    assert HigherCriticismPlus().decide(rows).n_rejected.tolist() == [3]  # p_(k) > 1/4 from k = 3


@pytest.mark.parametrize("kind", [HigherCriticism, HigherCriticismPlus])
@pytest.mark.parametrize("p", [1.0, 0.999, np.inf])
def test_higher_criticism_selects_nothing_without_an_excess_of_small_p(kind, p):
    rows = Rows(np.zeros((1, 8), np.float32), p=np.full((1, 8), p))
    expected = 8 if p == 0.999 else 0  # 1 - p is an excess, if a small one
    assert kind().decide(rows).n_rejected.tolist() == [expected]


def test_higher_criticism_takes_all_experts_whose_p_is_0():
    p = np.array([[0.0, 0.0, 0.0, 0.4]])
    assert HigherCriticism().decide(Rows(np.zeros((1, 4), np.float32), p=p)).n_rejected == [3]


def test_lfdr_takes_every_logit_from_its_threshold_on():
    x = np.random.default_rng(6).normal(size=(200, 16)).astype(np.float32)
    x[:, :2] += np.float32(3)
    x[0, :3] = np.nan, np.inf, -np.inf
    histogram = Histogram.of(x)
    layers = fit_histograms(
        {HistogramKey(0, None, Trim()): histogram}, FitOptions(null_from="central"), source=["a"]
    )
    t = layers[0].curves[0].lfdr_threshold(0.3)
    found = Lfdr(0.3).decide(Rows(x, layers[0]), Bounds(0))
    assert np.isfinite(t) and found.n_rejected.sum() > 0
    for row, n, chosen in zip(x, found.n_rejected, found.chosen, strict=True):
        assert n == sum(bool(v >= t) for v in row if np.isfinite(v))
        assert chosen.tolist() == [bool(np.isfinite(v) and v >= t) for v in row]
    with pytest.raises(KdeMismatch, match="--null-from central"):
        Lfdr(0.3).decide(Rows(x))
