import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.contract.bh import critical_values
from capture.contract.errors import CorruptKde, InvalidOption, KdeMismatch
from capture.contract.histogram import Histogram, Trim
from capture.contract.kde import KdeModel, LayerNull, NullCurve
from capture.contract.null import round_up_to_float32
from tests.synthetic import normal_kde, normal_null


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


@given(curves, st.sampled_from([1e-12, 1e-4, 0.05, 0.3, 0.999]), st.sampled_from([1, 4, 64]))
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
    assert curve.histograms[0, 2].same_as(Histogram.of(np.array([0.1], np.float32)))
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


def test_a_model_for_other_layers_or_experts_is_refused():
    model = model_with_levels()
    model.require([1, 4], 3)
    with pytest.raises(KdeMismatch, match="has layers 1, 4, but not 0, 2-3"):
        model.require([0, 1, 2, 3], 3)
    with pytest.raises(KdeMismatch, match="curves for 3 experts, but the model has 64"):
        model.require([1], 64)
    with pytest.raises(KdeMismatch, match="curves for 3 experts"):
        model.thresholds(0.05, 64)


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
        ("dx", lambda v: [-1.0, *v[1:]], "not a rising finite grid"),
        ("x0", lambda v: [None, *v[1:]], "no grid x0, dx"),
        ("expert", lambda v: [5, *v[1:]], "layer 1: expected one pooled curve or one per expert"),
        ("bin_width", lambda v: [0.5] * len(v), "layer 4: histogram has lo="),
        ("spread", lambda v: [None] * len(v), "layer 4: histogram needs counts"),
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
    with pytest.raises(CorruptKde, match="columns are layer; a null model file has layer, expert"):
        KdeModel.load(path)
    newer = pa.table({"layer": [1]}).replace_schema_metadata({"bhlog.kde_schema_version": "9"})
    pq.write_table(newer, path)
    with pytest.raises(CorruptKde, match="of version 9, this bhlog reads 1"):
        KdeModel.load(path)
    with pytest.raises(CorruptKde, match="at least one layer"):
        KdeModel({})


def test_saving_where_nothing_can_be_written_is_one_clear_error(tmp_path):
    with pytest.raises(InvalidOption, match="cannot write a null model"):
        normal_kde([0]).save(tmp_path / "missing" / "null.parquet")
