import numpy as np
import pytest
from numba import njit
from scipy.special import softmax
from scipy.stats import entropy

from bhlog.analysis.kernels.places import find_places
from bhlog.analysis.kernels.softmax import find_certainty, keep

E = 40


@njit
def kept(logits, temperature, chosen):
    places = np.empty(logits.size, dtype=np.int32)
    find_places(logits.view(np.int32), places)
    top = logits[np.argmax(places)]
    return keep(logits, places, top, np.float32(temperature), chosen)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0, 1e4])
def test_it_is_the_softmax(temperature, scale):
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = rng.normal(0, scale, E).astype(np.float32)
        chosen = rng.integers(0, 2, E).astype(np.int32)
        chosen[np.argmax(logits)] = 1
        weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
        expected = weights[chosen == 1].sum() / weights.sum()
        # float32 differences of logits, times 1 / ln 2 / temperature, rounded
        assert kept(logits, temperature, chosen) == pytest.approx(expected, rel=1e-5)


def test_what_is_not_finite_has_no_probability():
    logits = np.array([np.nan, np.inf, 1.0, 1.0, -np.inf], dtype=np.float32)
    assert kept(logits, 1.0, np.array([1, 1, 1, 0, 1], dtype=np.int32)) == 0.5


def test_certainty_is_the_entropy_and_the_largest_weight():
    logits = np.random.default_rng(1).normal(0, 30, (50, E)).astype(np.float32)
    logits[0, :3] = np.nan, np.inf, -np.inf
    logits[1] = np.nan
    logits[2], logits[2, 7] = -3e38, 3e38
    found = np.empty((2, len(logits)))
    find_certainty(logits, *found)
    assert np.isnan(found[:, 1]).all()
    decided = np.arange(len(logits)) != 1
    finite = np.where(np.isfinite(logits), logits.astype(np.float64), -np.inf)[decided]
    weights = softmax(finite, axis=1)
    np.testing.assert_allclose(found[0, decided], entropy(weights, axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[1, decided], weights.max(axis=1), rtol=1e-5)
