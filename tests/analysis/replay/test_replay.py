import math

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import false_discovery_control
from statsmodels.stats.multitest import multipletests

from analysis.log import open_log
from analysis.replay.profile import profile_log
from analysis.replay.ranked import RankedRows, packed, popcount
from analysis.replay.replay import Replay, replay, settings_of
from analysis.verify.replayed import verify_replay
from capture.contract.bh import BhOptions
from capture.contract.errors import InvalidOption, KdeMismatch
from tests.synthetic import normal_kde, normal_null, write_run

LAYERS = (0, 1, 2)
VALUES = [-np.inf, np.inf, np.nan, -1.0, 0.0, 0.5, 0.5, 1.0, 2.0, 3.0, 4.5]


def plain_rule(row, null, alpha, min_k, max_k):
    """(n_rejected, experts) of one row by the rule as it is written; None if nothing is finite."""
    E = len(row)
    keys = [x if math.isfinite(x) else -math.inf for x in row]
    if not any(math.isfinite(x) for x in row):
        return None
    order = sorted(range(E), key=lambda i: (-keys[i], i))
    n = 0
    for k in range(1, E + 1):
        logit = keys[order[k - 1]]
        p = float(null.p_value(np.array([logit]))[0]) if math.isfinite(logit) else math.inf
        if p <= k * alpha / E:
            n = k
    return n, order[: min(max(n, min_k), max_k)]


@st.composite
def rows_of_logits(draw):
    E = draw(st.sampled_from([2, 3, 8, 63, 64, 65, 130, 512]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["few values", "normal", "constant"]))
    if kind == "few values":
        return rng.choice(np.array(VALUES, np.float32), (6, E))
    if kind == "constant":
        return np.full((6, E), rng.normal(), np.float32)
    return rng.normal(0, 2, (6, E)).astype(np.float32)


def lists(rows):
    return pa.array([list(row) for row in rows], pa.list_(pa.uint16()))


@settings(max_examples=60, deadline=None)
@given(
    logits=rows_of_logits(),
    alpha=st.floats(0.001, 0.99),
    bounds=st.tuples(st.integers(0, 2), st.integers(2, 9)),
)
def test_ranked_rows_choose_what_the_written_rule_chooses(logits, alpha, bounds):
    E, null = logits.shape[1], normal_null(0)
    low, high = bounds[0], min(bounds[1], E)
    ranked = RankedRows(logits, lists([[1, 0]] * len(logits)))
    n_rejected = ranked.n_rejected(null.thresholds(alpha, E))
    n = ranked.n_selected(n_rejected, low, high)
    chosen = ranked.chosen(n)
    for i, row in enumerate(logits.tolist()):
        expected = plain_rule(row, null, alpha, low, high) or (0, [1, 0])
        assert (n_rejected[i], n[i]) == (expected[0], len(expected[1]))
        assert set(np.flatnonzero(chosen[i])) == set(expected[1])


@settings(max_examples=60, deadline=None)
@given(logits=rows_of_logits(), alpha=st.floats(0.001, 0.49))
def test_raising_alpha_never_drops_an_expert(logits, alpha):
    E, null = logits.shape[1], normal_null(0)
    ranked = RankedRows(logits, lists([[]] * len(logits)))
    few, many = (
        ranked.chosen(ranked.n_selected(ranked.n_rejected(null.thresholds(a, E)), 0, E))
        for a in (alpha, 2 * alpha)
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
        ranked = RankedRows(values, lists([[]] * 8))
        return ranked.chosen(ranked.n_selected(ranked.n_rejected(thresholds), 1, 8))

    assert np.array_equal(chosen(logits[:, order]), chosen(logits)[:, order])


@given(chosen=arrays(np.bool_, st.tuples(st.integers(1, 5), st.integers(2, 200))))
def test_packed_bits_count_the_chosen(chosen):
    assert popcount(packed(chosen)).tolist() == chosen.sum(axis=1).tolist()


def test_counts_are_those_of_scipy_and_statsmodels():
    rng = np.random.default_rng(0)
    null, E = normal_null(0), 64
    logits = rng.normal(-0.4, 1.5, (200, E)).astype(np.float32)
    ranked = RankedRows(logits, lists([[]] * 200))
    for alpha in (0.01, 0.1, 0.3, 0.7):
        counts = ranked.n_rejected(null.thresholds(alpha, E))
        for row, count in zip(logits, counts, strict=True):
            p = null.p_value(row)
            assert (false_discovery_control(p) <= alpha).sum() == count
            assert multipletests(p, alpha, method="fdr_bh")[0].sum() == count


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay") / "run"
    options = BhOptions(alpha=0.3, max_k=12)
    return write_run(folder, options=options, kde=normal_kde(LAYERS))


def test_a_run_replayed_at_its_own_settings_gives_its_own_decisions(run):
    assert verify_replay(open_log(run))["mismatches"].to_list() == [0, 0, 0]
    frame = open_log(run).replay(0.3)
    assert frame["logged_jaccard"].to_list() == [1.0] * 4


def test_summary_is_the_count_of_the_decisions_row_by_row(run):
    log, E = open_log(run), 16
    options = settings_of(log, [0.2], min_k=0, max_k=5)
    rule = Replay(log, options)
    frame = replay(log, options, threads=1)
    for layer in LAYERS:
        n, kept, recall, load = [], [], [], np.zeros(E)
        for batch in log.batches([*rule.columns, "forward", "rank"], layers=[layer]):
            decided = rule.decide(batch)
            logged = batch.column("experts").to_pylist()
            for i, row in enumerate(decided.logits.astype(np.float64)):
                experts = decided.order[i, : decided.n_selected[0, i]].tolist()
                weight = np.exp(row - row.max())
                n.append(len(experts))
                kept.append(weight[experts].sum() / weight.sum())
                recall.append(len(set(experts) & set(logged[i])) / max(1, len(logged[i])))
                load[experts] += 1
        row = frame.row(by_predicate=pl.col("layer") == layer, named=True)
        assert row["histogram"] == np.bincount(n, minlength=E + 1).tolist()
        assert row["mean_experts"] == pytest.approx(np.mean(n))
        assert row["probability_kept"] == pytest.approx(np.mean(kept), rel=1e-5)  # float32 sums
        assert row["logged_recall"] == pytest.approx(np.mean(recall))
        assert row["busiest_share"] == pytest.approx(load.max() / load.sum())


def test_several_settings_at_once_equal_one_by_one(run):
    log = open_log(run)
    both = log.replay([0.1, 0.5], max_k=6)
    alone = pl.concat([log.replay(alpha, max_k=6) for alpha in (0.1, 0.5)])
    assert both.equals(alone)


def test_profile_equals_the_direct_count(run):
    log = open_log(run)
    alphas = [0.01, 0.1, 0.3, 0.9]
    profile = profile_log(log, alphas=alphas)
    for alpha in alphas:
        direct = log.replay(alpha, min_k=1, max_k=7)
        for layer, mean in direct.select("layer", "mean_experts").iter_rows():
            assert profile.mean_experts(alpha, max_k=7, layer=layer) == pytest.approx(mean)


def test_a_run_without_a_null_model_says_what_to_do(tmp_path):
    log = open_log(write_run(tmp_path / "native"))
    with pytest.raises(KdeMismatch, match="bhlog kde fit"):
        log.replay(0.3)


def test_a_bound_above_the_experts_is_an_error(run):
    with pytest.raises(InvalidOption, match="16 experts"):
        open_log(run).replay(0.3, max_k=17)
