import math
from collections import Counter

import numpy as np
import polars as pl
import pytest

from bhlog.analysis.kernels.tally import overlap
from bhlog.analysis.replay.comparison import replay
from bhlog.analysis.replay.policy import Selection
from bhlog.analysis.replay.rows import Rows
from bhlog.analysis.replay.settings import settings_of
from bhlog.analysis.replay.summary import LayerSummary
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import CorruptShard
from bhlog.capture.contract.rule import BhOptions, Bounds
from tests.analysis.replay.plain import lists, plain_rule
from tests.synthetic import normal_kde, normal_null, write_run

E, TOP_K, LAYERS = 12, 3, (0, 5)


@pytest.fixture(scope="module", params=["native", "bh"])
def run(request, tmp_path_factory):
    logits = np.random.default_rng(0).normal(-0.4, 1.6, (2, 1, 40, E)).astype(np.float32)
    logits[:, :, :, 7] = -9.0  # an expert that nothing chooses
    if request.param == "native":
        logits[0, 0, 3] = np.nan  # keeps the model's own experts
    logits[1, 0, 4, :6] = 2.0  # ties
    return write_run(
        tmp_path_factory.mktemp("summary") / request.param, layers=LAYERS, n_experts=E,
        n_sequences=2, length=20, n_shards=1, top_k=TOP_K, logits=logits, kde=normal_kde(LAYERS),
        options=BhOptions(alpha=0.2, min_k=0) if request.param == "bh" else None,
    )  # fmt: skip


def plain(log, layer, alpha, low, high, temperature):
    """Every column by hand, from sets of experts."""
    sets, natives, loggeds, kept, none = [], [], [], [], 0
    for batch in log.batches(["logits", "experts"], layers=[layer]):
        for row, logged in zip(*(batch[c].to_pylist() for c in ("logits", "experts")), strict=True):
            decided = plain_rule(row, normal_null(layer), alpha, low, high)
            n_rejected, experts = decided or (0, logged)
            sets.append(experts)
            none += n_rejected == 0
            native = plain_rule(row, normal_null(layer), alpha, TOP_K, TOP_K)
            natives.append(native[1] if native else logged)
            loggeds.append(logged)
            weights = [math.exp(x / temperature) if math.isfinite(x) else 0.0 for x in row]
            kept.append(sum(weights[i] for i in experts) / (sum(weights) or 1))
    n = sorted(len(experts) for experts in sets)
    mean = sum(n) / len(n)
    load = Counter(i for experts in sets for i in experts)
    shares = [load[i] / sum(n) for i in range(E)]
    gini = sum(abs(a - b) for a in shares for b in shares) / (2 * E)
    cv = math.sqrt(sum((x - 1 / E) ** 2 for x in shares) / E) * E

    def overlap(others, measure):
        return sum(measure(set(a), set(b)) for a, b in zip(sets, others, strict=True)) / len(sets)

    def jaccard(a, b):
        return len(a & b) / len(a | b) if a | b else 1

    def recall(a, b):
        return len(a & b) / len(b) if b else 1

    return {
        "rows": len(n),
        "mean_experts": mean,
        "sd_experts": math.sqrt(sum((x - mean) ** 2 for x in n) / len(n)),
        "min_experts": n[0],
        "median_experts": n[(len(n) - 1) // 2],
        "p95_experts": n[math.ceil(0.95 * len(n)) - 1],
        "max_experts": n[-1],
        "at_min_k": n.count(low) / len(n),
        "at_max_k": n.count(high) / len(n),
        "none_rejected": none / len(n),
        "probability_kept": sum(kept) / len(n),
        "native_jaccard": overlap(natives, jaccard),
        "native_recall": overlap(natives, recall),
        "logged_jaccard": overlap(loggeds, jaccard),
        "logged_recall": overlap(loggeds, recall),
        "load_entropy": -sum(x * math.log(x) for x in shares if x) / math.log(E),
        "load_cv": cv,
        "load_gini": gini,
        "busiest_share": max(shares),
        "dead_experts": shares.count(0),
        "flops": mean / TOP_K,
        "histogram": [n.count(k) for k in range(E + 1)],
    }


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("alpha", "low", "high"), [(0.2, 0, 12), (0.5, 1, 5), (0.01, 2, 4)])
def test_every_column_is_what_counting_by_hand_gives(run, alpha, low, high, temperature):
    log = open_log(run)
    options = settings_of(log, [alpha], bounds=Bounds(low, high), temperature=temperature)
    frame = replay(log, options)
    by_layer = [plain(log, layer, alpha, low, high, temperature) for layer in LAYERS]
    for layer, expected in zip(LAYERS, by_layer, strict=True):
        row = frame.row(by_predicate=pl.col("layer") == layer, named=True)
        assert (row["alpha"], row["min_k"], row["max_k"]) == (alpha, low, high)
        for name, value in expected.items():
            # probabilities are float32 sums
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-12), name
    overall = frame.row(by_predicate=pl.col("layer").is_null(), named=True)
    for name in ("load_entropy", "load_cv", "load_gini", "busiest_share", "mean_experts"):
        assert overall[name] == pytest.approx(np.mean([layer[name] for layer in by_layer]))
    for name in ("rows", "dead_experts"):
        assert overall[name] == sum(layer[name] for layer in by_layer)
    histograms = [layer["histogram"] for layer in by_layer]
    assert overall["histogram"] == np.sum(histograms, axis=0).tolist()


def test_a_replay_at_the_settings_of_the_run_overlaps_wholly_even_where_nothing_is_chosen(run):
    log = open_log(run)
    if log.manifest.routing.options is None:
        pytest.skip("a native run has no settings")
    frame = log.replay(0.2)
    assert frame["min_experts"].min() == 0
    assert frame["logged_jaccard"].to_list() == [1.0] * 3
    assert frame["logged_recall"].to_list() == [1.0] * 3


def test_two_empty_sets_are_the_same():
    assert [overlap(0, a, b) for a, b in [(0, 0), (2, 0), (0, 3)]] == [(1, 1), (0, 1), (0, 0)]


def test_no_choice_at_all_is_an_even_load(tmp_path):
    logits = np.full((1, 1, 4, E), -9.0, np.float32)
    folder = write_run(
        tmp_path / "run", layers=[0], n_experts=E, n_sequences=1, length=4, n_shards=1,
        top_k=TOP_K, logits=logits, kde=normal_kde([0]),
    )  # fmt: skip
    row = open_log(folder).replay(0.1, min_k=0).row(0, named=True)
    assert (row["mean_experts"], row["none_rejected"], row["load_gini"]) == (0, 1, 0)
    assert row["dead_experts"] == E


def test_an_expert_that_the_model_does_not_have_is_damage():
    rows = Rows(np.zeros((2, 4), np.float32), logged=lists([[1, 0], [3, 4]]))
    n = np.array([2, 2])
    with pytest.raises(CorruptShard, match="beyond the 4 of the model"):
        LayerSummary(4).add(Selection(rows, n, None), top_k=2)


def test_more_logged_experts_than_the_model_has_are_damage():
    rows = Rows(np.full((1, 4), np.nan, np.float32), logged=lists([[0] * 5000]))
    _, n = rows.step_up(np.zeros(4, np.float32), 1, 4)
    with pytest.raises(CorruptShard, match="or more experts than it has"):
        LayerSummary(4).add(Selection(rows, n, None), top_k=2)
