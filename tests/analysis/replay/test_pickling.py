"""What a fold of the engine counts may be counted in other processes, to the same bits."""

import pickle
from functools import partial

import numpy as np
import polars as pl
import pytest

import bhlog.analysis.fold as folding
from bhlog.analysis.fold import fold
from bhlog.analysis.noise import Noise
from bhlog.analysis.replay.comparison import Summaries
from bhlog.analysis.replay.decide import Decider
from bhlog.analysis.replay.match import Totals
from bhlog.analysis.replay.registry import parse_policy
from bhlog.analysis.run import open_log
from bhlog.analysis.sweep.grid import GRID
from bhlog.analysis.sweep.profiling import LayerCounts, Shared, Tables
from bhlog.capture.contract.rule import BhOptions
from tests.analysis.replay.test_one_engine import by_expert, empirical
from tests.synthetic import normal_kde, write_run

LAYERS, E = (0, 2, 3), 64
TEXTS = ("bh:0.3", "by:0.9", "storey:0.2,lambda=0.4", "hc+:1", "topk:5", "topp:0.7")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    logits = np.random.default_rng(3).normal(-0.4, 1.6, (3, 4, 60, E)).astype(np.float32)
    logits[0, 0, :3] = np.nan
    return open_log(
        write_run(
            tmp_path_factory.mktemp("pickling") / "run", layers=LAYERS, n_experts=E,
            n_sequences=4, length=60, n_shards=4, logits=logits, kde=normal_kde(LAYERS),
            options=BhOptions(alpha=0.3, max_k=12),
        )
    )  # fmt: skip


def elsewhere(thing):
    """The same as another process gets it."""
    return pickle.loads(pickle.dumps(thing))


@pytest.fixture(autouse=True)
def several_stretches(monkeypatch):
    monkeypatch.setattr(folding, "STRETCH_LOGITS", 2 * 60 * E)  # two row groups


def folded_elsewhere(log, make, columns):
    """A fold whose every stretch is counted in a process of its own."""
    total, stretches = make(), folding.stretches_of(log)
    assert len(stretches) > 1
    for stretch in stretches:
        part = elsewhere(elsewhere(make)())
        for _, groups in stretch:
            for group in groups:
                part.update(log.read(group, columns))
        total.merge(elsewhere(part))
    return total


@pytest.mark.parametrize("kind", ["pooled", "by expert", "empirical"])
def test_summaries_and_totals_are_the_same(run, kind, tmp_path):
    log, kde = run, None
    if kind == "by expert":
        kde = by_expert(normal_kde(LAYERS))
    if kind == "empirical":
        log = open_log(empirical(tmp_path / "run", BhOptions(max_k=12)))
    policies = [parse_policy(text) for text in TEXTS]
    decider = Decider(log, policies, kde)
    make = partial(Summaries, decider, (1.0,) * len(policies), 8, partial(Noise, E))
    labels = [pl.lit(text).alias("policy") for text in TEXTS]
    columns = (*dict.fromkeys([*decider.columns, "rank", "sequence", "position"]),)
    here = fold(log, make, columns, whole_groups=decider.empirical)
    there = folded_elsewhere(log, make, columns)
    assert pl.concat(here.frames(labels)).equals(pl.concat(there.frames(labels)))
    counted = fold(log, partial(Totals, decider), decider.columns, whole_groups=decider.empirical)
    again = folded_elsewhere(log, partial(Totals, decider), decider.columns)
    assert again.totals.tolist() == counted.totals.tolist() and again.rows == counted.rows


@pytest.mark.parametrize("kept", [False, True])
def test_profiles_are_the_same_whether_threads_share_or_not(run, kept):
    tables = Tables(run.kde, np.array(GRID), E)
    columns = ("layer", "logits", "rank", "sequence", "position")
    noise = partial(Noise, E)
    shares = (None, Shared(), Shared())
    makes = [partial(LayerCounts, tables, kept, noise, shared) for shared in shares]
    alone, together = (fold(run, make, columns).layers for make in makes[:2])
    there = folded_elsewhere(run, makes[2], columns).layers
    here = folded_elsewhere(run, makes[0], columns).layers
    for layers in (together, there, here):
        assert [*layers] == [*alone] == [*LAYERS]
        for layer, counted in layers.items():
            assert np.array_equal(counted.rows, alone[layer].rows)
            assert (counted.kept is None) == (not kept)
            assert not kept or np.array_equal(counted.kept, alone[layer].kept)


def test_tables_that_are_soon_made_again_do_not_travel(run):
    tables = Tables(run.kde, np.array(GRID), E)
    before = len(pickle.dumps(tables))
    tables[0], tables[2]
    assert len(pickle.dumps(tables)) == before
    decider = Decider(run, [parse_policy("bh:0.3")])
    before = len(pickle.dumps(decider))
    decider.decide(run.read(next(run.row_groups()), decider.columns))
    assert len(pickle.dumps(decider)) == before
