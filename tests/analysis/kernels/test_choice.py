import numpy as np
from hypothesis import given, settings

from bhlog.analysis.kernels.choice import choose_rows
from bhlog.analysis.kernels.places import NOWHERE
from tests.analysis.replay.plain import rows_of_logits


@settings(max_examples=60, deadline=None)
@given(logits=rows_of_logits())
def test_any_number_of_experts_is_the_head_of_the_stable_order(logits):
    T, E = logits.shape
    logits = np.where(np.isfinite(logits), logits, np.float32(0.25))
    order = np.argsort(-logits, axis=1, kind="stable")
    guesses = np.full(T, NOWHERE, dtype=np.int32)
    for n in {0, 1, 2, E // 2, E - 1, E}:
        chosen = np.empty((T, E), dtype=np.bool_)
        choose_rows(logits, np.full(T, n), guesses, chosen)
        assert [set(np.flatnonzero(row)) for row in chosen] == [set(row[:n]) for row in order]


def test_a_guess_changes_nothing():
    logits = np.random.default_rng(0).integers(-3, 3, (50, 16)).astype(np.float32)
    n = np.full(50, 5)
    found = []
    for guess in (NOWHERE, -5, 0, np.float32(1).view(np.int32), np.iinfo(np.int32).max):
        chosen = np.empty((50, 16), dtype=np.bool_)
        choose_rows(logits, n, np.full(50, guess, dtype=np.int32), chosen)
        found.append(chosen)
    assert all(np.array_equal(found[0], other) for other in found)
