import tracemalloc

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bhlog.analysis.database.connection import connect
from bhlog.analysis.database.lists import ListColumn, logit_groups
from bhlog.analysis.log import layer_of, logits_of
from bhlog.analysis.replay.decide import decider_of
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch, RouterLogError
from bhlog.capture.contract.null.model import KdeModel, LayerNull, NullCurve
from bhlog.capture.contract.rule import (
    BhOptions,
    decide,
    decide_by_expert,
    no_finite_logit,
    p_value_order,
    softmax_weights,
)
from tests.synthetic import native_decisions, normal_kde, normal_logits, write_run

LAYERS = (0, 1, 2)
IDENTITY = "layer, rank, sequence, position"


def by_expert(n_experts: int) -> KdeModel:
    """A null with a curve per expert, each a bit to the right of the one before."""
    layers = {}
    for layer in LAYERS:
        curves = []
        for expert in range(n_experts):
            pooled = normal_kde([layer])[layer].curves[0]
            curves.append(
                NullCurve(expert, 0, pooled.x0 + expert / n_experts, pooled.dx, pooled.tail)
            )
        layers[layer] = LayerNull(layer, tuple(curves))
    return KdeModel(layers)


@pytest.fixture(scope="module", params=["pooled", "by expert"])
def run(request, tmp_path_factory):
    """A run of three layers, some of its logits NaN or infinite, with a null model."""
    rng = np.random.default_rng(3)
    logits = normal_logits(rng, 3 * 2 * 60, 16).reshape(3, 2, 60, 16)
    logits[0, 0, 3] = np.nan
    logits[1, 1, 5, :15] = -np.inf
    logits[1, 1, 6, 2] = np.inf
    logits[2, 0, 7, 4] = np.nan
    kde = normal_kde(LAYERS) if request.param == "pooled" else by_expert(16)
    folder = tmp_path_factory.mktemp("functions") / "demo"
    write_run(folder, n_sequences=4, length=30, kde=kde, logits=logits, decode_from=25)
    return folder


@pytest.fixture(scope="module")
def database(run):
    with connect(open_log(run)) as opened:
        yield opened


SETTINGS = [(0.05, 1, 16), (0.3, 0, 16), (0.6, 2, 6), (0.01, 1, 1)]


@pytest.mark.parametrize(("alpha", "min_k", "max_k"), SETTINGS)
def test_bh_count_and_bh_experts_are_the_replay(run, database, alpha, min_k, max_k):
    log = open_log(run)
    decider = decider_of(log, [BhOptions(alpha, min_k=min_k, max_k=max_k)])
    expected = {}
    columns = ["layer", "rank", "sequence", "position", "logits", "experts", "forward"]
    for batch in log.batches([*columns, "n_selected"]):
        (replayed,) = decider.decide(batch)
        undecided = no_finite_logit(logits_of(batch))
        for i, row in enumerate(batch.select(columns[:4]).to_pylist()):
            n = int(replayed.n_selected[i])
            chosen = replayed.order[i, :n].tolist()
            expected[tuple(row.values())] = (None, None) if undecided[i] else (n, chosen)
    found = database.sql(
        f"SELECT {IDENTITY}, bh_count(logits, layer, $a, $low, $high), "
        "bh_experts(logits, layer, $a, $low, $high) FROM routing",
        {"a": alpha, "low": min_k, "high": max_k},
    ).fetchall()
    assert {row[:4]: row[4:] for row in found} == expected
    assert any(value[0] for value in expected.values())


def test_chunks_that_mix_layers_and_alphas_are_decided_row_by_row(run, database):
    shuffled = (
        "SELECT *, [0.05, 0.3, 0.6][1 + position % 3] AS alpha, 1 + position % 2 AS low "
        "FROM (SELECT * FROM routing ORDER BY hash(position, layer, sequence))"
    )
    found = database.sql(
        f"SELECT layer, alpha, low, logits, bh_count(logits, layer, alpha, low), "
        f"bh_experts(logits, layer, alpha, min_k := low) FROM ({shuffled})"
    ).fetchall()
    kde = open_log(run).kde
    for layer, alpha, low, logits, n, experts in found:
        x = np.array([logits], dtype=np.float32)
        if no_finite_logit(x)[0]:
            assert n is None and experts is None
            continue
        thresholds = kde[layer].thresholds(float(alpha), 16)
        if kde.pooled:
            decisions = decide(x, thresholds, min_k=low, max_k=16)
        else:
            p = kde[layer].p_value(x)
            decisions = decide_by_expert(x, thresholds, p, min_k=low, max_k=16)
        assert n == decisions.n_selected[0]
        assert experts == decisions.order[0, :n].tolist()


def test_p_values_are_those_of_the_null_model(run, database):
    log = open_log(run)
    found = database.sql(f"SELECT {IDENTITY}, p_values(logits, layer) FROM routing").fetchall()
    expected = {}
    for batch in log.batches(["layer", "rank", "sequence", "position", "logits"]):
        p = log.kde[layer_of(batch)].p_value(logits_of(batch))
        for row, values in zip(batch.drop_columns(["logits"]).to_pylist(), p, strict=True):
            expected[tuple(row.values())] = values
    for row in found:
        np.testing.assert_array_equal(np.array(row[4], dtype=float), expected[row[:4]])


def test_p_value_of_one_logit_is_its_entry_in_p_values(database):
    found = database.sql(
        "SELECT p_value, p_values(logits, layer)[expert + 1] "
        "FROM selections JOIN routing USING (run, layer, rank, sequence, position) "
        "WHERE isfinite(logit)"
    ).fetchall()
    assert len(found) > 1000
    assert all(p == q for p, q in found)


def test_softmax_entropy_and_top_probability_agree_with_float64(database):
    found = database.sql(
        "SELECT logits, softmax(logits), softmax(logits, 2.0), router_entropy(logits), "
        "top_probability(logits) FROM routing"
    ).fetchall()
    for logits, weights, soft, entropy, top in found:
        x = np.array(logits, dtype=np.float64)
        x[~np.isfinite(x)] = -np.inf
        if not np.isfinite(x).any():
            assert entropy is None and top is None and not any(weights)
            continue
        p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        q = np.exp((x - x.max()) / 2) / np.exp((x - x.max()) / 2).sum()
        logp = np.log(p, where=p > 0, out=np.zeros_like(p))
        # float32 keeps 7 digits; 16 terms add up
        np.testing.assert_allclose(weights, p, rtol=2e-6, atol=1e-12)
        np.testing.assert_allclose(soft, q, rtol=2e-6, atol=1e-12)
        np.testing.assert_allclose(entropy, -(p * logp).sum(), rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(top, p.max(), rtol=2e-6)


def test_softmax_gives_the_weights_that_were_logged(database):
    found = database.sql(
        "SELECT weight, softmax(logits)[expert + 1] FROM selections "
        "JOIN routing USING (run, layer, rank, sequence, position)"
    ).fetchall()
    assert all(weight == probability for weight, probability in found)


@given(
    logits=arrays(np.float32, (5, 8), elements=st.floats(-30, 30, width=32)),
    alpha=st.floats(0.001, 0.999),
    low=st.integers(0, 4),
    high=st.integers(4, 8),
)
@settings(max_examples=40, deadline=None)
def test_any_logits_are_decided_as_decide_does(plain, logits, alpha, low, high):
    database, kde = plain
    decisions = decide(logits, kde[1].thresholds(alpha, 8), min_k=low, max_k=high)
    found = database.sql(
        "SELECT bh_count(x::FLOAT[], 1, $alpha, $low, $high), "
        "bh_experts(x::FLOAT[], 1, $alpha, $low, $high) FROM (SELECT unnest($rows) AS x)",
        {"rows": logits.tolist(), "alpha": alpha, "low": low, "high": high},
    ).fetchall()
    assert [n for n, _ in found] == decisions.n_selected.tolist()
    for i, (n, experts) in enumerate(found):
        assert experts == decisions.order[i, :n].tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "demo"
    kde = normal_kde(LAYERS)
    write_run(folder, n_experts=8, top_k=2, n_sequences=2, length=4, n_shards=1, kde=kde)
    with connect(open_log(folder)) as database:
        yield database, kde


def test_null_and_empty_lists_give_null(plain):
    database, _ = plain
    found = database.sql(
        "SELECT bh_count(x, layer, 0.1), bh_experts(x, layer, 0.1), p_values(x, layer), "
        "softmax(x), router_entropy(x), top_probability(x), p_value(NULL, layer) "
        "FROM (VALUES (NULL::FLOAT[], 1), ([]::FLOAT[], 1), ([1, 2]::FLOAT[], NULL)) AS t(x, layer)"
    ).fetchall()
    assert found[0] == found[1] == (None,) * 7
    assert found[2][:3] == (None,) * 3 and found[2][3] is not None


def test_n_shared_counts_common_experts(plain):
    database, _ = plain
    found = database.sql(
        "SELECT n_shared(a, b) FROM (VALUES ([1, 2, 3], [3, 9, 1]), ([], [1]), ([7], [7]), "
        "(NULL, [1]), ([4, 5], [6])) AS t(a, b)"
    ).fetchall()
    assert found == [(2,), (0,), (1,), (None,), (0,)]


@pytest.mark.parametrize(
    ("call", "line"),
    [
        ("bh_count(logits, layer, 1.5)", "alpha must be between 0 and 1, got 1.5"),
        ("bh_count(logits, layer, 0.1, 1, 9)", "max_k is 9, but the model has 8 experts"),
        ("bh_experts(logits, layer, 0.1, 3, 2)", "max_k must be at least 1 and at least min_k"),
        ("bh_count(logits, 7, 0.1)", "the null model has layers 0-2, but not 7"),
        ("p_values(logits, 7)", "the null model has layers 0-2, but not 7"),
        ("softmax(logits, 0)", "temperature must be above 0"),
        ("bh_count(logits, layer, 0.1, run := 'other')", "no run 'other' is open"),
    ],
)
def test_a_wrong_argument_gets_one_line(plain, call, line):
    database, _ = plain
    with pytest.raises(RouterLogError) as error:
        list(database.batches(f"SELECT {call} FROM routing")[1])
    assert line in str(error.value) and "\n" not in str(error.value)


LIMITS = {  # an alpha's eighth, of 8 experts, is a float64 above 0
    "alpha": ("bh_count(logits, 0, {}::DOUBLE)", ("1e-322", "0.5", "0.9999999999999999"),
              ("5e-324", "0", "-5e-324", "1", "1.0000000000000002", "'nan'", "'inf'")),
    "alpha of bh_experts": ("bh_experts(logits, 0, {}::DOUBLE)", ("1e-322", "0.9999999999999999"),
                            ("5e-324", "0", "1", "'nan'")),
    "min_k": ("bh_count(logits, 0, 0.1, {}, 8)", ("0", "1", "7", "8"), ("-1", "9", "2147483648")),
    "max_k": ("bh_experts(logits, 0, 0.1, 1, {})", ("1", "2", "7", "8"), ("-1", "0", "9")),
    "max_k below min_k": ("bh_count(logits, 0, 0.1, 3, {})", ("3", "4"), ("2",)),
    "layer of the rule": ("bh_count(logits, {}, 0.1)", ("0", "1", "2"), ("-1", "3", "65536")),
    "layer of p_values": ("p_values(logits, {})", ("0", "2"), ("-1", "3", "2147483648")),
    "layer of p_value": ("p_value(1.0, {})", ("0", "2"), ("-1", "3")),
    "an expert that is shared": ("n_shared([{}], [1])", ("0", "65535"), ("-1", "65536")),
    "a logit over a temperature": ("softmax([{}::FLOAT, 0], 0.5)", ("1.7e38", "-1.7e38"),
                                   ("1.8e38", "-1.8e38")),
    "a float32 logit": ("softmax([{}::DOUBLE, 0])", ("3.4e38", "'-inf'", "'nan'"), ("3.5e38",)),
}  # fmt: skip
BY_EXPERT = {
    "expert": ("p_value(1.0, 0, {})", ("0", "1", "14", "15"), ("-1", "16", "NULL")),
    "experts of the rule": ("bh_count(list_resize([1]::FLOAT[], {}, 0), 0, 0.1)", ("16",),
                            ("1", "15", "17")),
    "experts of p_values": ("p_values(list_resize([1]::FLOAT[], {}, 0), 0)", ("16",),
                            ("15", "17")),
}  # fmt: skip


def accepted(database, call, value):
    """Whether a function takes a value; if not, it says why in a line."""
    try:
        list(database.batches(f"SELECT {call.format(value)} FROM routing")[1])
    except RouterLogError as error:
        assert str(error).isprintable()
        return False
    return True


@pytest.mark.parametrize("limit", LIMITS)
def test_each_limit_is_where_it_is_said_to_be(plain, limit):
    call, inside, outside = LIMITS[limit]
    assert [accepted(plain[0], call, value) for value in inside] == [True] * len(inside)
    assert [accepted(plain[0], call, value) for value in outside] == [False] * len(outside)


@pytest.mark.parametrize("limit", BY_EXPERT)
def test_limits_under_a_null_per_expert(run, database, limit):
    if open_log(run).kde.pooled:
        pytest.skip("one null for all experts")
    call, inside, outside = BY_EXPERT[limit]
    assert [accepted(database, call, value) for value in inside] == [True] * len(inside)
    assert [accepted(database, call, value) for value in outside] == [False] * len(outside)


def test_a_run_without_a_null_model_says_so_and_takes_one(tmp_path):
    write_run(tmp_path / "demo", n_experts=8, top_k=2, n_sequences=2, length=4, n_shards=1)
    query = "SELECT bh_count(logits, layer, 0.1) FROM routing"
    with connect(open_log(tmp_path / "demo")) as database:
        with pytest.raises(KdeMismatch, match="no open run has a null model; fit one"):
            list(database.batches(query)[1])
        assert database.sql("SELECT DISTINCT p_value FROM selections").fetchall() == [(None,)]
    with connect(open_log(tmp_path / "demo"), kde=normal_kde(LAYERS)) as database:
        assert len(database.sql(query).fetchall()) == 24
        assert database.sql("SELECT count(p_value) FROM selections").fetchall() == [(48,)]
        assert len(database.sql("SELECT * FROM kde").fetchall()) == 3


def test_runs_with_different_null_models_need_the_run_named(tmp_path):
    kdes = {"a": normal_kde(LAYERS), "b": by_expert(8)}
    for name, kde in kdes.items():
        folder = tmp_path / name
        write_run(folder, n_experts=8, top_k=2, n_sequences=2, length=4, n_shards=1, kde=kde)
    with connect([open_log(tmp_path / name) for name in kdes]) as database:
        with pytest.raises(KdeMismatch, match="run := run"):
            list(database.batches("SELECT bh_count(logits, layer, 0.3) FROM routing")[1])
        found = database.sql(
            f"SELECT run, {IDENTITY}, bh_count(logits, layer, 0.3, run := run) FROM routing"
        ).fetchall()
        total = dict(
            database.sql(
                "SELECT run, sum(bh_count(logits, layer, 0.3, run := run)) FROM routing GROUP BY 1"
            ).fetchall()
        )
    assert len(found) == 48
    for name in kdes:
        with connect(open_log(tmp_path / name)) as alone:
            expected = alone.sql("SELECT sum(bh_count(logits, layer, 0.3)) FROM routing").fetchall()
        assert total[name] == expected[0][0]


def test_experts_are_ordered_by_p_value_then_by_logit(run, database):
    log = open_log(run)
    frame: pl.DataFrame = database.sql(
        "SELECT layer, logits, bh_experts(logits, layer, 0.6) AS e FROM routing"
    ).pl()
    for layer, logits, experts in frame.filter(pl.col("e").is_not_null()).iter_rows():
        x = np.array([logits], dtype=np.float32)
        p = log.kde[layer].p_value(x)
        order = p_value_order(np.where(np.isfinite(x), x, np.float32(-np.inf)), p)
        assert experts == order[0, : len(experts)].tolist()


def test_softmax_is_softmax_weights_bit_for_bit(plain):
    database, _ = plain
    frame = database.sql("SELECT logits, softmax(logits) AS w FROM routing").pl()
    x = np.array(frame["logits"].to_list(), dtype=np.float32)
    decisions = native_decisions(x, 8)
    weights = softmax_weights(x, decisions)
    unsorted = np.empty_like(weights)
    np.put_along_axis(unsorted, decisions.order.astype(np.int64), weights, axis=1)
    np.testing.assert_array_equal(np.array(frame["w"].to_list(), dtype=np.float32), unsorted)


def test_bounds_above_the_number_of_experts_are_refused():
    with pytest.raises(InvalidOption):
        BhOptions(0.1, max_k=9).bounds(8)


@pytest.mark.parametrize("n_experts", [65_534, 65_535, 65_536])
def test_lists_about_as_long_as_uint16_counts(database, n_experts):
    lists = f"list_transform(range({n_experts}), lambda e: (e % 7)::FLOAT)"
    query = f"SELECT len(softmax({lists})), list_sum(softmax({lists})), router_entropy({lists})"
    ((length, total, entropy),) = database.sql(query).fetchall()
    p = np.exp(np.arange(n_experts) % 7.0)
    p /= p.sum()
    assert length == n_experts and total == pytest.approx(1, abs=1e-3)
    assert entropy == pytest.approx(-(p * np.log(p)).sum(), rel=1e-4)
    message = "65,536 logits in a row; the rule takes at most 65,535 experts"
    for function in ("bh_count", "bh_experts"):
        try:
            list(database.batches(f"SELECT {function}({lists}, 0, 0.1)")[1])
        except RouterLogError as error:  # or the null model has other experts
            assert (message in str(error)) == (n_experts > 65_535)
        else:
            assert n_experts <= 65_535


@pytest.mark.parametrize("most", [4094, 4095, 4096, 65_534, 65_535])
def test_shared_experts_of_any_number(database, most):
    query = f"SELECT n_shared([0, {most}, 5], [{most}, 7, 5]), n_shared([{most}], [0])"
    assert database.sql(query).fetchall() == [(2, 0)]


def test_an_expert_beyond_uint16_is_refused(database):
    for query in ("SELECT n_shared([65536], [1])", "SELECT n_shared([1], [-1])"):
        with pytest.raises(InvalidOption) as error:
            list(database.batches(query)[1])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("temperature", "right"),
    [
        ("1e-46", False),  # 0 as a float32
        ("7e-46", False),  # rounds to 0
        ("1.4e-45", False),  # the smallest float32 above 0: 1.0 / it is none
        ("2.9e-39", False),
        ("3e-39", True),
        ("1e-30", True),
        ("3.4e38", True),
        ("3.5e38", False),  # infinite as a float32
        ("0", False),
        ("-1", False),
        ("'nan'::DOUBLE", False),
    ],
)
def test_temperature_is_a_float32_above_0(database, temperature, right):
    query = f"SELECT softmax([0.0, 1.0, 1.0], {temperature}::DOUBLE) AS w"
    if right:
        ((weights,),) = database.sql(query).fetchall()
        assert sum(weights) == pytest.approx(1)
        return
    with pytest.raises(InvalidOption, match=r"temperature .* float32"):
        list(database.batches(query)[1])


def test_one_long_list_costs_its_own_length():
    """Padding every list of a chunk to the longest took 2,048 times as much."""
    lengths = [3] * 2047 + [100_000]
    lists = pa.ListArray.from_arrays(
        pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()),
        pa.array(np.arange(sum(lengths), dtype=np.float32)),
    )
    tracemalloc.start()
    column = ListColumn(lists, np.float32)
    for _, rows, x in logit_groups(lists):
        column.put(rows, x, x.shape[1])
    assert column.to_arrow().equals(lists)
    assert tracemalloc.get_traced_memory()[1] < 30 * 4 * sum(lengths)
    tracemalloc.stop()


def test_bounds_are_those_of_the_run(tmp_path):
    kde = normal_kde(LAYERS)
    shared = {"n_sequences": 2, "length": 30, "n_shards": 1, "kde": kde}
    write_run(tmp_path / "bh", options=BhOptions(0.3, min_k=2, max_k=5), **shared)
    write_run(tmp_path / "native", **shared)
    logs = {name: open_log(tmp_path / name) for name in ("bh", "native")}
    count = "bh_count(logits, layer, 0.3{})"
    with connect(logs["bh"]) as database:
        same = f"bool_and({count.format('')} = n_selected)"
        query = f"SELECT {same}, bool_and(bh_experts(logits, layer, 0.3) = experts) FROM routing"
        assert database.sql(query).fetchall() == [(True, True)]
        wider, lower = count.format(", max_k := 16"), count.format(", min_k := 0")
        query = f"SELECT max({wider}), min({lower}) FROM routing"
        ((most, fewest),) = database.sql(query).fetchall()
        assert most > 5 and fewest < 2
    with connect(logs["native"]) as database:
        query = f"SELECT bool_and({count.format('')} = {count.format(', 1, 16')}) FROM routing"
        assert database.sql(query).fetchall() == [(True,)]
    with connect(list(logs.values())) as database:
        with pytest.raises(InvalidOption, match="different bounds: name the run"):
            list(database.batches(f"SELECT {count.format('')} FROM routing")[1])
        query = f"SELECT run, max({count.format(', run := run')}) FROM routing GROUP BY run"
        found = dict(database.sql(query).fetchall())
        assert found["bh"] == 5 < found["native"]
        assert database.sql(f"SELECT max({count.format(', 1, 4')}) FROM routing").fetchall()


def test_a_replay_and_bh_count_answer_the_same(tmp_path):
    kde = normal_kde(LAYERS)
    options = BhOptions(0.3, min_k=2, max_k=5)
    for name, routing in (("bh", options), ("native", None)):
        log = open_log(
            write_run(tmp_path / name, options=routing, kde=kde, n_sequences=2, n_shards=1)
        )
        for alpha in (0.05, 0.3, 0.6):
            replayed = log.replay(alpha).filter(pl.col("layer").is_not_null())
            with connect(log) as database:
                mean = "SELECT avg(bh_count(logits, layer, $a)) FROM routing"
                query = f"{mean} GROUP BY layer ORDER BY layer"
                counted = [mean for (mean,) in database.sql(query, {"a": alpha}).fetchall()]
            assert counted == pytest.approx(replayed["mean_experts"].to_list())
