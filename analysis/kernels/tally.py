"""Tally: what a summary counts in every row of chosen experts."""

import numpy as np
from numpy import float32, int32, int64
from numpy.typing import NDArray

from bhlog.analysis.kernels.choice import choose
from bhlog.analysis.kernels.compiled import compiled_sums, inlined
from bhlog.analysis.kernels.places import NOWHERE, find_places, largest, value_at
from bhlog.analysis.kernels.softmax import keep

NONE_REJECTED, KEPT, NATIVE_JACCARD, NATIVE_RECALL, LOGGED_JACCARD, LOGGED_RECALL, SUMS = range(7)
ROWS, EXPERTS, SQUARES, AT_MIN_K, AT_MAX_K, BY_SEQUENCE = SUMS, 7, 8, 9, 10, 11  # after these


@compiled_sums
def tally(
    logits: NDArray[np.float32],
    n_rejected: NDArray[np.int64],
    n_selected: NDArray[np.int64],
    cuts: NDArray[np.int32],
    given: NDArray[np.bool_],
    logged_starts: NDArray[np.int32],
    logged_experts: NDArray[np.uint16],
    top_k: int,
    temperature: float,
    min_k: int,
    max_k: int,
    slots: NDArray[np.int64],
    one: float,
    forwards: NDArray[np.int64],
    selected: NDArray[np.int64],
    load: NDArray[np.int64],
    sums: NDArray[np.float64],
    by_sequence: NDArray[np.int64],
    touched: NDArray[np.bool_],
) -> None:
    """Add T rows to the counts of a summary.

    A row without a finite logit has the experts that were logged, and keeps no probability.

    Args:
        logits: (T, E).
        n_rejected: (T,) raw BH counts.
        n_selected: (T,) experts of each row.
        cuts: (T,), where to look first for the place of the last one.
        given: (T, E), which experts they are; (0, E) means the first by falling logit.
        logged_starts: (T + 1,), where each row's experts start in `logged_experts`.
        logged_experts: experts that the run used, each once in its row.
        top_k: experts of the native choice.
        temperature: of the softmax.
        min_k, max_k: bounds in force.
        slots: (T,), the row's place in `by_sequence`; (0,) counts nothing there.
        one: what 1 is in its sums of shares.
        forwards: (T,), the row's place in `touched`; (0,) marks nothing there.
        selected: (E + 1,) rows by n_selected, added to.
        load: (E,) rows by chosen expert, added to.
        sums: (SUMS,) over rows, added to: whether n_rejected is 0, probability kept, Jaccard and
            recall of the choice with the native and the logged one.
        by_sequence: (G, BY_SEQUENCE), added to: the same as whole numbers, and rows, n_selected,
            its square, and whether it is min_k and max_k.
        touched: (F, E or more), set to True for each expert that a row of its forward chose.

    Raises:
        IndexError: an expert beyond E was logged, or more than E in a row.
    """
    T, E = logits.shape
    bits = logits.view(np.int32)
    places = np.empty(E, dtype=np.int32)
    chosen = np.empty(E, dtype=np.int32)
    native = np.empty(E, dtype=np.int32)
    loads = np.zeros(E, dtype=np.int32)
    for row in range(T):
        n = n_selected[row]
        logged = logged_experts[logged_starts[row] : logged_starts[row + 1]]
        if len(logged) > E:
            raise IndexError("more experts than logits")
        for expert in logged:
            if expert >= E:
                raise IndexError("an expert beyond the logits")
        find_places(bits[row], places)
        top = largest(places)
        kept = 0.0
        both = min(n, top_k)  # with the native choice, if both are the first by falling logit
        if top == NOWHERE:
            chosen[:] = 0
            for expert in logged:
                chosen[expert] = 1
        else:
            if len(given):
                choose(places, top, top_k, int32(NOWHERE), native)
                both = 0
                for expert in range(E):
                    chosen[expert] = given[row, expert]
                    both += chosen[expert] & native[expert]
            else:
                choose(places, top, n, cuts[row], chosen)
            kept = float(keep(logits[row], places, value_at(top), float32(temperature), chosen))
        selected[n] += 1
        sums[KEPT] += kept
        sums[NONE_REJECTED] += n_rejected[row] == 0
        for expert in range(E):
            loads[expert] = int32(loads[expert] + chosen[expert])
        if len(forwards):
            of_forward = touched[forwards[row]]
            for expert in range(E):
                of_forward[expert] |= chosen[expert] != 0
        jaccard, recall = overlap(both, n, top_k)
        sums[NATIVE_JACCARD] += jaccard
        sums[NATIVE_RECALL] += recall
        if len(slots):
            of_sequence = by_sequence[slots[row]]
            of_sequence[NONE_REJECTED] += n_rejected[row] == 0
            of_sequence[KEPT] += int64(kept * one)
            of_sequence[NATIVE_JACCARD] += int64(jaccard * one)
            of_sequence[NATIVE_RECALL] += int64(recall * one)
            of_sequence[ROWS] += 1
            of_sequence[EXPERTS] += n
            of_sequence[SQUARES] += n * n
            of_sequence[AT_MIN_K] += n == min_k
            of_sequence[AT_MAX_K] += n == max_k
        both = 0
        for expert in logged:
            both += chosen[expert]
        jaccard, recall = overlap(both, n, len(logged))
        sums[LOGGED_JACCARD] += jaccard
        sums[LOGGED_RECALL] += recall
        if len(slots):
            by_sequence[slots[row], LOGGED_JACCARD] += int64(jaccard * one)
            by_sequence[slots[row], LOGGED_RECALL] += int64(recall * one)
    load += loads


@inlined
def overlap(both: int, a: int, b: int) -> tuple[float, float]:
    """Jaccard and recall (the share of b that is in a) of two sets of experts.

    Two empty sets are the same, so their Jaccard is 1, and so is the recall of an empty b.

    Args:
        both: size of their intersection.
        a, b: their sizes.
    """
    union = a + b - both
    return both / union if union > 0 else 1.0, both / b if b > 0 else 1.0
