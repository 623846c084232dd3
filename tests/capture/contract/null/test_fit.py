import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import ndtr
from scipy.stats import norm

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.curve import KERNELS, NullCurve
from bhlog.capture.contract.null.fit import MOST_LAYER_POINTS, FitOptions
from bhlog.capture.contract.null.histogram import (
    BIN_WIDTH,
    Histogram,
    HistogramAccumulator,
    HistogramKey,
)
from bhlog.capture.contract.null.kernel import UPPER, kernel_tail
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.null.trim import Trim
from tests.synthetic import to_bfloat16


def curve_of(values, bandwidth, kernel="gaussian"):
    x0, dx, tail = kernel_tail(Histogram.of(values.astype(np.float32)), kernel, bandwidth)
    return NullCurve(expert=None, n=len(values), x0=x0, dx=dx, tail=tail)


def direct_tail(values, bandwidth, x, kernel="gaussian"):
    """S at x as the float64 mean of the kernel's integrals, value by value."""
    values = values.astype(np.float32).astype(np.float64)
    upper = UPPER[kernel]
    return np.array([upper((at - values) / bandwidth).mean() for at in x])


def fit_values(values, options=None):
    """A model of one layer with one expert, fitted from values."""
    options = options or FitOptions()
    counting = HistogramAccumulator(options.trims)
    counting.update(0, np.asarray(values, np.float32).reshape(-1, 1))
    return KdeModel.fit(counting.histograms(), options, source=["test"])


def samples():
    rng = np.random.default_rng(0)
    normal = rng.normal(0, 1, 320_000)
    return {
        "normal": normal,
        "narrow": normal * 0.3,
        "bfloat16": to_bfloat16((2 * normal - 1).astype(np.float32)),
        "bimodal": np.concatenate([rng.normal(-2, 0.3, 60_000), rng.normal(4, 0.5, 700)]),
        "few": normal[:1000],
    }


@pytest.mark.parametrize("name", samples())
def test_the_tail_is_within_1e_4_of_the_direct_sum_down_to_1e_8(name):
    values = samples()[name]
    bandwidth = float(values.std() * len(values) ** -0.2)
    curve = curve_of(values, bandwidth)
    rng = np.random.default_rng(1)
    # off the grid, most of them where the largest values thin out
    top = values.max()
    x = np.concatenate(
        [rng.uniform(top - 4 * bandwidth, top + 6 * bandwidth, 150), rng.choice(values, 30)]
    )
    direct = direct_tail(values, bandwidth, x)
    counted = direct >= 1e-8
    assert counted.sum() > 50
    assert np.abs(curve.p_value(x) / direct - 1)[counted].max() < 1e-4


def test_the_tail_of_a_normal_sample_is_the_normal_tail_widened_by_the_kernel():
    n = 200_000
    values = norm.ppf((np.arange(n) + 0.5) / n)  # no sampling noise
    curve = curve_of(values, 0.3)
    x = np.linspace(-4, 4, 50)  # the sample itself stops at 4.6
    assert curve.p_value(x) == pytest.approx(norm.sf(x, scale=np.sqrt(1 + 0.3**2)), rel=2e-3)


# Where a compact kernel ends: the last value that reaches x, to the distance S = 1e-8 is away from.
REACH = {"epanechnikov": 5**0.5, "triangular": 6**0.5, "tophat": 3**0.5}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", ["epanechnikov", "triangular"])
@pytest.mark.parametrize("n", [1000, 50_000])
def test_compact_kernels_are_within_1e_4_down_to_1e_8_too(kernel, dtype, n):
    values = np.random.default_rng(5).normal(-1, 1, n).astype(np.float32)
    values = to_bfloat16(values) if dtype == "bfloat16" else values
    bandwidth = float(values.std() * n**-0.2)
    end = values.max() + REACH[kernel] * bandwidth
    x = np.concatenate([np.linspace(end - 3, end, 100), end - np.geomspace(1e-4, 1, 100)])
    direct = direct_tail(values, bandwidth, x, kernel)
    counted = direct >= 1e-8
    assert direct[counted].min() < 1e-7
    p = curve_of(values, bandwidth, kernel).p_value(x)
    assert np.abs(p / np.maximum(direct, 1e-8) - 1)[counted].max() < 1e-4


@pytest.mark.parametrize("kernel", REACH | {"gaussian": 6.0})
@pytest.mark.parametrize("kind", ["normal", "one", "lattice"])
@pytest.mark.parametrize("nodes", [1, 4, 15, 150])
def test_any_tail_lies_between_direct_sums_a_node_away(kernel, kind, nodes):
    rng = np.random.default_rng(nodes)
    bandwidth = nodes * BIN_WIDTH
    for n in (1, 2, 1000):
        values = {
            "normal": rng.normal(size=n),
            "one": np.full(n, rng.normal()),
            "lattice": np.round(rng.normal(size=n) * 64) / 64,
        }[kind]
        end = values.max() + (REACH | {"gaussian": 6.0})[kernel] * bandwidth
        x = np.concatenate([np.linspace(values.min() - 8 * bandwidth, end, 300), [end]])
        p = curve_of(values, bandwidth, kernel).p_value(x)
        shift = 1.1 * BIN_WIDTH
        low = direct_tail(values, bandwidth, x + shift, kernel)
        high = direct_tail(values, bandwidth, x - shift, kernel)
        assert np.all(p >= low * (1 - 1e-3) - 1e-8)
        assert np.all(p <= high * (1 + 1e-3) + 1e-8)


def test_layers_without_a_root_of_isj_refit_and_merge_with_those_that_have_one():
    accumulator = FitOptions(bandwidth="isj").accumulator()
    accumulator.update(0, np.array([0.25, 1.0] * 50, np.float32)[:, None])
    accumulator.update(1, np.random.default_rng(0).normal(size=(500, 1)).astype(np.float32))
    options = FitOptions(bandwidth="isj")
    model = KdeModel.fit(accumulator.histograms(), options, source=["test"])
    assert [curve.rule for _, curve in model.curves] == ["isj, silverman", "isj"]
    again = KdeModel.from_bytes(model.to_bytes(), "model").refit(kernel="epanechnikov")
    assert [curve.rule for _, curve in again.curves] == ["isj, silverman", "isj"]
    assert [curve.rule for _, curve in model.merge(model).curves] == ["isj, silverman", "isj"]


def test_a_tophat_is_within_1e_2_until_a_node_before_its_end():
    values = np.random.default_rng(5).normal(-1, 1, 50_000).astype(np.float32)
    bandwidth = float(values.std() * len(values) ** -0.2)
    end = values.max() + REACH["tophat"] * bandwidth - 2 * BIN_WIDTH
    x = np.concatenate([np.linspace(end - 3, end, 200), end - np.geomspace(1e-4, 1, 100)])
    direct = direct_tail(values, bandwidth, x, "tophat")
    p = curve_of(values, bandwidth, "tophat").p_value(x)
    assert np.abs(p / direct - 1).max() < 1e-2
    assert np.abs(p / direct - 1)[direct > 1e-3].max() < 1e-4


@pytest.mark.parametrize("kernel", UPPER)
def test_every_kernel_matches_its_direct_sum_and_has_standard_deviation_1(kernel):
    values = np.random.default_rng(2).normal(0, 1, 3000)
    curve = curve_of(values, 0.2, kernel)
    x = np.linspace(-5, 5, 400)
    # linear binning moves a value by at most half a node, 0.0025 bandwidths here
    assert np.abs(curve.p_value(x) - direct_tail(values, 0.2, x, kernel)).max() < 1e-4
    z = np.linspace(-9, 9, 200_001)
    density = -np.diff(UPPER[kernel](z)) / np.diff(z)
    assert density @ ((z[1:] + z[:-1]) / 2) ** 2 * np.diff(z)[0] == pytest.approx(1, abs=1e-3)


values_lists = arrays(np.float32, st.integers(1, 40), elements=st.floats(-30, 30, width=32))


@settings(deadline=None, max_examples=40)
@given(
    values_lists,
    st.sampled_from([k for k in KERNELS if k != "conformal"]),
    st.sampled_from(["scott", "silverman", 0.05, 0.5]),
)
def test_tails_fall_from_1_to_0_whatever_the_values(values, kernel, bandwidth):
    model = fit_values(values, FitOptions(kernel=kernel, bandwidth=bandwidth))
    curve = model[0].curves[0]
    assert curve.n == len(values)
    assert curve.tail[0] == pytest.approx(1, abs=1e-9)
    assert curve.tail[-1] < 1e-15
    assert np.all(np.diff(curve.tail) <= 0)
    assert curve.p_value(np.array([-np.inf, np.inf])).tolist() == [1.0, 0.0]
    if kernel != "none":
        assert curve.x0 <= values.min() - 8 * curve.bandwidth
        assert curve.grid[-1] >= values.max() + 8 * curve.bandwidth
    assert np.log2(curve.dx) == round(np.log2(curve.dx))


@settings(deadline=None, max_examples=25)
@given(values_lists, st.integers(-4, 4), st.sampled_from([0.5, 2.0]))
def test_shifting_and_scaling_values_shifts_and_scales_the_tail(values, shift, scale):
    values = np.round(values * 2**8) / 2**8  # so that shifted values stay on nodes
    options = FitOptions(bandwidth=0.5)
    before = fit_values(values, options)[0].curves[0]
    shifted = fit_values(values + shift, options)[0].curves[0]
    scaled = fit_values(values * scale, FitOptions(bandwidth=0.5 * scale))[0].curves[0]
    x = np.linspace(-35, 35, 200)
    # absolute: two different grids interpolate to 5e-5 of S each
    assert shifted.p_value(x + shift) == pytest.approx(before.p_value(x), abs=1e-4)
    assert scaled.p_value(x * scale) == pytest.approx(before.p_value(x), abs=1e-4)


def test_the_empirical_tail_is_the_share_of_logits_above():
    values = np.array([0.5, 0.5, 1.0, 2.0])
    curve = fit_values(values, FitOptions(kernel="none"))[0].curves[0]
    assert curve.p_value(np.array([0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0])).tolist() == [
        1.0, 0.5, 0.5, 0.25, 0.25, 0.0, 0.0,
    ]  # fmt: skip
    assert (curve.rule, curve.bandwidth) == ("none", None)


@pytest.mark.parametrize("values", [[0.7], [0.7] * 100, [-1.0, 2.0], [-1.0] * 50 + [2.0] * 50])
@pytest.mark.parametrize("bandwidth", ["scott", "silverman", "isj"])
def test_one_value_and_two_values_are_fitted(values, bandwidth):
    curve = fit_values(values, FitOptions(bandwidth=bandwidth))[0].curves[0]
    assert curve.bandwidth >= BIN_WIDTH
    assert curve.p_value(np.array([-20.0, 20.0])).tolist() == [1.0, 0.0]
    assert 0 < curve.p_value(np.array([values[0]]))[0] < 1


def test_curves_of_many_experts_share_the_grid_points_of_a_layer():
    values = np.random.default_rng(0).normal(0, 1, 64).astype(np.float32)
    keys = {HistogramKey(0, expert, Trim()): Histogram.of(values) for expert in range(64)}
    options = FitOptions(kernel="epanechnikov", null="expert")
    model = KdeModel.fit(keys, options, source=["test"])
    assert sum(len(curve.tail) for curve in model[0].curves) <= MOST_LAYER_POINTS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "box"}, "kernel must be gaussian, .* got 'box'"),
        ({"bandwidth": "wide"}, "bandwidth must be scott"),
        ({"bandwidth": 0.0}, "bandwidth must be between"),
        ({"bandwidth": float("nan")}, "bandwidth must be between"),
        ({"trim_low": -1}, "at least 0"),
        ({"null": "layer"}, "null must be 'pooled' or 'expert'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InvalidOption, match=message):
        FitOptions(**options)


def test_the_kernel_integrals_are_upper_tails():
    z = np.linspace(-3, 3, 61)
    assert UPPER["gaussian"](z) == pytest.approx(1 - ndtr(z))
    for upper in UPPER.values():
        assert upper(z) == pytest.approx(1 - upper(-z))
        assert np.all(np.diff(upper(z)) <= 0)


def test_a_grid_has_no_more_points_than_it_may_and_still_says_the_tail():
    values = np.random.default_rng(0).normal(size=2000)
    histogram = Histogram.of(values.astype(np.float32))
    full = kernel_tail(histogram, "gaussian", 0.2)
    x0, dx, tail = kernel_tail(histogram, "gaussian", 0.2, most_points=500)
    assert 250 < len(tail) <= 501 < len(full[2])
    few = NullCurve(expert=None, n=2000, x0=x0, dx=dx, tail=tail)
    whole = NullCurve(expert=None, n=2000, x0=full[0], dx=full[1], tail=full[2])
    x = np.linspace(-3, 4, 300)
    assert np.abs(few.p_value(x) / whole.p_value(x) - 1)[whole.p_value(x) > 1e-6].max() < 0.03
