"""A replay is the policy bh at the run's bounds: the two say the same, bit for bit."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from bhlog.analysis.fold import Scope
from bhlog.analysis.replay.comparison import compare, replay
from bhlog.analysis.replay.settings import settings_of
from bhlog.analysis.run import open_log
from bhlog.capture.contract.null.model import KdeModel, LayerNull
from bhlog.capture.contract.rule import BhOptions, Bounds
from tests.synthetic import normal_kde, normal_logits, write_run

LAYERS, E = (0, 2, 3), 64
ALPHAS = [0.02, 0.3, 0.3000001, 0.95]


def logits_of_every_kind(seed):
    """(3, 4, 90, E): lattice values with ties, infinities, NaN, and rows without a finite one."""
    rng = np.random.default_rng(seed)
    logits = normal_logits(rng, 3 * 4 * 90, E).reshape(3, 4, 90, E)
    logits[:, :, ::9, 3] = np.nan
    logits[:, :, ::7, 2] = np.inf
    logits[:, :, ::11, 5] = -np.inf
    logits[:, 1:3, 4:6] = np.nan
    logits[:, :, 6] = 1.0
    return logits


def run(folder, options=None, n_shards=4, seed=0):
    return write_run(
        folder, layers=LAYERS, n_experts=E, n_sequences=12, length=30, n_shards=n_shards,
        options=options, kde=None if options is None else normal_kde(LAYERS),
        logits=logits_of_every_kind(seed).reshape(3, n_shards, -1, E), decode_from=20,
    )  # fmt: skip


def by_expert(kde):
    """The same nulls, shifted a little for each expert."""
    return KdeModel(
        {
            layer: LayerNull(
                layer,
                tuple(
                    replace(kde[layer].curves[0], expert=i, x0=kde[layer].curves[0].x0 + i / 90)
                    for i in range(E)
                ),
            )
            for layer in kde
        }
    )


def empirical(folder, options):
    """A run routed by empirical p-values, without a null model."""
    path = run(folder, options, n_shards=1)  # a forward is in one shard
    manifest = open_log(path).manifest
    own = replace(options, p_values="empirical")
    replace(manifest, routing=replace(manifest.routing, options=own, kde_sha256=None)).write(path)
    (path / "kde.parquet").unlink()
    return path


KINDS = {
    "pooled": lambda folder: (run(folder, BhOptions(alpha=0.3, min_k=2, max_k=12)), None),
    "pooled, no bounds": lambda folder: (run(folder), normal_kde(LAYERS)),
    "pooled, none at all": lambda folder: (run(folder, BhOptions(min_k=0)), None),
    "by expert": lambda folder: (run(folder, BhOptions(max_k=20)), by_expert(normal_kde(LAYERS))),
    "empirical": lambda folder: (empirical(folder, BhOptions(max_k=12)), None),
    "empirical, under a null": lambda folder: (
        empirical(folder, BhOptions(max_k=12)),
        normal_kde(LAYERS),
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    folder, kde = KINDS[request.param](tmp_path_factory.mktemp("engine") / "run")
    return open_log(folder), kde


def shared(frame):
    """Every column of both tables: all but the name of the setting."""
    return frame.select(pl.exclude("alpha", "policy", r"^.*_difference(_se)?$"))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_replay_is_the_policy_bh_bit_for_bit(case, threads):
    log, kde = case
    compared = compare(
        log, [f"bh:{alpha!r}" for alpha in ALPHAS], kde=kde, scope=Scope(threads=threads)
    )
    replayed = replay(log, settings_of(log, ALPHAS), kde=kde, scope=Scope(threads=threads))
    assert shared(compared).columns == replayed.columns[1:]
    assert_frame_equal(shared(compared), shared(replayed), check_exact=True)


def test_they_agree_under_other_bounds_and_on_some_of_the_rows(case):
    log, kde = case
    for where in ("phase = 'decode'", "forward < 5"):
        options = {"kde": kde, "scope": Scope([0, 3], where)}
        compared = compare(log, ["bh:0.3", "bh:0.5"], bounds=Bounds(3, 9), **options)
        settings = settings_of(log, [0.3, 0.5], bounds=Bounds(3, 9))
        replayed = replay(log, settings, **options)
        assert set(replayed["min_k"]) == {3} and set(replayed["max_k"]) == {9}
        assert_frame_equal(shared(compared), shared(replayed), check_exact=True)


def test_temperature_changes_what_is_kept_and_nothing_else(case):
    log, kde = case
    compared = compare(log, ["bh:0.3"], kde=kde)
    replayed = replay(log, settings_of(log, [0.3], temperature=2.0), kde=kde)
    assert replayed["probability_kept"].to_list() != compared["probability_kept"].to_list()
    assert_frame_equal(
        shared(compared).drop("probability_kept", "probability_kept_se"),
        shared(replayed).drop("probability_kept", "probability_kept_se"),
        check_exact=True,
    )


def test_what_a_run_logged_is_what_its_own_setting_says(tmp_path):
    options = BhOptions(alpha=0.3, min_k=2, max_k=5)
    log = open_log(run(tmp_path / "run", options))
    finite = "NOT (sequence BETWEEN 3 AND 8 AND position BETWEEN 4 AND 5)"  # what the rule decides
    for frame in (
        compare(log, ["bh:0.3"], scope=Scope(where=finite)),
        replay(log, settings_of(log, [0.3]), scope=Scope(where=finite)),
    ):
        assert frame["logged_jaccard"].to_list() == [1.0] * 4
        assert frame.filter(pl.col("layer").is_null())["max_experts"].item() == 5
