import math

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from bhlog.analysis import sequences
from bhlog.analysis.run import open_log
from bhlog.analysis.sequences import SequenceSums, ratio_se
from bhlog.capture.contract.null.fit import FitOptions
from tests.synthetic import normal_kde, write_run

LAYERS, E = (0, 3), 16
POLICIES = ["bh:0.3", "topp:0.6"]
N, LENGTH = 12, 20


def texts(n=N, length=LENGTH, seed=5):
    """(layers, tokens, E): logits whose scale is the sequence's own."""
    rng = np.random.default_rng(seed)
    scale = np.repeat(rng.uniform(0.5, 2.0, n), length)
    return (rng.normal(size=(len(LAYERS), n * length, E)) * scale[None, :, None]).astype(np.float32)


def written(folder, logits, n_shards=1, **options):
    n = logits.shape[1] // LENGTH
    logits = logits.reshape(len(LAYERS), n_shards, -1, E)
    return open_log(
        write_run(folder, layers=LAYERS, n_experts=E, n_sequences=n, length=LENGTH, logits=logits,
                  n_shards=n_shards, kde=normal_kde(LAYERS), **options)
    )  # fmt: skip


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return written(tmp_path_factory.mktemp("sequences") / "run", texts(), n_shards=2, n_ranks=2)


def values(log, policy):
    """Of each row: layer, cluster, and what the columns are means of."""
    frames = []
    for layer in LAYERS:
        rows = pl.from_arrow(pa.Table.from_batches(log.batches(
            ["layer", "rank", "sequence", "logits"], layers=[layer])))  # fmt: skip
        for rank, sequence, row in rows.select("rank", "sequence", "logits").iter_rows():
            order = sorted(range(E), key=lambda i: (-row[i], i))
            weights = [math.exp(x) for x in row]
            share = [w / sum(weights) for w in weights]
            if policy == "bh:0.3":
                p = log.kde[layer].p_value(np.array([row], np.float32))[0]
                n = max((k for k in range(1, E + 1) if sorted(p)[k - 1] <= k * 0.3 / E), default=0)
                n = max(1, n)
            else:
                n = next(k for k in range(1, E + 1) if sum(share[i] for i in order[:k]) >= 0.6)
            frames.append({"layer": layer, "cluster": (rank, sequence), "mean_experts": n,
                           "at_min_k": n == 1, "probability_kept": sum(share[i] for i in order[:n]),
                           "native_recall": min(n, 8) / 8})  # fmt: skip
    return frames


def clustered(rows, value):
    """The ratio estimator, in plain Python."""
    mean = sum(value(row) for row in rows) / len(rows)
    total = {}
    for row in rows:
        total[row["cluster"]] = total.get(row["cluster"], 0.0) + value(row) - mean
    G = len(total)
    return math.sqrt(G / (G - 1) * sum(z * z for z in total.values())) / len(rows)


def test_standard_errors_are_the_ratio_estimator_by_hand(log):
    frame = log.compare(POLICIES)
    first = values(log, POLICIES[0])
    for policy in POLICIES:
        rows = values(log, policy)
        for layer in (*LAYERS, None):
            line = frame.row(
                by_predicate=(pl.col("policy") == policy) & pl.col("layer").eq_missing(layer),
                named=True,
            )
            mine, theirs = (
                [row for row in some if layer in (None, row["layer"])] for some in (rows, first)
            )
            for name in ("mean_experts", "at_min_k", "probability_kept", "native_recall"):
                expected = clustered(mine, lambda row, name=name: float(row[name]))
                assert line[f"{name}_se"] == pytest.approx(expected, rel=1e-4, abs=1e-7), name
            pairs = [
                {"cluster": a["cluster"], "d": float(a["mean_experts"] - b["mean_experts"])}
                for a, b in zip(mine, theirs, strict=True)
            ]
            got = line["mean_experts_difference"], line["mean_experts_difference_se"]
            mean = sum(pair["d"] for pair in pairs) / len(pairs)
            assert got == pytest.approx((mean, clustered(pairs, lambda pair: pair["d"])))
            assert line["flops_se"] == pytest.approx(line["mean_experts_se"] / 8)


def test_shares_of_p_values_have_the_standard_errors_of_their_sequences(log):
    kde = log.fit(FitOptions(trim_high=3))
    frame = log.check(kde)
    for layer in LAYERS:
        rows = pl.from_arrow(pa.Table.from_batches(log.batches(
            ["rank", "sequence", "logits"], layers=[layer])))  # fmt: skip
        p = kde[layer].p_value(np.array(rows["logits"].to_list(), np.float32))
        kept = np.sort(p, axis=1)[:, 3:]
        line = frame.row(by_predicate=pl.col("layer") == layer, named=True)
        for name, some in (("all", p), ("p", kept)):
            share = (some <= 0.05).mean()
            off = (some <= 0.05).sum(axis=1) - share * some.shape[1]
            per = pl.DataFrame({"k": rows["rank"] * 1000 + rows["sequence"], "off": off})
            z = per.group_by("k").agg(pl.col("off").sum())["off"].to_numpy()
            se = math.sqrt(len(z) / (len(z) - 1) * (z @ z)) / some.size
            assert line[f"{name}_0.05_se"] == pytest.approx(se, rel=1e-9)
        assert 0 < line["pi0_se"] < 0.5


def test_a_bootstrap_over_sequences_agrees(tmp_path):
    log = written(tmp_path / "run", texts(40))
    rows = [row for row in values(log, "bh:0.3") if row["layer"] == 0]
    sums = {}
    for row in rows:
        n, k, squares = sums.get(row["cluster"], (0, 0, 0))
        experts = row["mean_experts"]
        sums[row["cluster"]] = n + 1, k + experts, squares + experts**2
    table = np.array([*sums.values()], dtype=float)
    drawn = np.random.default_rng(0).integers(len(table), size=(4000, len(table)))
    n, k, squares = table[drawn].sum(axis=1).T
    line = log.replay(0.3).row(0, named=True)
    # 4,000 draws know a standard error to 1 %; it is of G, not of G - 1, and of no linear form
    assert line["mean_experts_se"] == pytest.approx((k / n).std(), rel=0.05)
    sd = np.sqrt(squares / n - (k / n) ** 2)
    assert line["sd_experts_se"] == pytest.approx(sd.std(), rel=0.1)
    naive = line["sd_experts"] / math.sqrt(len(rows))
    assert line["mean_experts_se"] > 2 * naive


def test_they_are_the_same_to_the_bit_however_the_log_is_split(tmp_path):
    logits = texts()
    frames = [
        written(tmp_path / str(n), logits, n_shards=n).compare(POLICIES, threads=threads)
        for n, threads in ((1, 1), (3, 2), (6, 1))
    ]
    errors = [name for name in frames[0].columns if name.endswith("_se") or "_difference" in name]
    assert len(errors) == 18
    for frame in frames[1:]:
        assert frame.select(errors).equals(frames[0].select(errors))


def test_of_many_sequences_groups_of_whole_ones_are_held(monkeypatch):
    rng = np.random.default_rng(3)
    rank, sequence = rng.integers(0, 2, 500), rng.integers(0, 90, 500)
    value = rng.integers(0, 100, 500)

    def summed(order, pieces):
        total = SequenceSums(1, 1)
        for part in np.array_split(order, pieces):
            sums = SequenceSums(1, 1)
            columns = {"rank": pa.array(rank[part], pa.uint16())}
            columns["sequence"] = pa.array(sequence[part], pa.uint32())
            slots = sums.slots(pa.record_batch(columns))
            np.add.at(sums.sums[0, :, 0], slots, value[part])
            total.merge(sums)
        return total.table(0)

    whole = summed(np.arange(500), 1)
    assert len(whole) == len({*zip(rank.tolist(), sequence.tolist(), strict=True)})
    monkeypatch.setattr(sequences, "MOST", 16)
    grouped = [summed(rng.permutation(500), pieces) for pieces in (1, 2, 7, 50)]
    assert len(grouped[0]) <= 16 and grouped[0].sum() == value.sum()
    assert all(np.array_equal(table, grouped[0]) for table in grouped)


def test_one_sequence_has_no_standard_error(tmp_path, capfd):
    from bhlog.analysis.cli import main

    run = written(tmp_path / "run", texts(1))
    frame = run.compare(POLICIES)
    assert frame["mean_experts_se"].null_count() == frame.height
    with pytest.raises(SystemExit, match="0"):
        main(["replay", str(run.path), "--alpha", "0.3"])
    assert "no standard errors: they are clustered by sequence" in capfd.readouterr().err
    assert ratio_se(np.array([3.0, 0.0]), np.array([2, 0])) is None
