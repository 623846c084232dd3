from itertools import product

import numpy as np
import pytest

from bhlog.analysis.sweep.budget import share_budget

LAYERS = np.arange(3)


def curves(rng):
    """Experts, probability kept and weights of 3 layers at 6 places; each expert keeps less."""
    experts = np.cumsum(0.1 + rng.random((3, 6)), axis=1)
    gain = -np.sort(-rng.random((3, 5)), axis=1) * np.diff(experts, axis=1)
    kept = np.concatenate([np.zeros((3, 1)), np.cumsum(gain, axis=1)], axis=1)
    return experts, kept, rng.dirichlet([2, 2, 2])


def test_no_other_places_keep_more_at_the_same_cost():
    rng = np.random.default_rng(0)
    for _ in range(40):
        experts, kept, weights = curves(rng)
        budget = rng.uniform(weights @ experts[:, 0], weights @ experts[:, -1])
        places = share_budget(experts, kept, weights, budget)
        spent = weights @ experts[LAYERS, places]
        assert spent >= budget
        for other in product(range(6), repeat=3):
            if weights @ experts[LAYERS, other] <= spent + 1e-12:
                most = weights @ kept[LAYERS, places] + 1e-12
                assert weights @ kept[LAYERS, other] <= most


def test_the_budget_is_passed_by_less_than_a_step():
    rng = np.random.default_rng(1)
    for _ in range(40):
        experts, kept, weights = curves(rng)
        kept = np.cumsum(rng.random((3, 6)), axis=1)  # gains in any order: hulls skip places
        budget = rng.uniform(weights @ experts[:, 0], weights @ experts[:, -1])
        spent = weights @ experts[LAYERS, share_budget(experts, kept, weights, budget)]
        assert budget <= spent <= budget + (np.diff(experts, axis=1) * weights[:, None]).max()


@pytest.mark.parametrize(("budget", "place"), [(0.5, 0), (1.0, 0), (3.0, 5)])
def test_the_ends_of_the_curves(budget, place):
    experts = np.tile([1.0, 1.0, 2.0, 2.0, 2.0, 3.0], (3, 1))
    kept = np.sqrt(experts)
    places = share_budget(experts, kept, np.full(3, 1 / 3), budget)
    assert places.tolist() == [place] * 3
