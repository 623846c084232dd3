"""Sorting many rows at once: a network of comparisons that are the same for every row."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.kernels.compiled import inlined

WIDTH = 32  # rows side by side


@cache
def network(n: int) -> NDArray[np.int64]:
    """(C, 2): places to compare and swap, one pair after the other, which sort any n values.

    Reference:
        Batcher (1968), Sorting networks and their applications, AFIPS Spring Joint Computer
        Conference: odd-even merge sort; pairs that reach beyond n compare with nothing.
    """
    pairs = []
    size = 1
    while size < n:
        step = size
        while step:
            for start in range(step % size, n - step, 2 * step):
                for low in range(start, min(start + step, n - step)):
                    if low // (2 * size) == (low + step) // (2 * size):
                        pairs.append((low, low + step))
            step //= 2
        size *= 2
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


@inlined
def sort_columns(columns: NDArray[np.int32], pairs: NDArray[np.int64]) -> None:
    """Sort each column of (E, WIDTH) so that it falls.

    Args:
        pairs: network(E).
    """
    for i in range(len(pairs)):
        first = np.uint64(pairs[i, 0])
        second = np.uint64(pairs[i, 1])
        for row in range(np.uint64(WIDTH)):
            a = columns[first, row]
            b = columns[second, row]
            columns[first, row] = a if a > b else b
            columns[second, row] = b if a > b else a
