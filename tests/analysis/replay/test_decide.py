import dataclasses

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bhlog.analysis.fold import Scope
from bhlog.analysis.log import logits_of
from bhlog.analysis.replay.comparison import replay
from bhlog.analysis.replay.decide import decider_of
from bhlog.analysis.replay.settings import settings_of
from bhlog.analysis.run import open_log
from bhlog.analysis.verify.replayed import verify_replay
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.rule import BhOptions, Bounds
from tests.analysis.replay.plain import plain_rule, rows_of_logits
from tests.synthetic import normal_kde, normal_null, write_run

LAYERS = (0, 1, 2)


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
    options = settings_of(log, [0.2], bounds=Bounds(0, 5))
    decider = decider_of(log, options)
    frame = replay(log, options, scope=Scope(threads=1))
    for layer in LAYERS:
        n, kept, recall, load = [], [], [], np.zeros(E)
        for batch in log.batches([*decider.columns, "forward", "rank"], layers=[layer]):
            (decided,) = decider.decide(batch)
            logged = batch.column("experts").to_pylist()
            for i, row in enumerate(logits_of(batch).astype(np.float64)):
                experts = decided.order[i, : decided.n_selected[i]].tolist()
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


def test_a_run_without_a_null_model_says_what_to_do(tmp_path):
    log = open_log(write_run(tmp_path / "native"))
    with pytest.raises(KdeMismatch, match="bhlog kde fit"):
        log.replay(0.3)


def test_a_bound_above_the_experts_is_an_error(run):
    with pytest.raises(InvalidOption, match="16 experts"):
        open_log(run).replay(0.3, max_k=17)


@settings(max_examples=25, deadline=None)
@given(
    logits=rows_of_logits(sizes=(2, 3, 8, 65)),
    alpha=st.floats(0.001, 0.99),
    bounds=st.tuples(st.integers(0, 2), st.integers(2, 9)),
)
def test_decisions_are_those_of_the_written_rule(tmp_path_factory, logits, alpha, bounds):
    E = logits.shape[1]
    folder = tmp_path_factory.mktemp("rule") / "run"
    write_run(
        folder, layers=[0], n_experts=E, n_sequences=1, length=6, n_shards=1, top_k=2,
        logits=logits[None, None],
    )  # fmt: skip
    log, kde = open_log(folder), normal_kde([0])
    low, high = bounds[0], min(bounds[1], E)
    decider = decider_of(log, settings_of(log, [alpha], bounds=Bounds(low, high)), kde)
    batch = next(log.batches([*decider.columns]))
    (decided,) = decider.decide(batch)
    for i, row in enumerate(logits.tolist()):
        logged = batch.column("experts")[i].as_py()
        expected = plain_rule(row, normal_null(0), alpha, low, high) or (0, logged)
        n = decided.n_selected[i]
        assert (decided.n_rejected[i], decided.order[i, :n].tolist()) == expected
    for rows in decider.rows(batch):
        (selection,) = (policy.decide(rows) for policy in decider.policies)
        assert selection.n_rejected.tolist() == decided.n_rejected.tolist()
        assert selection.n_selected.tolist() == decided.n_selected.tolist()
        assert selection.out_of_order is None
        chosen = rows.chosen(selection.n_selected)
        first = [set(row[:n]) for row, n in zip(decided.order, selection.n_selected, strict=True)]
        assert [set(np.flatnonzero(row)) for row in chosen] == first


def test_renormalize_is_as_in_the_run_unless_given(run):
    log = open_log(run)
    assert settings_of(log, [0.1])[0] == dataclasses.replace(
        log.manifest.routing.options, alpha=0.1
    )
    assert settings_of(log, [0.1], renormalize=True)[0].renormalize is True
    assert settings_of(log, [0.1], renormalize=False)[0].renormalize is False


def test_out_writes_the_decisions_too(run, tmp_path):
    log = open_log(run)
    frame = log.replay(0.2, renormalize=True, out=tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    rows = pq.read_table(folder)
    assert sum(rows["n_selected"].to_pylist()) / len(rows) == pytest.approx(
        frame.filter(pl.col("layer").is_null())["mean_experts"].item()
    )
    sums = [sum(weights) for weights in rows["weights"].to_pylist()]
    assert sums == pytest.approx([1] * len(rows), rel=1e-6)  # float32
    with pytest.raises(InvalidOption, match="every row"):
        log.replay(0.2, out=tmp_path / "other", layers=[0])


def test_no_matching_row_is_an_error(run):
    with pytest.raises(InvalidOption, match="no rows to replay where position > 1000"):
        open_log(run).replay(0.3, where="position > 1000")


def test_a_null_model_replaces_empirical_p_values(tmp_path):
    options = BhOptions(alpha=0.3, p_values="empirical")
    folder = write_run(tmp_path / "run", options=options, kde=normal_kde(LAYERS))
    log = open_log(folder)
    assert decider_of(log, [options]).empirical
    assert log.replay(0.3, kde=normal_kde(LAYERS))["logged_jaccard"].to_list() == [1.0] * 4
