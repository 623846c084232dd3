import dataclasses
import hashlib
from itertools import product

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.fold import Scope
from bhlog.analysis.run import open_log
from bhlog.analysis.sweep.grid import GRID, MOST_CELLS, grid_for
from bhlog.analysis.sweep.profile import Profile
from bhlog.analysis.sweep.profiling import profile_log
from bhlog.capture.contract.checksum import with_checksum
from bhlog.capture.contract.errors import CorruptProfile, InvalidOption, KdeMismatch
from bhlog.capture.contract.null.model import KdeModel, LayerNull
from bhlog.capture.contract.rule import BhOptions, Bounds
from tests.synthetic import normal_kde, normal_null, write_run

LAYERS = (0, 1, 3)
ALPHAS = (0.01, 0.1, 0.3, 0.9)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    logits = np.random.default_rng(0).normal(-0.4, 1.6, (3, 2, 100, 16)).astype(np.float32)
    logits[0, 0, :3] = np.nan
    logits[1] += 0.5  # layers differ in how many experts an alpha gives
    logits[2, 1, 5, 2] = np.inf
    return write_run(
        tmp_path_factory.mktemp("profile") / "run", layers=LAYERS, kde=normal_kde(LAYERS),
        options=BhOptions(alpha=0.3), logits=logits,
    )  # fmt: skip


@pytest.fixture(scope="module")
def profile(run):
    return open_log(run).sweep(kept=True)


DECIDABLE = "layer != 0 OR position > 2 OR sequence != 0"


@pytest.mark.parametrize("bounds", [(1, None), (0, 16), (2, 7)])
def test_every_answer_is_what_replay_counts(run, profile, bounds):
    log = open_log(run)
    low, high = bounds
    for alpha in ALPHAS:
        direct = log.replay(alpha, min_k=low, max_k=high, where=DECIDABLE)
        options = {"min_k": low, "max_k": high}
        for row in direct.iter_rows(named=True):
            mean = profile.mean_experts(alpha, layer=row["layer"], **options)
            assert mean == pytest.approx(row["mean_experts"], rel=1e-12)
            kept = profile.probability_kept(alpha, layer=row["layer"], **options)
            assert kept == pytest.approx(row["probability_kept"], rel=1e-5)  # float32 sums


def test_rows_without_a_finite_logit_are_left_out(profile):
    assert [profile.rows(layer) for layer in LAYERS] == [197, 200, 200]


def test_the_alpha_for_a_target_is_the_smallest(profile):
    for layer, target in product((None, *LAYERS), (1.5, 4, 9)):
        alpha = profile.alpha_for(target, max_k=12, layer=layer)
        before = GRID[GRID.index(alpha) - 1]
        assert profile.mean_experts(alpha, max_k=12, layer=layer) >= target
        assert profile.mean_experts(before, max_k=12, layer=layer) < target


def test_between_two_alphas_the_lower_one_answers(profile):
    assert profile.mean_experts(0.30049) == profile.mean_experts(0.3)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.mean_experts(1e-9), "at least 1e-06"),
        (lambda p: p.mean_experts(1), "below 1"),
        (lambda p: p.mean_experts(float("nan")), "got nan"),
        (lambda p: p.mean_experts(0.3, layer=2), "no layer 2 in the profile; it has 0, 1, 3"),
        (lambda p: p.mean_experts(0.3, max_k=17), "<= 16, got 1, 17"),
        (lambda p: p.mean_experts(0.3, min_k=5, max_k=4), "got 5, 4"),
        (lambda p: p.alpha_for(9, max_k=8, layer=1), "layer 1: no alpha .* at most 8 "),
        (lambda p: p.alphas_for(9, max_k=8), "no alpha up to 0.999 gives 9 experts"),
        (lambda p: p.alpha_for(float("nan")), "gives nan experts"),
    ],
)
def test_what_cannot_be_answered_says_why(profile, ask, message):
    with pytest.raises(InvalidOption, match=message):
        ask(profile)


def test_a_shared_budget_keeps_more_than_one_alpha_for_all(profile):
    for target in (2, 4, 6):
        shared = profile.alphas_for(target, max_k=12)
        one = profile.alpha_for(target, max_k=12)
        assert [*shared] == [*LAYERS]
        mean = profile.mean_experts(shared, max_k=12)
        assert target <= mean < target + 0.02
        kept = profile.probability_kept(shared, max_k=12)
        assert kept > profile.probability_kept(one, max_k=12) - 0.001


def test_a_profile_that_kept_no_probability_says_so(run):
    profile = profile_log(open_log(run), alphas=ALPHAS)
    with pytest.raises(InvalidOption, match="--kept"):
        profile.alphas_for(3)


def test_threads_and_the_cut_of_the_log_change_nothing(run, profile, tmp_path):
    log = open_log(run)
    alone = profile_log(log, kept=True, scope=Scope(threads=1))
    for layer in LAYERS:
        assert np.array_equal(alone.counts[layer], profile.counts[layer])
        assert np.array_equal(alone.kept[layer], profile.kept[layer])


def test_a_saved_profile_answers_the_same_and_says_what_it_is(run, profile, tmp_path):
    path = tmp_path / "bh.profile"
    profile.save(path)
    loaded = Profile.load(path)
    assert loaded.frame(ALPHAS).equals(profile.frame(ALPHAS))
    assert loaded.alphas_for(4) == profile.alphas_for(4)
    log = open_log(run)
    rows = pl.read_parquet(path).select("layer", "n_experts", "rows", "source", "kde_sha256")
    assert rows.row(0) == (
        0, 16, 197, [log.manifest.run_id], log.manifest.routing.kde_sha256
    )  # fmt: skip
    assert [*tmp_path.iterdir()] == [path]


def test_a_profile_that_cannot_be_written_leaves_nothing(profile, tmp_path):
    with pytest.raises(InvalidOption, match="cannot write a profile"):
        profile.save(tmp_path / "missing" / "bh.profile")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidOption, match="cannot write a profile"):
        profile.save(tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_two_runs_count_together(profile, tmp_path):
    kde = normal_kde(LAYERS)
    other = open_log(write_run(tmp_path / "b", layers=LAYERS, seed=7)).sweep(kde, kept=True)
    both = profile.merge(other)
    assert both.source == (f"{0:032x}", f"{7:032x}")
    for layer in LAYERS:
        assert np.array_equal(both.counts[layer], profile.counts[layer] + other.counts[layer])
        assert np.array_equal(both.kept[layer], profile.kept[layer] + other.kept[layer])


def test_layers_of_one_run_counted_apart_come_together(run, profile):
    log = open_log(run)
    parts = [profile_log(log, kept=True, scope=Scope(layers)) for layers in ([3], [0, 1])]
    both = parts[0].merge(parts[1])
    assert both.layers == LAYERS
    assert both.frame(ALPHAS).equals(profile.frame(ALPHAS))


def test_profiles_that_do_not_fit_are_not_merged(run, profile, tmp_path):
    log = open_log(run)
    other = write_run(tmp_path / "b", layers=LAYERS, seed=7)
    wider = KdeModel({i: normal_null(i, sd=1.5) for i in LAYERS})
    refused = {
        "would count twice": profile,
        "different null models": open_log(other).sweep(wider),
        "where true and where position < 5": open_log(other).sweep(
            normal_kde(LAYERS), where="position < 5"
        ),
        "other alphas": profile_log(log, alphas=ALPHAS),
    }
    for message, theirs in refused.items():
        with pytest.raises(InvalidOption, match=message):
            profile.merge(theirs)


def changed(table, **columns):
    for name, values in columns.items():
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(name), pa.array(values, table[name].type))
    return with_checksum(table)


DAMAGE = {
    "columns are layer": lambda t: t.drop_columns(["rows"]),
    "of version 9": lambda t: t.replace_schema_metadata({"bhlog.profile_schema_version": "9"}),
    "of version none": lambda t: t.replace_schema_metadata({}),
    "a row per layer": lambda t: changed(t, layer=[0, 0, 1]),
    "got layers": lambda t: t.slice(0, 0),
    "differ in kde_sha256": lambda t: changed(t, kde_sha256=["a", "b", "b"]),
    "alphas must rise": lambda t: changed(t, alphas=[[0.3, 0.1, 0.2, 0.9]] * 3),
    "80 counts, expected 16 ranks x 4": lambda t: changed(t, alphas=[[0.1, 0.2, 0.3]] * 3),
    "n_experts is 0": lambda t: changed(t, n_experts=[0] * 3),
    "at least 0": lambda t: changed(t, counts=[[-1] * 80] * 3),
    "the same sum": lambda t: changed(t, counts=[[*range(80)]] * 3),
    "before the one below": lambda t: changed(t, counts=[[0] * 4 + [1] + [1, 0, 0, 0, 0] * 15] * 3),
    "says rows = 5": lambda t: changed(t, rows=[5] * 3),
    "79 kept": lambda t: changed(t, kept=[[0] * 79] * 3),
    "kept does not fit": lambda t: changed(t, kept=[[-1] * 80] * 3),
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_file_is_one_clear_error(run, tmp_path, message):
    path = tmp_path / "p"
    profile_log(open_log(run), alphas=ALPHAS, kept=True).save(path)
    pq.write_table(DAMAGE[message](pq.read_table(path)), path)
    with pytest.raises(CorruptProfile, match=f"^{path}: .*{message}"):
        Profile.load(path)


def test_other_rows_than_were_written_are_noticed(profile, tmp_path):
    path = tmp_path / "profile.parquet"
    profile.save(path)
    table = pq.read_table(path)
    where = pa.array(["position < 3"] * len(table))
    pq.write_table(table.set_column(table.schema.names.index("where"), "where", where), path)
    with pytest.raises(CorruptProfile, match="not those that were written"):
        Profile.load(path)
    plain = {k: v for k, v in table.schema.metadata.items() if k != b"bhlog.sha256"}
    plain[b"bhlog.profile_schema_version"] = b"1"  # of before checksums
    pq.write_table(table.replace_schema_metadata(plain), path)
    assert Profile.load(path).alphas.tolist() == profile.alphas.tolist()


def test_a_file_that_is_no_profile_is_an_error(run, tmp_path):
    with pytest.raises(CorruptProfile, match="bhlog sweep RUN --save FILE"):
        Profile.load(tmp_path / "missing")
    (tmp_path / "text").write_text("not parquet")
    with pytest.raises(CorruptProfile, match="not a profile file"):
        Profile.load(tmp_path / "text")
    with pytest.raises(CorruptProfile, match="columns are layer, expert"):
        Profile.load(run / "kde.parquet")


@pytest.mark.parametrize("alphas", [[], [0.0, 0.5], [0.5, 1.0], [0.5, 0.5], [0.1, float("nan")]])
def test_a_grid_must_rise_inside_0_and_1(run, alphas):
    with pytest.raises(InvalidOption, match="must rise"):
        profile_log(open_log(run), alphas=alphas)


def test_a_null_model_with_a_curve_per_expert_is_refused(run):
    curve = normal_null(0).curves[0]
    curves = tuple(dataclasses.replace(curve, expert=i) for i in range(16))
    kde = KdeModel({i: LayerNull(i, curves) for i in LAYERS})
    with pytest.raises(KdeMismatch, match="bhlog replay RUN"):
        profile_log(open_log(run), kde)


def test_no_rows_and_no_null_model_are_errors(run, tmp_path):
    with pytest.raises(InvalidOption, match="no rows to count where position > 1000"):
        profile_log(open_log(run), scope=Scope(where="position > 1000"))
    with pytest.raises(KdeMismatch, match="bhlog kde fit"):
        open_log(write_run(tmp_path / "native")).sweep()


def test_the_sha256_is_that_of_the_file(run, profile):
    assert profile.kde_sha256 == hashlib.sha256((run / "kde.parquet").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    """A profile of a run with bounds 2 to 5."""
    folder = tmp_path_factory.mktemp("bounded") / "run"
    options = BhOptions(alpha=0.3, min_k=2, max_k=5)
    run = write_run(folder, layers=LAYERS, options=options, kde=normal_kde(LAYERS), seed=9)
    return profile_log(open_log(run), kept=True)


def test_a_saved_profile_keeps_the_bounds_of_its_run(bounded, profile, tmp_path):
    for one in (bounded, profile):
        one.save(tmp_path / "p")
        loaded = Profile.load(tmp_path / "p")
        assert loaded.bounds == one.bounds
        assert loaded.mean_experts(0.3) == one.mean_experts(0.3)
    assert bounded.mean_experts(0.3) == bounded.mean_experts(0.3, min_k=2, max_k=5)
    assert bounded.mean_experts(0.3) != bounded.mean_experts(0.3, min_k=1, max_k=16)
    assert bounded.alphas_for(4) == bounded.alphas_for(4, min_k=2, max_k=5)


def test_an_older_file_has_no_bounds(bounded, tmp_path):
    path = tmp_path / "p"
    bounded.save(path)
    table = pq.read_table(path)
    version = b"bhlog.profile_schema_version"
    older = {version: b"1"}
    pq.write_table(table.replace_schema_metadata({version: b"2"}), path)
    with pytest.raises(CorruptProfile, match="lacks its checksum"):
        Profile.load(path)
    pq.write_table(table.replace_schema_metadata(older), path)
    assert Profile.load(path).bounds == Bounds()
    assert Profile.load(path).mean_experts(0.3) == bounded.mean_experts(0.3, min_k=1, max_k=16)


def test_runs_of_different_bounds_merge_but_ask_for_explicit_ones(bounded, profile, tmp_path):
    both = profile.merge(bounded)
    both.save(tmp_path / "p")
    for one in (both, Profile.load(tmp_path / "p"), both.merge(both_of_another(tmp_path))):
        for given in ({}, {"min_k": 1}, {"max_k": 4}):
            with pytest.raises(InvalidOption, match="different bounds: give both, --min-k and"):
                one.mean_experts(0.3, **given)
    assert both.rows(0) == profile.rows(0) + bounded.rows(0)
    means = [one.mean_experts(0.3, min_k=1, max_k=4, layer=1) for one in (both, profile, bounded)]
    assert means[0] == pytest.approx(sum(means[1:]) / 2)  # 200 rows each
    assert both.frame([0.3], min_k=0, max_k=16).height == 1


def both_of_another(tmp_path):
    run = write_run(tmp_path / "third", layers=LAYERS, seed=11)
    return profile_log(open_log(run), normal_kde(LAYERS))


def test_bounds_that_say_the_same_stay(profile, tmp_path):
    options = BhOptions(alpha=0.2, min_k=1, max_k=16)  # as none at all
    run = write_run(tmp_path / "b", layers=LAYERS, seed=7, options=options, kde=normal_kde(LAYERS))
    both = profile.merge(profile_log(open_log(run)))
    assert both.mean_experts(0.3) == both.mean_experts(0.3, min_k=1, max_k=16)


def test_a_sample_is_refused(run):
    with pytest.raises(InvalidOption, match="leave sample out"):
        profile_log(open_log(run), scope=Scope(sample=0.5))


@pytest.mark.parametrize("bounds", [b"{", b"[1]", b'{"least": 1}', b'{"min_k": "1"}', b"7"])
def test_damaged_bounds_are_one_clear_error(bounded, tmp_path, bounds):
    path = tmp_path / "p"
    bounded.save(path)
    table = pq.read_table(path)
    metadata = {**table.schema.metadata, b"bhlog.bounds": bounds}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    with pytest.raises(CorruptProfile, match=f"^{path}: bounds are"):
        Profile.load(path)


def test_a_log_of_many_layers_and_experts_has_a_coarser_grid_with_the_round_alphas():
    assert grid_for(16, 64) == grid_for(58, 256) == grid_for(94, 128) == GRID
    coarse = grid_for(128, 512)
    assert 128 * 512 * (len(coarse) + 1) < 1.1 * MOST_CELLS < 128 * 512 * len(GRID)
    assert {0.001, 0.01, 0.05, 0.3, 0.95, GRID[0]} <= {*coarse}
    assert list(coarse) == sorted(coarse) and len(grid_for(4096, 4096)) >= 20


def test_tables_that_are_not_kept_are_made_again_alike(monkeypatch, tmp_path):
    log = open_log(write_run(tmp_path / "run", layers=range(5), n_shards=3))
    kde, alphas = normal_kde(range(5)), GRID[::20]
    expected = profile_log(log, kde, alphas=alphas, scope=Scope(threads=1))
    monkeypatch.setattr("bhlog.analysis.sweep.profiling.MOST_TABLE_BYTES", 0)
    found = profile_log(log, kde, alphas=alphas, scope=Scope(threads=1))
    assert all(np.array_equal(found.counts[i], expected.counts[i]) for i in range(5))
