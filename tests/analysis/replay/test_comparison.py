import math
import re
from collections import defaultdict
from dataclasses import replace
from statistics import median_low

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.fold import Scope
from bhlog.analysis.replay.comparison import compare, replay
from bhlog.analysis.replay.settings import settings_of
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.model import KdeModel, LayerNull
from bhlog.capture.contract.rule import BhOptions, Bounds, empirical_p_values
from tests.analysis.replay import slow
from tests.synthetic import normal_kde, normal_logits, write_run

LAYERS, E, TOP_K = (0, 3), 16, 8
POLICIES = {
    "bh:0.3": lambda row, p: slow.bh(row, p, 0.3),
    "by:0.9": lambda row, p: slow.by(row, p, 0.9),
    "storey:0.2,lambda=0.4": lambda row, p: slow.storey(row, p, 0.2, 0.4),
    "hc:0.5": lambda row, p: min(slow.higher_criticism(row, p, 0.5)),
    "hc+:1": lambda row, p: min(slow.higher_criticism(row, p, 1, plus=True)),
    "topk:5": lambda row, p: 5,
    "topp:0.7": lambda row, p: slow.top_p(row, 0.7),
    "threshold:0.05": lambda row, p: slow.threshold(row, 0.05),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A BH run with ties, broken logits and rows without a finite one; its bounds are 1 to 12."""
    rng = np.random.default_rng(1)
    logits = normal_logits(rng, 2 * 2 * 60, E).reshape(2, 2, 60, E)
    logits[:, :, ::9, 3] = np.nan
    logits[:, :, ::7, 2] = np.inf
    logits[:, :, 5] = np.nan
    logits[:, :, 6] = 1.0
    return write_run(
        tmp_path_factory.mktemp("compare") / "run",
        layers=LAYERS,
        n_experts=E,
        n_sequences=4,
        length=30,
        options=BhOptions(alpha=0.2, max_k=12),
        kde=normal_kde(LAYERS),
        logits=logits,
    )


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "native"
    return write_run(folder, layers=LAYERS, n_experts=E, n_sequences=4, length=30)


def rows_of(run):
    tables = [pq.read_table(path) for path in sorted((run / "routing").glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist()]


def direct(rows, chosen, n_rejected, low, high):
    """Every column of one line of the table, from lists of chosen experts."""
    n = [len(experts) for experts in chosen]
    mean = sum(n) / len(n)
    kept, native, logged = [], [], []
    for row, experts in zip(rows, chosen, strict=True):
        logits = row["logits"]
        broken = not slow.finite(logits)
        probability = [0.0] * E if broken else slow.softmax(logits)
        kept.append(math.fsum(probability[i] for i in experts))
        top = row["experts"] if broken else slow.by_logit(logits)[:TOP_K]
        for sums, other, size in ((native, top, TOP_K), (logged, row["experts"], None)):
            size = len(other) if size is None else size
            both = len(set(experts) & set(other))
            union = len(experts) + size - both
            sums.append((both / union if union else 1, both / size if size else 1))
    touched = defaultdict(set)
    for row, experts in zip(rows, chosen, strict=True):
        touched[row["layer"], row["rank"], row["forward"]] |= set(experts)
    load = [sum(i in experts for experts in chosen) for i in range(E)]
    share = [count / max(1, sum(load)) for count in load]
    return {
        "rows": len(rows),
        "mean_experts": mean,
        "sd_experts": math.sqrt(sum((k - mean) ** 2 for k in n) / len(n)),
        "min_experts": min(n),
        "median_experts": median_low(n),
        "p95_experts": min(k for k in n if sum(m <= k for m in n) >= 0.95 * len(n)),
        "max_experts": max(n),
        "at_min_k": n.count(low) / len(n),
        "at_max_k": n.count(high) / len(n),
        "none_rejected": None if n_rejected is None else n_rejected.count(0) / len(n),
        "probability_kept": sum(kept) / len(n),
        "native_jaccard": sum(jaccard for jaccard, _ in native) / len(n),
        "native_recall": sum(recall for _, recall in native) / len(n),
        "logged_jaccard": sum(jaccard for jaccard, _ in logged) / len(n),
        "logged_recall": sum(recall for _, recall in logged) / len(n),
        "load_entropy": -sum(s * math.log(s) for s in share if s) / math.log(E),
        "load_cv": math.sqrt(sum((s - 1 / E) ** 2 for s in share) / E) * E,
        "load_gini": sum(abs(a - b) for a in share for b in share) / (2 * E),
        "busiest_share": max(share),
        "dead_experts": load.count(0),
        "flops": mean / TOP_K,
        "distinct_experts": sum(map(len, touched.values())) / len(touched),
        "histogram": [n.count(k) for k in range(E + 1)],
    }


def choose(rows, text, p_of, low, high, *, by_p=False):
    """Chosen experts of each row, and the counts before the bounds; None if nothing is tested."""
    chosen, counts = [], []
    for i, row in enumerate(rows):
        logits = row["logits"]
        if not slow.finite(logits):
            chosen.append(row["experts"])
            counts.append(0)
            continue
        p = p_of(i, row)
        counts.append(POLICIES[text](logits, p))
        tests = text[:3] not in ("top", "thr")
        order = slow.by_p(logits, p) if by_p and tests else slow.by_logit(logits)
        chosen.append(order[: min(max(counts[-1], low), high)])
    return chosen, None if text[:3] in ("top", "thr") else counts


def assert_line(frame, text, layer, expected):
    of_layer = pl.col("layer").is_null() if layer is None else pl.col("layer") == layer
    line = frame.filter(pl.col("policy") == text, of_layer).row(0, named=True)
    for name, value in expected.items():
        if value is not None:  # what is kept is summed in float32
            value = pytest.approx(value, rel=1e-5, abs=1e-7)
        assert line[name] == value, (text, layer, name)


def test_every_column_is_the_direct_count(run):
    log = open_log(run)
    frame = compare(log, list(POLICIES), kde=log.kde)
    assert [name for name in frame.columns if not re.search("^noise_|_se$|_difference$", name)] == [
        "policy", "min_k", "max_k", "layer", *direct(rows_of(run)[:1], [[0]], None, 1, 12)
    ]  # fmt: skip
    assert frame.select("min_k", "max_k").unique().rows() == [(1, 12)]  # those of the run
    for text in POLICIES:
        for layer in LAYERS:
            rows = [row for row in rows_of(run) if row["layer"] == layer]
            chosen, counts = choose(
                rows, text, lambda i, row: log.kde[row["layer"]].p_value(row["logits"]), 1, 12
            )
            assert_line(frame, text, layer, direct(rows, chosen, counts, 1, 12))


def test_the_line_of_all_layers_counts_all_rows_and_averages_the_load(run):
    frame = compare(open_log(run), ["topp:0.7"])
    of_layers, overall = frame[:2], frame[2].row(0, named=True)
    assert overall["layer"] is None and overall["rows"] == 240
    for name in ("mean_experts", "probability_kept", "native_recall", "load_gini", "load_entropy"):
        assert overall[name] == pytest.approx(of_layers[name].mean())
    assert overall["dead_experts"] == of_layers["dead_experts"].sum()


def test_bh_as_a_policy_is_replay_bit_for_bit(run):
    log = open_log(run)
    for model in (log.kde, nulls_by_expert(log.kde)):
        compared = compare(log, ["bh:0.37", "bh:0.2"], kde=model)
        replayed = replay(log, settings_of(log, [0.37, 0.2]), kde=model)
        assert compared.select(replayed.columns[1:]).equals(replayed.drop("alpha"))


def test_several_policies_at_once_equal_one_by_one(run):
    log = open_log(run)
    together = compare(log, list(POLICIES), scope=Scope(threads=2))
    alone = pl.concat([compare(log, [text], scope=Scope(threads=1)) for text in POLICIES])
    paired = [name for name in alone.columns if "_difference" in name]  # each with itself: 0
    assert together.drop(paired).equals(alone.drop(paired))
    assert not alone.select(paired).to_numpy().any()


def test_nulls_by_expert_choose_by_p_value(run):
    log = open_log(run)
    kde = nulls_by_expert(log.kde)
    frame = compare(log, list(POLICIES), kde=kde)
    rows = [row for row in rows_of(run) if row["layer"] == 3]
    p = kde[3].p_value(np.array([row["logits"] for row in rows], np.float32))
    for text in POLICIES:
        chosen, counts = choose(rows, text, lambda i, row: p[i].tolist(), 1, 12, by_p=True)
        assert_line(frame, text, 3, direct(rows, chosen, counts, 1, 12))


def nulls_by_expert(kde):
    return KdeModel(
        {
            layer: LayerNull(
                layer,
                tuple(
                    replace(kde[layer].curves[0], expert=i, x0=kde[layer].curves[0].x0 + i / 20)
                    for i in range(E)
                ),
            )
            for layer in kde
        }
    )


def empirical(run, tmp_path):
    """The run as one routed by empirical p-values, without a null model."""
    log = open_log(run)
    copy = write_run(
        tmp_path / "empirical",
        layers=LAYERS,
        n_experts=E,
        n_sequences=4,
        length=30,
        options=BhOptions(alpha=0.2, max_k=12),
        kde=normal_kde(LAYERS),
    )
    manifest = log.manifest
    options = replace(manifest.routing.options, p_values="empirical")
    routing = replace(manifest.routing, options=options, kde_sha256=None)
    replace(open_log(copy).manifest, routing=routing).write(copy)
    (copy / "kde.parquet").unlink()
    return copy


def test_empirical_p_values_rank_each_forward(run, tmp_path):
    folder = empirical(run, tmp_path)
    frame = compare(open_log(folder), list(POLICIES))
    rows = [row for row in rows_of(folder) if row["layer"] == 3]
    p = np.empty((len(rows), E))
    for forward in {row["forward"] for row in rows}:
        of_forward = [i for i, row in enumerate(rows) if row["forward"] == forward]
        p[of_forward] = empirical_p_values(
            np.array([rows[i]["logits"] for i in of_forward], np.float32)
        )
    for text in POLICIES:
        chosen, counts = choose(rows, text, lambda i, row: p[i].tolist(), 1, 12, by_p=True)
        assert_line(frame, text, 3, direct(rows, chosen, counts, 1, 12))


def test_empirical_p_values_refuse_conditions_that_cut_a_forward(run, tmp_path):
    log = open_log(empirical(run, tmp_path))
    whole = compare(log, ["bh:0.2"], scope=Scope(where="forward < 2"))
    assert whole["rows"].to_list() == [60, 60, 120]
    with pytest.raises(InvalidOption, match="condition on position leaves out parts"):
        compare(log, ["bh:0.2"], scope=Scope(where="position < 5 AND forward < 2"))
    untested = compare(log, ["topk:4"], scope=Scope(where="position < 5"))
    assert untested["rows"].to_list() == [20, 20, 40]


def test_only_the_rows_asked_for_are_counted(run):
    log = open_log(run)
    frame = compare(log, ["topp:0.7"], scope=Scope([3], "position < 10 AND sequence = 1"))
    rows = [
        row
        for row in rows_of(run)
        if row["layer"] == 3 and row["position"] < 10 and row["sequence"] == 1
    ]
    chosen, counts = choose(rows, "topp:0.7", lambda i, row: None, 1, 12)
    assert frame["layer"].to_list() == [3, None]
    expected = direct(rows, chosen, counts, 1, 12) | {"distinct_experts": None}  # parts of forwards
    assert_line(frame, "topp:0.7", 3, expected)


def test_a_run_without_a_null_model_serves_policies_that_test_nothing(native):
    log = open_log(native)
    frame = compare(log, ["topk:4", "topp:0.5", "threshold:0.1"])
    assert frame["max_k"].to_list() == [E] * 9
    with pytest.raises(KdeMismatch, match="bhlog kde fit"):
        compare(log, ["topk:4", "bh:0.3"])
    assert compare(log, ["bh:0.3"], kde=normal_kde(LAYERS))["rows"][-1] == 240


def test_native_top_k_is_what_a_native_run_logged(native):
    frame = compare(open_log(native), ["topk:8"])
    for name in ("native_jaccard", "native_recall", "logged_jaccard", "logged_recall", "flops"):
        assert frame[name].to_list() == [1.0, 1.0, 1.0]


def test_the_native_choice_of_a_native_run_is_what_it_logged(tmp_path):
    """Ties that the model gave to other experts than the lowest."""
    logits = np.zeros((1, 1, 10, E), np.float32)
    folder = write_run(
        tmp_path / "run", layers=[0], n_sequences=1, length=10, n_shards=1, logits=logits
    )
    (path,) = (folder / "routing").iterdir()
    table = pq.read_table(path)
    at = table.column_names.index("experts")
    highest = pa.array([[*range(TOP_K, E)]] * 10, table.schema.field("experts").type)
    pq.write_table(table.set_column(at, table.schema.field("experts"), highest), path)
    frame = compare(open_log(folder), ["topk:8", "topk:12"])
    assert frame["native_jaccard"].to_list() == [0.0, 0.0, 4 / 16, 4 / 16]
    assert frame["native_recall"].to_list() == [0.0, 0.0, 4 / 8, 4 / 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policies": []}, "at least one policy, such as bh:0.3"),
        ({"policies": ["topk"]}, "k is missing"),
        ({"policies": ["topk:17"]}, "k is 17, but the model has 16 experts"),
        ({"policies": ["topk:4"], "bounds": Bounds(17)}, "min_k is 17"),
        ({"policies": ["topk:4,min_k=5"], "bounds": Bounds(1, 4)}, "at least min_k"),
        ({"policies": ["topk:4"], "scope": Scope([9])}, "no layer 9"),
        (
            {"policies": ["topk:4"], "scope": Scope(None, "position > 99")},
            "no rows where position > 99",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_line(native, arguments, message):
    with pytest.raises(InvalidOption, match=message) as error:
        compare(open_log(native), **arguments)
    assert "\n" not in str(error.value)
