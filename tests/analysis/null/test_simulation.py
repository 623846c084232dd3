import numpy as np
import pytest
from scipy.stats import norm

from bhlog.analysis.null.simulation import Planted, _rates, simulate
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.curve import NullCurve
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.null.model import KdeModel
from tests.synthetic import normal_kde

E = 64


def fitted(trim_high):
    """A model of one layer, fitted from normal noise."""
    options = FitOptions(trim_high=trim_high)
    counting = options.accumulator()
    noise = np.random.default_rng(1).normal(size=(4000, E)).astype(np.float32)
    counting.update(0, noise)
    return KdeModel.fit(counting.histograms(), options, source=["noise"], n_experts=E)


def normal():
    grid = np.arange(-10, 10, 2.0**-8)
    curve = NullCurve(expert=None, n=0, x0=-10.0, dx=2.0**-8, tail=norm.sf(grid))
    return KdeModel({0: LayerNull(0, (curve,))})


def test_under_the_true_null_the_rate_is_alpha_times_the_share_of_noise():
    frame = simulate(normal(), [0.05, 0.3], E, Planted(rows=4000))
    assert frame["null"].to_list() == ["as it is"] * 2  # an imported model is not fitted again
    for alpha, fdr, se in frame.select("alpha", "fdr", "fdr_se").iter_rows():
        assert fdr == pytest.approx(alpha * (E - 8) / E, abs=4 * se)
        assert 0 < se < 0.01


def test_a_null_trimmed_of_signals_and_noise_alike_does_not_hold_alpha():
    frame = simulate(fitted(8), [0.05], E, Planted(rows=2000))
    rates = dict(frame.select("null", "fdr").iter_rows())
    assert rates["as it is"] < 0.05 < 0.15 < rates["fitted again"]
    powers = dict(frame.select("null", "power").iter_rows())
    assert powers["fitted again"] > powers["as it is"]


def test_in_noise_alone_every_rejection_is_false_and_there_is_no_power():
    frame = simulate(fitted(0), [0.3], E, Planted(signals=0, rows=500))
    assert frame["power"].is_null().all() and frame["power_se"].is_null().all()
    assert (frame["experts"] < 1).all()


def test_rates_are_those_of_counting_row_by_row():
    rng = np.random.default_rng(0)
    rejected, signal = rng.random((50, 9)) < 0.3, rng.random((50, 9)).argsort(axis=1) < 2
    rejected[3] = False
    false, power = [], []
    for found, planted in zip(rejected, signal, strict=True):
        n = sum(found)
        false.append(sum(f and not s for f, s in zip(found, planted, strict=True)) / n if n else 0)
        power.append(sum(f and s for f, s in zip(found, planted, strict=True)) / 2)
    rates = _rates(rejected, signal)
    assert rates["fdr"] == pytest.approx(np.mean(false))
    assert rates["power"] == pytest.approx(np.mean(power))
    assert rates["power_se"] == pytest.approx(np.std(power, ddof=1) / np.sqrt(50))
    assert rates["experts"] == pytest.approx(rejected.sum() / 50)


def test_experts_with_curves_of_their_own_draw_from_them():
    options = FitOptions(null="expert")
    counting = options.accumulator()
    noise = np.random.default_rng(1).normal(size=(3000, 4)).astype(np.float32)
    counting.update(0, noise * np.array([1, 2, 3, 4], np.float32))
    model = KdeModel.fit(counting.histograms(), options, source=["noise"])
    frame = simulate(model, [0.2], 4, Planted(signals=1, shift=4.0, rows=1500))
    rate = frame.filter(frame["null"] == "as it is")["fdr"][0]
    assert rate == pytest.approx(0.2 * 3 / 4, abs=0.03)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ((normal(), [], E), InvalidOption, "name alphas"),
        ((normal(), [1.0], E), InvalidOption, "name alphas"),
        ((normal(), [0.1], E, Planted(signals=65)), InvalidOption, "from 0 to 64"),
        ((normal(), [0.1], E, Planted(shift=float("nan"))), InvalidOption, "a number"),
        ((normal(), [0.1], E, Planted(rows=1)), InvalidOption, "at least 2 rows"),
        ((fitted(0), [0.1], 32), KdeMismatch, "routers of 64 experts"),
    ],
)
def test_what_cannot_be_simulated_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        simulate(*arguments)


def test_the_same_seed_draws_the_same():
    first, again = (simulate(normal_kde([0]), [0.1], 16, Planted(rows=50)) for _ in range(2))
    assert first.equals(again)
    assert not first.equals(simulate(normal_kde([0]), [0.1], 16, Planted(rows=50, seed=1)))
