import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control
from statsmodels.stats.multitest import multipletests

from bhlog.analysis.replay.rows import Rows
from tests.analysis.replay.plain import lists, plain_rule, rows_of_logits
from tests.synthetic import normal_null


@settings(max_examples=60, deadline=None)
@given(
    logits=rows_of_logits(),
    alpha=st.floats(0.001, 0.99),
    bounds=st.tuples(st.integers(0, 2), st.integers(2, 9)),
)
def test_rows_choose_what_the_written_rule_chooses(logits, alpha, bounds):
    E, null = logits.shape[1], normal_null(0)
    low, high = bounds[0], min(bounds[1], E)
    rows = Rows(logits, logged=lists([[1, 0]] * len(logits)))
    n_rejected, n = rows.step_up(null.thresholds(alpha, E), low, high)
    chosen = rows.chosen(n)
    for i, row in enumerate(logits.tolist()):
        expected = plain_rule(row, null, alpha, low, high) or (0, [1, 0])
        assert (n_rejected[i], n[i]) == (expected[0], len(expected[1]))
        assert set(np.flatnonzero(chosen[i])) == set(expected[1])


@settings(max_examples=60, deadline=None)
@given(logits=rows_of_logits(), alpha=st.floats(0.001, 0.49))
def test_raising_alpha_never_drops_an_expert(logits, alpha):
    E, null = logits.shape[1], normal_null(0)
    rows = Rows(logits, logged=lists([[]] * len(logits)))
    few, many = (
        rows.chosen(rows.step_up(null.thresholds(a, E), 0, E)[1]) for a in (alpha, 2 * alpha)
    )
    assert not (few & ~many).any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), alpha=st.floats(0.01, 0.9))
def test_permuting_experts_permutes_the_choice(seed, alpha):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (8, 32)).astype(np.float32)  # no equal logits, so no ties to settle
    order = rng.permutation(32)
    thresholds = normal_null(0).thresholds(alpha, 32)

    def chosen(values):
        rows = Rows(values, logged=lists([[]] * 8))
        return rows.chosen(rows.step_up(thresholds, 1, 8)[1])

    assert np.array_equal(chosen(logits[:, order]), chosen(logits)[:, order])


def test_counts_are_those_of_scipy_and_statsmodels():
    rng = np.random.default_rng(0)
    null, E = normal_null(0), 64
    logits = rng.normal(-0.4, 1.5, (200, E)).astype(np.float32)
    rows = Rows(logits, logged=lists([[]] * 200))
    for alpha in (0.01, 0.1, 0.3, 0.7):
        counts, _ = rows.step_up(null.thresholds(alpha, E), 0, E)
        for row, count in zip(logits, counts, strict=True):
            p = null.p_value(row)
            assert (false_discovery_control(p) <= alpha).sum() == count
            assert multipletests(p, alpha, method="fdr_bh")[0].sum() == count
