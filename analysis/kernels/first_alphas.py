"""Critical alphas of rows: at which alpha of a grid each rank is first selected, counted."""

import numpy as np
from numpy import float32
from numpy.typing import NDArray

from bhlog.analysis.kernels.compiled import compiled, compiled_sums, inlined
from bhlog.analysis.kernels.places import NOWHERE, find_places, largest, value_at
from bhlog.analysis.kernels.softmax import LOG2_E, weigh
from bhlog.analysis.kernels.sorting import WIDTH, sort_columns

BUCKETS = 1 << 12  # of a rank's guide
_HELD = 1 << 16  # logits that are sorted before they are counted


@inlined
def bucket(value: float32, low: float32, per_logit: float32) -> int:
    """Which even piece of a rank's thresholds a logit lies in; it never falls as logits rise."""
    place = (value - low) * per_logit
    place = place if place > float32(0) else float32(0)
    place = place if place < float32(BUCKETS - 1) else float32(BUCKETS - 1)
    return int(place)


@compiled
def make_guide(
    thresholds: NDArray[np.float32],
    low: float32,
    per_logit: float32,
    guide: NDArray[np.uint16],
) -> None:
    """For each bucket the first place of the grid whose threshold a logit in it may reach.

    Args:
        thresholds: (J,) of one rank, falling.
        low, per_logit: see bucket.
        guide: (BUCKETS,), written.
    """
    guide[:] = thresholds.size
    for j in range(thresholds.size - 1, -1, -1):
        guide[bucket(thresholds[j], low, per_logit)] = j
    for i in range(1, BUCKETS):
        guide[i] = min(guide[i], guide[i - 1])


@compiled_sums
def count_critical(
    logits: NDArray[np.float32],
    thresholds: NDArray[np.int32],
    guides: NDArray[np.uint16],
    lows: NDArray[np.float32],
    per_logit: NDArray[np.float32],
    pairs: NDArray[np.int64],
    steps: NDArray[np.int64],
    one: float,
    kept: NDArray[np.int64],
) -> None:
    """Count rows by rank and critical alpha; those without a finite logit are left out.

    Args:
        logits: (T, E).
        thresholds: (E, J + 1) places of t_k, falling along both; the first column is beyond all
            logits, column j + 1 belongs to place j of the grid.
        guides: (E, BUCKETS), see make_guide.
        lows, per_logit: (E,), see bucket.
        pairs: network(E).
        steps: (E, J + 1), added to: rows by rank and place, less those of the next rank.
        one: unit of `kept`.
        kept: (E, J + 1), added to: softmax of the logits by rank and place; (0, J + 1) means
            not to.
    """
    T, E = logits.shape
    bits = logits.view(np.int32)
    places = np.empty(E, dtype=np.int32)
    tiles = max(1, _HELD // (E * WIDTH))
    columns = np.empty((tiles, E, WIDTH), dtype=np.int32)
    filled = 0
    for row in range(T):
        find_places(bits[row], places)
        if largest(places) != NOWHERE:
            tile, column = filled // WIDTH, filled % WIDTH
            for expert in range(E):
                columns[tile, expert, column] = places[expert]
            filled += 1
        if filled == tiles * WIDTH or (row == T - 1 and filled > 0):
            for column in range(filled % WIDTH, WIDTH if filled % WIDTH else 0):
                columns[filled // WIDTH, :, column] = NOWHERE
            for tile in range(-(-filled // WIDTH)):
                sort_columns(columns[tile], pairs)
            _count(columns, filled, thresholds, guides, lows, per_logit, steps, one, kept)
            filled = 0


@compiled
def _count(
    columns: NDArray[np.int32],
    filled: int,
    thresholds: NDArray[np.int32],
    guides: NDArray[np.uint16],
    lows: NDArray[np.float32],
    per_logit: NDArray[np.float32],
    steps: NDArray[np.int64],
    one: float,
    kept: NDArray[np.int64],
) -> None:
    """Count the first `filled` of sorted columns, rank by rank, so that what a rank needs is near.

    Args:
        columns: (tiles, E, WIDTH).
    """
    E = columns.shape[1]
    none = np.uint32(thresholds.shape[1] - 1)
    critical = np.full(columns.shape[0] * WIDTH, none, dtype=np.uint32)  # of the next rank
    weights = np.empty(columns.shape if len(kept) else (0, 0, 0), dtype=np.float32)
    for tile in range(len(weights)):
        _probabilities(columns[tile], weights[tile], one)
    lower = np.empty(columns.shape[0] * WIDTH, dtype=np.int32)
    for k in range(E - 1, -1, -1):
        n = 0  # rows in which k is selected at a lower alpha than the next rank
        at = thresholds[k]
        for tile in range(-(-filled // WIDTH)):
            ranked = columns[tile, k]
            for column in range(WIDTH):
                row = tile * WIDTH + column
                lower[n] = row
                n += ranked[column] >= at[critical[row]]
        for i in range(n):
            row = lower[i]
            place = columns[row // WIDTH, k, row % WIDTH]
            j = int(guides[k, bucket(value_at(place), lows[k], per_logit[k])])
            j += place < at[j + 1]  # most often that is all, and no branch to guess
            while place < at[j + 1]:
                j += 1
            if k < E - 1:
                steps[k, j] += 1
                steps[k, critical[row]] -= 1
            critical[row] = np.uint32(j)
        if k == E - 1:
            for row in range(filled):
                steps[k, critical[row]] += 1
        if len(kept):
            for row in range(filled):
                weight = weights[row // WIDTH, k, row % WIDTH]
                kept[k, critical[row]] += np.int64(weight + 0.5)


@compiled_sums
def _probabilities(columns: NDArray[np.int32], weights: NDArray[np.float32], one: float) -> None:
    """(E, WIDTH): the softmax of each sorted column, times `one`."""
    E = columns.shape[0]
    total = np.zeros(WIDTH, dtype=np.float32)
    for k in range(E):
        for row in range(WIDTH):
            place, top = columns[k, row], columns[0, row]
            weights[k, row] = weigh(value_at(place), place, value_at(top), LOG2_E)
            total[row] += weights[k, row]
    for k in range(E):
        for row in range(WIDTH):
            weights[k, row] *= float32(one) / total[row]
