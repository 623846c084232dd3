"""Choice: the decision rule over rows of logits, without sorting them."""

import numpy as np
from numpy import int32
from numpy.typing import NDArray

from bhlog.analysis.kernels.compiled import compiled, inlined
from bhlog.analysis.kernels.places import NOWHERE, find_places, largest, reaching


@compiled
def step_up(
    logits: NDArray[np.float32],
    thresholds: NDArray[np.int32],
    min_k: int,
    max_k: int,
    logged_starts: NDArray[np.int32],
    n_rejected: NDArray[np.int64],
    n_selected: NDArray[np.int64],
    cuts: NDArray[np.int32],
    undecided: NDArray[np.bool_],
) -> None:
    """Raw BH counts: the largest k such that k experts of a row reach t_k; 0 if there is none.

    If only c < k experts reach t_k, no rank from c + 1 to k passes, since fewer reach theirs. So
    the search goes from k = E to c, until k stands.

    Args:
        logits: (T, E).
        thresholds: (E,) places of t_1..t_E, falling.
        min_k, max_k: bounds of n_selected.
        logged_starts: (T + 1,), their differences are n_selected where no logit is finite.
        n_rejected, n_selected: (T,), written.
        cuts: (T,), written: the place that the n_rejected experts reach and no others do, NOWHERE
            for none.
        undecided: (T,), written: whether no logit is finite.
    """
    T, E = logits.shape
    bits = logits.view(np.int32)
    places = np.empty(E, dtype=np.int32)
    for row in range(T):
        find_places(bits[row], places)
        k = E
        while k > 0:
            count = reaching(places, thresholds[k - 1])
            if count >= k:
                break
            k = count
        n_rejected[row] = k
        n_selected[row] = min(max(k, min_k), max_k)
        cuts[row] = thresholds[k - 1] if k > 0 else int32(NOWHERE)
        undecided[row] = k == 0 and largest(places) == NOWHERE
        if undecided[row]:
            n_selected[row] = logged_starts[row + 1] - logged_starts[row]


@compiled
def choose_rows(
    logits: NDArray[np.float32],
    n_selected: NDArray[np.int64],
    cuts: NDArray[np.int32],
    chosen: NDArray[np.bool_],
) -> None:
    """The first n_selected experts of each row; see choose.

    Args:
        logits: (T, E).
        n_selected, cuts: (T,).
        chosen: (T, E), written.
    """
    T, E = logits.shape
    bits = logits.view(np.int32)
    places = np.empty(E, dtype=np.int32)
    for row in range(T):
        find_places(bits[row], places)
        choose(places, largest(places), n_selected[row], cuts[row], chosen[row])


@inlined
def choose(
    places: NDArray[np.int32], top: int32, n: int, guess: int32, chosen: NDArray[np.generic]
) -> None:
    """The first n experts of a row by falling place, ties to the lower index.

    Args:
        places: (E,).
        top: the largest of them.
        guess: where to look first for a place that just n of them reach.
        chosen: (E,) of any dtype, written.
    """
    cut = top if n == 1 else guess
    count = fill(places, cut, chosen)
    if count != n and n > 0:
        cut = find_cut(places, top, n)
        count = fill(places, cut, chosen)
    if n == 0:
        chosen[:] = 0
        count = int32(0)
    expert = places.size
    while count > n:  # of experts with equal logits, the last ones go
        expert -= 1
        if places[expert] == cut:
            chosen[expert] = 0
            count = int32(count - int32(1))


@inlined
def fill(places: NDArray[np.int32], cut: int32, chosen: NDArray[np.generic]) -> int32:
    """Choose the experts that reach a place, and count them."""
    count = int32(0)
    for expert in range(places.size):
        reaches = int32(places[expert] >= cut)
        chosen[expert] = reaches
        count = int32(count + reaches)
    return count


@compiled
def find_cut(places: NDArray[np.int32], top: int32, n: int) -> int32:
    """The largest place that at least n of a row reach, or any other that exactly n reach."""
    low, high = np.int64(NOWHERE), np.int64(top) + 1  # n reach low, fewer reach high
    while high - low > 1:
        middle = (low + high) >> 1
        count = reaching(places, int32(middle))
        if count == n:
            return int32(middle)
        if count > n:
            low = middle
        else:
            high = middle
    return int32(low)
