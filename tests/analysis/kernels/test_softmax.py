import numpy as np
import pytest
from numba import njit

from analysis.kernels.places import find_places
from analysis.kernels.softmax import keep

E = 40


@njit
def kept(logits, temperature, chosen):
    places = np.empty(logits.size, dtype=np.int32)
    find_places(logits.view(np.int32), places)
    top = logits[np.argmax(places)]
    mantissas = np.empty(logits.size, dtype=np.float32)
    powers = np.empty(logits.size, dtype=np.int32)
    return keep(logits, places, top, np.float32(temperature), chosen, mantissas, powers)


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
