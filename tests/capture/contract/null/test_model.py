import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bhlog.capture.contract import checksum as table_file
from bhlog.capture.contract.errors import CorruptKde, InvalidOption, KdeMismatch
from bhlog.capture.contract.null.curve import round_up_to_float32
from bhlog.capture.contract.null.histogram import Histogram
from bhlog.capture.contract.null.model import KdeModel, LayerNull, NullCurve
from bhlog.capture.contract.null.trim import Trim
from bhlog.capture.contract.rule import critical_values
from tests.synthetic import normal_kde, normal_null, same_histogram


def exact_tail(curve, x):
    """S(x) of the definition in exact rationals: linear between grid points, 1 below, 0 above."""
    from fractions import Fraction as F

    u = (F(float(x)) - F(curve.x0)) / F(curve.dx)
    last = len(curve.tail) - 1
    if u < 0:
        return F(1)
    if u > last:
        return F(0)
    cell = min(int(u), last - 1)
    left, right = (F(float(curve.tail[cell + i])) for i in (0, 1))
    return left + (u - cell) * (right - left)


tails = st.lists(
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-300, 1e-9, 0.01, 0.0125, 0.05, 0.5, 1.0])),
    min_size=2,
    max_size=12,
).map(lambda values: np.array(sorted(values, reverse=True)))
curves = st.builds(
    lambda tail, x0, dx: NullCurve(expert=None, n=0, x0=x0, dx=dx, tail=tail),
    tails,
    st.sampled_from([-3.0, -9.4875, 0.0, 1e-3, 100.0]),
    st.sampled_from([2.0**-10, 2.0**-4, 0.00135576, 0.3]),
)


@settings(deadline=None)
@given(curves, st.sampled_from([1e-12, 1e-4, 0.05, 0.3, 0.999]), st.sampled_from([1, 4, 64]))
@example(NullCurve(None, 0, -3.0, 2.0**-10, np.array([5e-324, 0.0])), 1e-12, 1)
def test_thresholds_are_the_first_float32_whose_p_value_is_at_most_critical(curve, alpha, E):
    t = curve.thresholds(alpha, E)
    critical = critical_values(alpha, E)
    before = np.nextafter(t, np.float32(-np.inf), dtype=np.float32)
    assert t.dtype == np.float32
    assert np.all(np.diff(t) <= 0)
    assert np.all(curve.p_value(t) <= critical)
    # a threshold can only sit lower than its own critical value asks where the next one's does
    assert np.all((curve.p_value(before) > critical) | (np.roll(t, 1) == t))
    for k in {0, E // 2, E - 1}:  # against exact rationals, up to float64 rounding
        if critical[k] < curve.tail[-1]:
            continue  # S jumps to 0 at the grid's end, which rounding can move; see below
        assert exact_tail(curve, t[k]) <= critical[k] * (1 + 1e-9) + 1e-15
        assert exact_tail(curve, before[k]) >= critical[k] * (1 - 1e-9) - 1e-15


def test_thresholds_equal_a_scan_over_every_float32_around_them():
    curve = normal_null(0).curves[0]
    t = curve.thresholds(0.05, 64)
    critical = critical_values(0.05, 64)
    for k in (0, 7, 63):
        scan = t[k] + np.arange(-3000, 3000, dtype=np.float32) * np.spacing(t[k])
        passing = scan[curve.p_value(scan) <= critical[k]]
        assert passing.min() == t[k]


def test_a_plateau_at_the_critical_value_passes_from_its_left_end():
    tail = np.array([1.0, 0.5, 0.05, 0.05, 0.05, 0.01, 0.0])
    curve = NullCurve(expert=None, n=0, x0=0.0, dx=0.25, tail=tail)
    assert curve.thresholds(0.05, 1)[0] == np.float32(0.5)


def test_thresholds_at_the_ends_of_the_grid():
    high = NullCurve(expert=None, n=0, x0=0.0, dx=1.0, tail=np.array([0.9, 0.5]))
    assert high.thresholds(0.4, 1)[0] == np.nextafter(np.float32(1), np.float32(2))
    low = NullCurve(expert=None, n=0, x0=0.5, dx=1.0, tail=np.array([0.01, 0.0]))
    assert low.thresholds(0.4, 1)[0] == np.float32(0.5)


def test_a_conformal_null_that_is_never_reached_has_no_finite_threshold():
    flat = NullCurve(None, 0, 0.0, 1.0, np.array([1.0, 1.0]), kernel="conformal")
    assert flat.thresholds(0.3, 4).tolist() == [np.inf] * 4
    half = NullCurve(None, 1, 0.0, 1.0, np.array([1.0, 0.5]), kernel="conformal")
    assert half.thresholds(0.9, 2).tolist() == [np.inf, np.float32(0.2)]


@settings(deadline=None)
@given(curves, st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=20))
def test_p_values_are_the_linear_interpolation(curve, logits):
    p = curve.p_value(np.array(logits, np.float32))
    for value, x in zip(p, logits, strict=True):
        # u = (x - x0) / dx is rounded once, relative to a cell
        assert value == pytest.approx(float(exact_tail(curve, np.float32(x))), rel=1e-9, abs=1e-9)


def test_p_values_of_nan_and_infinity():
    p = normal_null(0).curves[0].p_value(np.array([np.nan, np.inf, -np.inf], np.float32))
    assert np.isnan(p[0])
    assert p[1:].tolist() == [0.0, 1.0]


def test_rounding_up_never_goes_below():
    x = np.random.default_rng(0).normal(0, 5, 1000)
    up = round_up_to_float32(x)
    assert np.all(up.astype(np.float64) >= x)
    assert np.all(np.nextafter(up, np.float32(-np.inf)).astype(np.float64) < x)


def model_with_levels():
    h = Histogram.of(np.array([0.1, 0.2, np.nan], np.float32))
    curve = NullCurve(
        expert=None,
        n=2,
        x0=0.0,
        dx=0.5,
        tail=np.array([1.0, 0.5, 0.0]),
        histogram=h,
        kernel="gaussian",
        bandwidth=0.1,
        rule="scott",
        source=("a", "b"),
        kept={Trim(0, 2): Histogram.of(np.array([0.1], np.float32))},
    )
    experts = tuple(NullCurve(expert=i, n=0, x0=0.0, dx=1.0, tail=curve.tail) for i in range(3))
    return KdeModel({4: LayerNull(4, (curve,)), 1: LayerNull(1, experts)})


def test_a_saved_model_loads_as_it_was(tmp_path):
    model = model_with_levels()
    sha256 = model.save(tmp_path / "null.parquet")
    loaded = KdeModel.load(tmp_path / "null.parquet")
    assert loaded.to_bytes() == model.to_bytes()
    assert len(sha256) == 64
    assert [p.name for p in tmp_path.iterdir()] == ["null.parquet"]
    curve = loaded[4].curves[0]
    assert curve.histogram.left_out == 1
    assert curve.histograms.keys() == {Trim(0, 0), Trim(0, 2)}
    assert same_histogram(curve.histograms[0, 2], Histogram.of(np.array([0.1], np.float32)))
    assert [c.expert for c in loaded[1].curves] == [0, 1, 2]
    assert (curve.rule, curve.bandwidth, curve.source) == ("scott", 0.1, ("a", "b"))


def test_items_answer_as_older_notebooks_read_them():
    model = normal_kde([0])
    assert set(model) == {0}
    assert model[0]["x"].shape == model[0]["cdf"].shape
    assert np.array_equal(model[0]["cdf"], 1 - model[0].curves[0].tail)
    with pytest.raises(KeyError, match="expected 'x' or 'cdf'"):
        model[0]["pdf"]


def test_tails_and_p_values_by_layer():
    model = model_with_levels()
    x, tail = model.tail(4)
    assert tail.tolist() == [1.0, 0.5, 0.0]
    assert np.array_equal(model.p_value(4, x.astype(np.float32)), tail)
    assert np.array_equal(model.tail(1, 2)[1], tail)
    with pytest.raises(KdeMismatch, match="layers 1, 4, but not 7"):
        model.tail(7)
    with pytest.raises(KdeMismatch, match="pooled over experts"):
        model.tail(4, 1)
    with pytest.raises(KdeMismatch, match="experts 0-2, got 5"):
        model.tail(1, 5)
    with pytest.raises(KdeMismatch, match="curves for 3 experts, but the model has 8"):
        model.p_value(1, np.zeros((2, 8), np.float32))


def test_p_values_take_lists_numbers_and_one_expert():
    model = model_with_levels()
    assert model.p_value(4, [0.0, 0.5, 9.0]).tolist() == [1.0, 0.5, 0.0]
    assert model.p_value(4, 0.25) == 0.75
    assert model.p_value(1, [[0.0, 1.0, 2.0]]).tolist() == [[1.0, 0.5, 0.0]]
    assert model.p_value(1, [0.0, 1.0, 1.0, 2.0], expert=2).tolist() == [1.0, 0.5, 0.5, 0.0]
    for layer, logits, expert in ((1, 0.5, None), (4, 0.5, 1), (1, 0.5, 7), (2, 0.5, None)):
        with pytest.raises(KdeMismatch):
            model.p_value(layer, logits, expert)


def test_a_model_for_other_layers_or_experts_is_refused():
    model = model_with_levels()
    model.require([1, 4], 3)
    with pytest.raises(KdeMismatch, match="has layers 1, 4, but not 0, 2-3"):
        model.require([0, 1, 2, 3], 3)
    with pytest.raises(KdeMismatch, match="for routers of 3 experts, but these have 64"):
        model.require([1], 64)
    with pytest.raises(KdeMismatch, match="routers of 3 experts"):
        model.thresholds(0.05, 64)
    pooled = KdeModel({0: normal_null(0)}, n_experts=16)
    with pytest.raises(KdeMismatch, match="for routers of 16 experts, but these have 8"):
        pooled.require([0], 8)
    normal_kde([0]).require([0], 8)  # unknown: taken at its word
    with pytest.raises(CorruptKde, match="curves for 3 experts, expected 16 in all"):
        KdeModel(model.layers, n_experts=16)


def test_thresholds_need_no_number_of_experts_where_the_model_knows_it(tmp_path):
    model = KdeModel({0: normal_null(0), 3: normal_null(3)}, n_experts=16)
    model.save(tmp_path / "null.parquet")
    loaded = KdeModel.load(tmp_path / "null.parquet")
    assert loaded.n_experts == 16
    for layer, t in loaded.thresholds(0.05).items():
        assert np.array_equal(t, model[layer].thresholds(0.05, 16))
    by_expert = KdeModel({1: model_with_levels()[1]})
    assert by_expert.thresholds(0.05)[1].shape == (3, 3)
    with pytest.raises(InvalidOption, match="say n_experts"):
        normal_kde([0]).thresholds(0.05)
    assert normal_kde([0]).thresholds(0.05, 16)[0].shape == (16,)
    with pytest.raises(InvalidOption, match="alpha must be between 0 and 1"):
        model.thresholds(1.0)


def edited(tmp_path, **columns):
    """The model's file with some columns replaced."""
    path = tmp_path / "null.parquet"
    model_with_levels().save(path)
    table = pq.read_table(path)
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        field = table.schema.field(name)
        table = table.set_column(
            index, field, pa.array(values(table[name].to_pylist()), field.type)
        )
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("tail", lambda v: [[0.1, 0.5, 0.0], *v[1:]], "layer 1: tail must fall"),
        ("tail", lambda v: [[0.1, float("nan"), 0.0], *v[1:]], "layer 1: tail must fall"),
        ("tail", lambda v: [[0.1], *v[1:]], "at least 2 grid points"),
        ("tail", lambda v: [None] * len(v), "expected one row with a tail, found 0"),
        ("tail", lambda v: [[float("inf"), 0.5, 0.0], *v[1:]], "layer 1: tail must fall"),
        ("tail", lambda v: [[1.5, 0.5, 0.0], *v[1:]], "layer 1: tail must fall"),
        ("tail", lambda v: [[1.0, 0.5, -0.1], *v[1:]], "layer 1: tail must fall"),
        ("dx", lambda v: [-1.0, *v[1:]], "not a rising grid"),
        ("dx", lambda v: [0.0, *v[1:]], "not a rising grid"),
        ("dx", lambda v: [float("nan"), *v[1:]], "not a rising grid"),
        ("dx", lambda v: [1e300, *v[1:]], "not a rising grid"),
        ("dx", lambda v: [5e-324, *v[1:]], "not a rising grid"),
        ("x0", lambda v: [float("-inf"), *v[1:]], "not a rising grid"),
        ("x0", lambda v: [None, *v[1:]], "no grid x0, dx"),
        ("expert", lambda v: [1, *v[1:]], "layer 1: expected one row with a tail, found 2"),
        ("layer", lambda v: [7, *v[1:]], "layer 1: expected one pooled curve or one per expert"),
        ("trim_high", lambda v: [0] * len(v), "layer 4: a trimming level occurs twice"),
        ("kernel", lambda v: ["\x1b[2J"] * len(v), "unknown kernel .*gaussian"),
        ("rule", lambda v: ["guess"] * len(v), "unknown bandwidth rule"),
        ("bandwidth", lambda v: [float("nan")] * len(v), "bandwidth must be above 0"),
        ("lo", lambda v: [float("nan")] * len(v), "layer 4: histogram from nan on"),
        ("lo", lambda v: [1e300] * len(v), "layer 4: histogram from 1e"),
        ("left_out", lambda v: [-1] * len(v), "layer 4: histogram counts more"),
        (
            "counts",
            lambda v: [c and [-c[0], *c[1:]] for c in v],
            "layer 4: histogram holds a negative count",
        ),
        (
            "counts",  # a sum that overflows could seem right
            lambda v: [c and [c[0] + 2**62, *c[1:]] for c in v],
            "layer 4: histogram counts more",
        ),
        ("expert", lambda v: [5, *v[1:]], "layer 1: expected one pooled curve or one per expert"),
        ("bin_width", lambda v: [0.5] * len(v), "layer 4: histogram has lo="),
        ("spread", lambda v: [None] * len(v), "layer 4: histogram needs a spread"),
        ("n", lambda v: [7] * len(v), "layer 4: histogram counts 1 logits, the row says n = 7"),
        ("counts", lambda v: [*v[:-1], None], "neither a tail nor a histogram"),
    ],
)
def test_a_file_that_breaks_an_invariant_is_named(tmp_path, column, values, message):
    path = edited(tmp_path, **{column: values})
    with pytest.raises(CorruptKde, match=message) as error:
        KdeModel.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_null_model_is_named(tmp_path):
    path = tmp_path / "null.parquet"
    with pytest.raises(CorruptKde, match=r"null\.parquet: cannot read"):
        KdeModel.load(path)
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(CorruptKde, match=r"null\.parquet: not a null model file"):
        KdeModel.load(path)
    normal_kde([0]).save(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CorruptKde, match=r"null\.parquet: not a null model file"):
        KdeModel.load(path)
    pq.write_table(pa.table({"layer": [1]}), path)
    with pytest.raises(CorruptKde, match="not a null model file: column 'layer' is int64"):
        KdeModel.load(path)
    normal_kde([0]).save(path)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns("rule"), path)
    with pytest.raises(CorruptKde, match="no column 'rule'; bhlog kde fit makes one"):
        KdeModel.load(path)
    pq.write_table(table.append_column("more", pa.array([1])), path)
    with pytest.raises(CorruptKde, match="another order or kind"):
        KdeModel.load(path)
    for n_experts in ("-1", "0", "many", "9" * 30, "99999"):
        metadata = {**table.schema.metadata, "bhlog.n_experts": n_experts}
        pq.write_table(table.replace_schema_metadata(metadata), path)
        with pytest.raises(CorruptKde, match=r"bhlog\.n_experts is no number"):
            KdeModel.load(path)
    newer = pa.table({"layer": [1]}).replace_schema_metadata({"bhlog.kde_schema_version": "9"})
    pq.write_table(newer, path)
    with pytest.raises(CorruptKde, match="of version '9', this bhlog reads 2"):
        KdeModel.load(path)
    with pytest.raises(CorruptKde, match="at least one layer"):
        KdeModel({})


def test_a_file_that_claims_more_than_memory_holds_is_refused_before_it_is_read(
    tmp_path, monkeypatch
):
    path = tmp_path / "null.parquet"
    normal_kde([0, 1]).save(path)  # 1,537 grid points in each
    monkeypatch.setattr(table_file, "MOST_VALUES", 3000)
    with pytest.raises(
        CorruptKde, match=r"null\.parquet: not a null model file: claims to hold [0-9,]+ values"
    ):
        KdeModel.load(path)
    monkeypatch.setattr(table_file, "MOST_ROWS", 1)
    with pytest.raises(
        CorruptKde, match=r"null\.parquet: not a null model file: claims to hold 2 curves"
    ):
        KdeModel.load(path)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "null.parquet")
    with pytest.raises(CorruptKde, match=r"null\.parquet: cannot read a null model \(not a file"):
        KdeModel.load(tmp_path / "null.parquet")


def test_a_file_without_end_is_not_read(tmp_path, monkeypatch):
    path = tmp_path / "null.parquet"
    normal_kde([0]).save(path)
    monkeypatch.setattr(table_file, "MOST_BYTES", path.stat().st_size - 1)
    with pytest.raises(CorruptKde, match=r"cannot read a null model \([0-9,]+ bytes; expected"):
        KdeModel.load(path)


def test_other_rows_than_were_written_are_noticed(tmp_path):
    path = tmp_path / "null.parquet"
    normal_kde([0, 1]).save(path)
    table = pq.read_table(path)
    for column, value in (("bandwidth", 0.2), ("source", ["other"]), ("layer", 9)):
        values = [value, *table[column].to_pylist()[1:]]
        index = table.column_names.index(column)
        field = table.schema.field(column)
        pq.write_table(table.set_column(index, field, pa.array(values, field.type)), path)
        with pytest.raises(CorruptKde, match="not those that were written"):
            KdeModel.load(path)
    pq.write_table(table, path)  # the same rows in another encoding
    assert KdeModel.load(path).to_bytes() == normal_kde([0, 1]).to_bytes()


def test_a_file_of_before_checksums_reads(tmp_path):
    table = normal_kde([0, 1]).to_table()
    metadata = {k: v for k, v in table.schema.metadata.items() if k != b"bhlog.sha256"}
    assert len(metadata) == len(table.schema.metadata) - 1
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "null.parquet")
    with pytest.raises(CorruptKde, match="lacks its checksum"):
        KdeModel.load(tmp_path / "null.parquet")
    metadata[b"bhlog.kde_schema_version"] = b"1"
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "null.parquet")
    assert sorted(KdeModel.load(tmp_path / "null.parquet")) == [0, 1]


def test_a_loaded_model_is_known_by_the_file_it_was_read_from(tmp_path):
    path = tmp_path / "null.parquet"
    assert normal_kde([0]).save(path) == KdeModel.load(path).sha256 == normal_kde([0]).sha256
    pq.write_table(pq.read_table(path), path)
    assert KdeModel.load(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_reading_a_null_model_imports_no_pandas():
    golden = Path(__file__).parents[3] / "data" / "golden_v1" / "kde.parquet"
    code = (
        "import sys; from bhlog.capture.contract.null.model import KdeModel;"
        f"model = KdeModel.load({str(golden)!r}); model.thresholds(0.25, 8); model.sha256;"
        "sys.exit('pandas' in sys.modules or 'scipy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


PLAIN = model_with_levels().to_bytes()


@settings(deadline=None)
@given(st.data())
def test_a_damaged_file_gives_a_model_or_one_clear_error(data):
    content = bytearray(PLAIN)
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    for damaged in (bytes(content), bytes(content[:cut])):
        try:
            KdeModel.from_bytes(damaged, "damaged.parquet")
        except CorruptKde as error:
            assert str(error).startswith("damaged.parquet: ") and "\n" not in str(error)


def test_saving_where_nothing_can_be_written_is_one_clear_error(tmp_path):
    with pytest.raises(InvalidOption, match="cannot write a null model"):
        normal_kde([0]).save(tmp_path / "missing" / "null.parquet")


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0, float("nan")])
def test_thresholds_exist_for_alphas_between_0_and_1(alpha):
    with pytest.raises(InvalidOption, match="between 0 and 1"):
        normal_kde([0])[0].thresholds(alpha, 64)


def test_a_small_file_that_would_fill_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    lists = pa.array([np.zeros(1 << 20, np.int64)] * 40, pa.list_(pa.int64()))
    pq.write_table(pa.table({"counts": lists}), tmp_path / "bomb", compression="zstd")
    size = (tmp_path / "bomb").stat().st_size
    assert size < 50_000
    with (
        pq.ParquetFile(tmp_path / "bomb") as file,
        pytest.raises(ValueError, match=r"claims to hold 320 MiB in [\d,]+ bytes"),
    ):
        list(table_file.read_tables(file, size))
    monkeypatch.setenv("BHLOG_MEMORY_LIMIT", "1GB")
    with pq.ParquetFile(tmp_path / "bomb") as file:
        assert [len(table) for table in table_file.read_tables(file, size)] == [40]


def test_a_model_of_many_numbers_is_written_in_row_groups_and_is_the_same(monkeypatch, tmp_path):
    model = normal_kde(range(9))
    one = model.to_bytes()
    monkeypatch.setattr("bhlog.capture.contract.null.file.GROUP_NUMBERS", 20_000)
    several = model.to_bytes()
    with pq.ParquetFile(pa.BufferReader(several)) as file:
        assert 2 < file.num_row_groups < 9
    found = [KdeModel.from_bytes(data, "model") for data in (one, several)]
    assert found[0].to_bytes() == found[1].to_bytes() == several
    assert found[1].to_table().equals(model.to_table())
