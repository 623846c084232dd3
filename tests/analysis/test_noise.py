import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from bhlog.analysis import noise
from bhlog.analysis.noise import NoiseSample
from bhlog.analysis.run import open_log
from bhlog.analysis.sweep.profile import Profile
from bhlog.capture.contract.rule import decide
from tests.synthetic import normal_kde, write_run

LAYERS, E, LENGTH = (0, 2), 16, 50


def written(folder, logits, n_shards=1):
    n = logits.shape[1] // LENGTH
    return open_log(
        write_run(folder, layers=LAYERS, n_experts=E, n_sequences=n, length=LENGTH,
                  logits=logits.reshape(len(LAYERS), n_shards, -1, E), n_shards=n_shards,
                  kde=normal_kde(LAYERS))
    )  # fmt: skip


def correlated(n=1200):
    """Rows that share a shift: the rows' counts spread far, the columns' values do not change."""
    rng = np.random.default_rng(2)
    shift = rng.normal(scale=2.0, size=(len(LAYERS), n, 1))
    return (rng.normal(size=(len(LAYERS), n, E)) + shift).astype(np.float32)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return written(tmp_path_factory.mktemp("noise") / "run", correlated())


def test_noise_is_the_rule_on_shuffled_columns(log):
    frame = log.replay([0.1, 0.5], min_k=0)
    assert frame["noise_rows"].to_list() == [1200, 1200, 2400] * 2
    rng = np.random.default_rng(9)
    for alpha in (0.1, 0.5):
        for layer, logits in zip(LAYERS, correlated(), strict=True):
            line = frame.row(
                by_predicate=(pl.col("alpha") == alpha) & (pl.col("layer") == layer), named=True
            )
            shuffled = np.concatenate(
                [np.stack([rng.permutation(column) for column in logits.T], 1) for _ in range(10)]
            )
            thresholds = log.kde[layer].thresholds(alpha, E)
            n = decide(shuffled, thresholds, min_k=0, max_k=E).n_selected.astype(float)
            assert line["noise_experts"] == pytest.approx(
                n.mean(), abs=4 * line["noise_experts_se"]
            )
            assert line["noise_sd_experts"] == pytest.approx(n.std(), rel=0.15)
            assert line["sd_experts"] > 1.2 * line["noise_sd_experts"]
            expected = line["noise_sd_experts"] / 1200**0.5
            assert line["noise_experts_se"] == pytest.approx(expected)


def test_the_sample_is_the_smallest_hashes_however_the_log_is_split(tmp_path, monkeypatch):
    monkeypatch.setattr(noise, "MOST_LOGITS", 100 * E)
    monkeypatch.setattr(noise, "LEAST_ROWS", 1)
    logits = correlated(600)
    logits[0, ::7] = np.nan  # never drawn
    names = ["noise_experts", "noise_experts_se", "noise_sd_experts", "noise_rows"]
    frames = [
        written(tmp_path / str(n), logits, n_shards=n).compare(
            ["bh:0.2", "topp:0.5", "topk:3"], threads=threads
        )
        for n, threads in ((1, 1), (3, 2), (12, 1))
    ]
    assert frames[0]["noise_rows"].to_list() == [100, 100, 200] * 3
    assert frames[0]["noise_experts"][-1] == 3
    for frame in frames[1:]:
        assert frame.select(names).equals(frames[0].select(names))


def test_a_hash_that_bounds_the_sample_of_a_long_log_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(noise, "MOST_LOGITS", 50 * E)
    monkeypatch.setattr(noise, "LEAST_ROWS", 1)
    logits = correlated(3000)
    logits[0, :900] = np.nan  # up to 900 of layer 0's rows are never drawn, and the bound counts so
    log = written(tmp_path / "run", logits, n_shards=6)
    last = noise.last_hash(log, None)
    share = int(last) / 2**64
    assert share == pytest.approx(2 * 50 / (3000 - 900))
    for group in log.row_groups():
        few = noise.NoiseSample(E, last)
        few.update(log.read(group, ("layer", "logits", *noise.COLUMNS)))
        assert len(few.hashes) < 50
    bounded = log.compare(["bh:0.2", "topp:0.5"])
    assert bounded["noise_rows"].to_list() == [50, 50, 100] * 2
    monkeypatch.setattr(
        "bhlog.analysis.replay.comparison.last_hash", lambda log, where: np.uint64(2**64 - 1)
    )
    assert log.compare(["bh:0.2", "topp:0.5"]).equals(bounded)


def test_no_hash_bounds_the_sample_of_few_or_of_chosen_rows(log, monkeypatch):
    largest = 2**64 - 1
    assert noise.last_hash(log, None) == largest  # 1,200 rows of a layer, a sample holds 4,096
    monkeypatch.setattr(noise, "MOST_LOGITS", 10 * E)
    monkeypatch.setattr(noise, "LEAST_ROWS", 1)
    assert noise.last_hash(log, None) < largest
    assert noise.last_hash(log, "phase = 'decode'") == largest


def test_a_sample_of_pieces_in_any_order_is_that_of_the_whole():
    rng = np.random.default_rng(4)
    n = 3 * noise.sample_rows(64)
    logits = rng.normal(size=(n, 64)).astype(np.float32)
    logits[::5] = np.nan

    def sampled(order, pieces):
        total = NoiseSample(64)
        for part in np.array_split(order, pieces):
            one = NoiseSample(64)
            flat = pa.array(logits[part].ravel())
            one.update(
                pa.record_batch(
                    {
                        "rank": pa.array(np.zeros(len(part)), pa.uint16()),
                        "sequence": pa.array(part // 9, pa.uint32()),
                        "position": pa.array(part % 9, pa.uint32()),
                        "logits": pa.FixedSizeListArray.from_arrays(flat, 64),
                    }
                )
            )
            total.merge(one)
        return total

    whole = sampled(np.arange(n), 1)
    assert len(whole.hashes) == noise.sample_rows(64) and np.isfinite(whole.logits).all()
    for pieces in (3, 20):
        other = sampled(rng.permutation(n), pieces)
        assert np.array_equal(other.hashes, whole.hashes)
        assert np.array_equal(other.shuffled(1), whole.shuffled(1))
    for column, shuffled in zip(whole.logits.T, whole.shuffled(1).T, strict=True):
        assert np.array_equal(np.sort(column), np.sort(shuffled))


def test_a_profile_keeps_the_noise_that_replay_tells(log, tmp_path):
    profile = log.sweep(alphas=[0.05, 0.2, 0.5])
    profile.save(tmp_path / "p.profile")
    loaded = Profile.load(tmp_path / "p.profile")
    for bounds in ({"min_k": 0, "max_k": E}, {"min_k": 2, "max_k": 7}):
        frame = log.replay([0.2, 0.5], **bounds)
        for alpha, layer, mean, error in frame.select(
            "alpha", "layer", "noise_experts", "noise_experts_se"
        ).iter_rows():
            told = loaded.noise_experts(alpha, layer=layer, **bounds)
            assert told == pytest.approx((mean, error))
    assert loaded.frame([0.2])["noise"].item() == loaded.noise_experts(0.2)[0]
    older = Profile(profile.alphas, profile.counts, profile.source, profile.kde_sha256)
    assert older.noise_experts(0.2) is None and older.frame([0.2])["noise"].to_list() == [None]
