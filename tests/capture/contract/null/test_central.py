import numpy as np
import pytest
from scipy.stats import norm

from bhlog.capture.contract.errors import CorruptKde, InvalidOption, KdeMismatch
from bhlog.capture.contract.named import Bh, Lfdr
from bhlog.capture.contract.null.central import Central
from bhlog.capture.contract.null.curve import NullCurve
from bhlog.capture.contract.null.fit import FitOptions, fit_histograms
from bhlog.capture.contract.null.histogram import Histogram, HistogramKey
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.null.trim import Trim

PI0, DELTA0, SIGMA0 = 0.9, -0.4, 0.8
SIGNAL = norm(2.6, 0.5)
CENTRAL = FitOptions(null_from="central")


def model_of(values, options=CENTRAL):
    histogram = Histogram.of(np.asarray(values, dtype=np.float32))
    layers = fit_histograms({HistogramKey(0, None, Trim()): histogram}, options, source=["run"])
    return KdeModel(layers, 64)


@pytest.fixture(scope="module")
def simulated():
    """Logits of which a share PI0 is null, which ones, and the null model of them."""
    rng = np.random.default_rng(0)
    null = rng.random(400_000) < PI0
    x = np.where(
        null,
        rng.normal(DELTA0, SIGMA0, null.size),
        SIGNAL.rvs(null.size, random_state=rng),
    ).astype(np.float32)
    return x, null, model_of(x)


def true_lfdr(x):
    f0 = PI0 * norm(DELTA0, SIGMA0).pdf(x)
    return f0 / (f0 + (1 - PI0) * SIGNAL.pdf(x))


def test_the_null_of_a_mixture_is_found(simulated):
    found = simulated[2][0].curves[0].central
    assert found.delta0 == pytest.approx(DELTA0, abs=0.02)
    assert found.sigma0 == pytest.approx(SIGMA0, abs=0.02)
    assert found.pi0 == pytest.approx(PI0, abs=0.01)


def test_the_local_fdr_is_that_of_the_mixture(simulated):
    curve = simulated[2][0].curves[0]
    x = np.linspace(0.8, 3.2, 25)
    found = np.interp(x, curve.grid, curve.lfdr)
    np.testing.assert_allclose(found, true_lfdr(x), atol=0.06)


@pytest.mark.parametrize("level", [0.05, 0.2, 0.5])
def test_a_local_fdr_threshold_is_where_the_mixture_has_it(simulated, level):
    x, null, model = simulated
    t = model[0].thresholds_of(Lfdr(level), 64)
    assert t.dtype == np.float32 and t.shape == (64,) and len(set(t.tolist())) == 1
    assert true_lfdr(float(t[0])) == pytest.approx(level, abs=0.06)
    chosen = x >= t[0]
    expected = true_lfdr(x[chosen].astype(np.float64)).mean()  # the share that is null beyond it
    assert null[chosen].mean() == pytest.approx(expected, abs=0.01)


def test_a_threshold_is_the_first_float32_at_the_level(simulated):
    curve = simulated[2][0].curves[0]
    t = curve.lfdr_threshold(0.2)
    before = np.nextafter(t, np.float32(-np.inf))
    assert np.interp(float(t), curve.grid, curve.lfdr) <= 0.2 * (1 + 1e-12)
    assert np.interp(float(before), curve.grid, curve.lfdr) > 0.2 * (1 - 1e-7)


def test_p_values_are_those_of_the_normal_curve(simulated):
    curve = simulated[2][0].curves[0]
    found = curve.central
    x = found.delta0 + found.sigma0 * np.linspace(-3, 5.5, 200)
    expected = norm.sf(x, found.delta0, found.sigma0)
    np.testing.assert_allclose(curve.p_value(x), expected, rtol=1e-4)
    assert curve.p_value(np.array([found.delta0 + 30 * found.sigma0])) > 0  # no floor of zeros


def test_pure_noise_has_no_signal():
    found = model_of(np.random.default_rng(1).normal(0.3, 1.2, 400_000))
    central = found[0].curves[0].central
    assert central.delta0 == pytest.approx(0.3, abs=0.02)
    assert central.sigma0 == pytest.approx(1.2, abs=0.03)
    assert central.pi0 > 0.98


def test_a_saved_central_null_loads_merges_and_refits_as_it_was(simulated, tmp_path):
    model = simulated[2]
    model.save(tmp_path / "null.parquet")
    loaded = KdeModel.load(tmp_path / "null.parquet")
    assert loaded.to_bytes() == model.to_bytes() == model.refit().to_bytes()
    assert loaded[0].curves[0].central == model[0].curves[0].central
    np.testing.assert_array_equal(loaded[0].curves[0].lfdr, model[0].curves[0].lfdr)
    kept = model.refit(null_from="kept")
    assert kept[0].curves[0].central is None and not kept[0].central
    assert kept.refit(null_from="central").to_bytes() == model.to_bytes()
    with pytest.raises(InvalidOption, match=r"fitted differently.*from the centre"):
        kept.merge(model)
    merged = model.merge(model)[0].curves[0]
    assert merged.n == 2 * model[0].curves[0].n and merged.central is not None


def test_a_null_that_is_not_central_has_no_local_fdr():
    model = model_of(np.random.default_rng(2).normal(size=1000), FitOptions())
    with pytest.raises(KdeMismatch, match="--null-from central"):
        model[0].thresholds_of(Lfdr(0.2), 64)
    assert np.array_equal(model[0].thresholds_of(Bh(0.3), 64), model[0].thresholds(0.3, 64))


@pytest.mark.parametrize("values", [[0.5] * 9, np.r_[np.full(50, -4.0), np.full(50, 4.0)]])
def test_what_has_no_bell_in_its_middle_is_refused(values):
    try:
        central = model_of(values)[0].curves[0].central
    except InvalidOption as error:
        assert "layer 0: the middle half" in str(error)
    else:  # a lone kernel is a bell
        assert central.sigma0 > 0 and len(set(values)) == 1


@pytest.mark.parametrize(
    "options", [{"trim_high": 8}, {"kernel": "none"}, {"kernel": "conformal"}, {"null_from": "all"}]
)
def test_options_that_a_central_null_cannot_have(options):
    with pytest.raises(InvalidOption, match=r"central"):
        FitOptions(**{"null_from": "central", **options})


def test_damaged_values_are_refused():
    tail = np.array([1.0, 0.5, 0.0])
    for central, lfdr in [
        (Central(0.0, 1.0, 0.9), None),
        (None, tail),
        (Central(np.nan, 1.0, 0.9), tail),
        (Central(0.0, 0.0, 0.9), tail),
        (Central(0.0, 1.0, 1.5), tail),
        (Central(0.0, 1.0, 0.9), tail[::-1]),
        (Central(0.0, 1.0, 0.9), tail[:2]),
    ]:
        with pytest.raises(CorruptKde, match="lfdr"):
            NullCurve(None, 1, 0.0, 0.5, tail, central=central, lfdr=lfdr)


def conformal_of(sample):
    return model_of(sample, FitOptions(kernel="conformal"))[0].curves[0]


def test_conformal_p_values_count_the_sample():
    rng = np.random.default_rng(3)
    sample = rng.integers(-300, 300, 999) / 64  # on nodes, with room between them
    curve = conformal_of(sample)
    x = np.r_[rng.integers(-400, 400, 500) / 64, -1e4, 1e4, 1e30]
    exact = (1 + (sample[None, :] >= x[:, None]).sum(axis=1)) / 1000
    np.testing.assert_allclose(curve.p_value(x), exact, rtol=1e-12)


def test_conformal_p_values_are_never_below_those_of_the_sample():
    rng = np.random.default_rng(4)
    sample, x = (rng.normal(size=n).astype(np.float32) for n in (500, 2000))
    exact = (1 + (sample[None, :] >= x[:, None]).sum(axis=1)) / 501
    p = conformal_of(sample).p_value(x)
    assert (p >= exact * (1 - 1e-12)).all() and np.abs(p - exact).max() < 0.01


def test_a_conformal_null_has_no_p_value_of_0_and_no_threshold_below_its_floor():
    curve = conformal_of(np.random.default_rng(5).normal(size=99))
    assert curve.p_value(np.array([50.0, np.inf])).tolist() == [0.01, 0.01]
    t = curve.thresholds(0.32, 64)  # k * 0.005: below 0.01 at k = 1 alone
    assert np.isinf(t[0]) and np.isfinite(t[1:]).all() and (np.diff(t) <= 0).all()
    assert curve.thresholds(0.5, 1)[0] < 1
