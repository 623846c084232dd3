import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import ndtr
from scipy.stats import norm

from bhlog.analysis.fold import sampled
from bhlog.analysis.log import logits_of, open_log
from bhlog.analysis.null.fit import MOST_LAYER_POINTS, FitOptions, fit_histograms, fit_kde
from bhlog.analysis.null.refit import merge, refit
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.curve import KERNELS
from bhlog.capture.contract.null.histogram import (
    BIN_WIDTH,
    Histogram,
    HistogramAccumulator,
    HistogramKey,
    Trim,
)
from bhlog.capture.contract.null.kernel import UPPER, kernel_tail
from bhlog.capture.contract.null.model import KdeModel, NullCurve
from tests.synthetic import normal_kde, to_bfloat16, write_run


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
    return fit_histograms(counting.histograms(), options, source=["test"])


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
@given(values_lists, st.sampled_from(KERNELS), st.sampled_from(["scott", "silverman", 0.05, 0.5]))
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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return write_run(folder, layers=(0, 2, 5), n_experts=16, n_sequences=6, length=60, seed=3)


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "other"
    return write_run(folder, layers=(0, 2, 5), n_experts=16, n_sequences=3, length=40, seed=4)


def logits_by_layer(log, where=None):
    found = {}
    for batch in log.batches(["layer", "logits"], where=where):
        found.setdefault(batch.column("layer")[0].as_py(), []).append(logits_of(batch))
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def same(a, b):
    return a.to_bytes() == b.to_bytes()


def test_a_fit_from_a_log_counts_every_logit_once(run):
    log = open_log(run)
    model = fit_kde(log)
    assert sorted(model) == [0, 2, 5]
    for layer, logits in logits_by_layer(log).items():
        curve = model[layer].curves[0]
        assert curve.histogram.same_as(Histogram.of(logits))
        assert curve.bandwidth == pytest.approx(
            logits.astype(float).std(ddof=1) * logits.size**-0.2
        )
        assert curve.source == (log.manifest.run_id,)
        assert (curve.kernel, curve.rule, curve.n) == ("gaussian", "scott", logits.size)


def test_threads_do_not_change_a_fit(run):
    assert same(fit_kde(open_log(run), threads=1), fit_kde(open_log(run), threads=5))


def test_layers_where_and_several_runs(run, other_run):
    log = open_log(run)
    model = fit_kde(log, layers=[2], where="position < 10")
    assert list(model) == [2]
    assert model[2].curves[0].n == 6 * 10 * 16
    both = fit_kde([log, open_log(other_run)])
    assert both[0].curves[0].n == (6 * 60 + 3 * 40) * 16
    assert len(both[0].curves[0].source) == 2
    with pytest.raises(
        InvalidOption, match=r"no rows of layers 0, 2, 5 in .* where position > 999"
    ):
        fit_kde(log, where="position > 999")


def test_trimming_leaves_out_the_ends_of_each_row(run):
    log = open_log(run)
    model = fit_kde(log, FitOptions(trim_low=1, trim_high=3, keep=((0, 0),)))
    for layer, logits in logits_by_layer(log).items():
        ranked = np.sort(logits, axis=1)
        curve = model[layer].curves[0]
        assert curve.histogram.same_as(Histogram.of(ranked[:, 1:-3]))
        assert curve.kept[Trim(0, 0)].same_as(Histogram.of(logits))
    with pytest.raises(InvalidOption, match="leave nothing of rows of 16 experts"):
        fit_kde(log, FitOptions(trim_high=16))


def test_one_null_per_expert(run):
    log = open_log(run)
    model = fit_kde(log, FitOptions(null="expert"))
    for layer, logits in logits_by_layer(log).items():
        assert [curve.expert for curve in model[layer].curves] == list(range(16))
        for expert, curve in enumerate(model[layer].curves):
            assert curve.histogram.same_as(Histogram.of(logits[:, expert]))


def test_a_sample_is_of_whole_tokens_and_always_the_same(run):
    log = open_log(run)
    tokens = {}
    for batch in log.batches(["layer", "rank", "sequence", "position"]):
        chosen = batch.filter(sampled(batch, 0.3))
        columns = (chosen.column(name).to_pylist() for name in ("sequence", "position"))
        tokens.setdefault(batch.column("layer")[0].as_py(), set()).update(
            zip(*columns, strict=True)
        )
    assert tokens[0] == tokens[2] == tokens[5]
    assert 0.2 < len(tokens[0]) / 360 < 0.4
    model = fit_kde(log, sample=0.3)
    assert model[0].curves[0].n == len(tokens[0]) * 16
    assert same(model, fit_kde(log, sample=0.3))
    with pytest.raises(InvalidOption, match="sample must be above 0"):
        fit_kde(log, sample=0)


def test_nan_and_infinite_logits_are_counted_and_left_out(tmp_path):
    logits = np.random.default_rng(0).normal(size=(1, 1, 20, 16)).astype(np.float32)
    logits[0, 0, 3, 4], logits[0, 0, 5, :3] = np.nan, np.inf
    shape = {"layers": (0,), "n_sequences": 1, "length": 20, "n_shards": 1}
    run = write_run(tmp_path / "broken", **shape, logits=logits)
    curve = fit_kde(open_log(run))[0].curves[0]
    assert (curve.n, curve.histogram.left_out) == (20 * 16 - 4, 4)
    trimmed = fit_kde(open_log(run), FitOptions(trim_high=2))[0].curves[0]
    assert (trimmed.n, trimmed.histogram.left_out) == (20 * 14 - 4, 4)
    none = write_run(tmp_path / "none", **shape, logits=np.full_like(logits, np.nan))
    with pytest.raises(InvalidOption, match=r"layer 0 has no finite logit .* \(320 were left out"):
        fit_kde(open_log(none))


def test_runs_of_different_models_are_refused(run, tmp_path):
    other = write_run(tmp_path / "other", layers=(0, 1), n_experts=8)
    with pytest.raises(KdeMismatch, match="has layers 0-1 of 8 experts"):
        fit_kde([open_log(run), open_log(other)])


CHANGES = {
    "same": {},
    "kernel": {"kernel": "epanechnikov"},
    "none": {"kernel": "none"},
    "number": {"bandwidth": 0.1},
    "isj": {"bandwidth": "isj"},
    "trim": {"trim_high": 4},
    "all": {"kernel": "tophat", "bandwidth": "silverman", "trim_high": 4},
}


@pytest.mark.parametrize("null", ["pooled", "expert"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_refit_equals_a_fit_from_scratch(run, null, change):
    log = open_log(run)
    fitted = fit_kde(log, FitOptions(null=null, keep=((0, 4),)))
    trim_high = CHANGES[change].get("trim_high", 0)
    keep = ((0, 0), (0, 4))
    scratch = fit_kde(log, FitOptions(null=null, keep=keep, **CHANGES[change]))
    again = refit(fitted, **CHANGES[change])
    assert again[0].curves[0].trim_high == trim_high
    assert same(again, scratch)
    assert same(fitted.refit(**CHANGES[change]), scratch)
    assert same(refit(again, kernel="gaussian", bandwidth="scott", trim_high=0), fitted)


def test_a_refit_at_a_level_the_file_does_not_keep_is_refused(run):
    model = fit_kde(open_log(run), FitOptions(keep=((0, 4),)))
    with pytest.raises(InvalidOption, match="trim_high 5; it keeps 0:0, 0:4"):
        refit(model, trim_high=5)
    with pytest.raises(KdeMismatch, match="imported"):
        refit(imported())


def imported():
    model = normal_kde([0])
    (curve,) = model[0].curves
    bare = NullCurve(expert=None, n=0, x0=curve.x0, dx=curve.dx, tail=curve.tail, source=("a.pkl",))
    return KdeModel({0: type(model[0])(0, (bare,))})


@pytest.mark.parametrize("null", ["pooled", "expert"])
def test_merging_equals_fitting_together_in_any_order(run, other_run, null):
    options = FitOptions(null=null, trim_high=2, keep=((0, 0),))
    a, b = (fit_kde(open_log(path), options) for path in (run, other_run))
    together = fit_kde([open_log(run), open_log(other_run)], options)
    assert same(merge([a, b]), together)
    assert same(merge([b, a]), together)
    assert same(a.merge(b), together)
    parts = [fit_kde(open_log(run), options, where=f"sequence % 3 = {i}") for i in range(3)]
    assert same(merge([merge(parts[:2]), parts[2]]), a)
    assert same(merge([parts[2], merge(parts[1::-1])]), a)


def test_models_of_other_routers_do_not_merge(run, tmp_path):
    model = fit_kde(open_log(run))
    assert (model.n_experts, refit(model, bandwidth=0.1).n_experts) == (16, 16)
    of_8 = write_run(tmp_path / "of_8", layers=(0, 2, 5), n_experts=8, n_sequences=2, length=9)
    with pytest.raises(KdeMismatch, match="routers of 8 and 16 experts"):
        merge([model, fit_kde(open_log(of_8))])


def test_curves_of_many_experts_share_the_grid_points_of_a_layer():
    values = np.random.default_rng(0).normal(0, 1, 64).astype(np.float32)
    keys = {HistogramKey(0, expert, Trim()): Histogram.of(values) for expert in range(64)}
    options = FitOptions(kernel="epanechnikov", null="expert")
    model = fit_histograms(keys, options, source=["test"])
    assert sum(len(curve.tail) for curve in model[0].curves) <= MOST_LAYER_POINTS


def test_merging_keeps_layers_and_refuses_what_does_not_fit(run):
    log = open_log(run)
    model = fit_kde(log)
    parts = merge([fit_kde(log, layers=[0]), fit_kde(log, layers=[2, 5])])
    assert same(parts, model)
    with pytest.raises(InvalidOption, match="fitted differently"):
        merge([model, refit(model, kernel="tophat")])
    with pytest.raises(InvalidOption, match="fitted differently"):
        merge([model, fit_kde(log, FitOptions(null="expert"))])
    with pytest.raises(KdeMismatch, match=r"imported from a\.pkl"):
        merge([model, imported()])
    with pytest.raises(InvalidOption, match="at least one"):
        merge([])


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
