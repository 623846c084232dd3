"""Residents: which experts a cache holds, step by step."""

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.kernels.compiled import compiled

LRU, LFU, BELADY = range(3)


@compiled
def next_steps(
    starts: NDArray[np.int64], items: NDArray[np.int64], n_items: int
) -> NDArray[np.int64]:
    """(N,): the step of each lookup's next lookup of the same item; S where there is none.

    Args:
        starts: (S + 1,), where each step's lookups start in `items`.
        items: (N,), 0..n_items - 1, each once in a step.
    """
    S = len(starts) - 1
    following = np.empty(len(items), dtype=np.int64)
    seen = np.full(n_items, S, dtype=np.int64)
    for step in range(S - 1, -1, -1):
        for i in range(starts[step], starts[step + 1]):
            following[i] = seen[items[i]]
            seen[items[i]] = step
    return following


@compiled
def count_hits(
    starts: NDArray[np.int64],
    items: NDArray[np.int64],
    phases: NDArray[np.int64],
    following: NDArray[np.int64],
    sizes: NDArray[np.int64],
    width: int,
    capacity: int,
    kind: int,
    hits: NDArray[np.int64],
) -> None:
    """Hits of caches that load what they miss, and evict after each step until the rest fits.

    The item with the least key goes first, of equal ones the lowest: LRU's key is the step of its
    last lookup, LFU's its lookups since the start and then that step, Belady's its next lookup,
    the furthest first. The step's own items go after all others: only where the step alone is
    larger than the cache.

    Args:
        starts: (S + 1,), where each step's lookups start in `items`.
        items: (N,), each once in its step; a step's are of one cache.
        phases: (S,), where each step's hits are counted.
        following: (N,), see next_steps.
        sizes: (I,) of each item.
        width: items of a cache: item i is of cache i // width.
        capacity: of each cache, in the unit of sizes.
        kind: LRU, LFU or BELADY.
        hits: (2,), added to.
    """
    S, n_items = len(starts) - 1, len(sizes)
    resident = np.zeros(n_items, dtype=np.bool_)
    key = np.zeros(n_items, dtype=np.int64)
    lookups = np.zeros(n_items, dtype=np.int64)
    last = np.full(n_items, -1, dtype=np.int64)
    used = np.zeros((n_items + width - 1) // width, dtype=np.int64)
    for step in range(S):
        if starts[step] == starts[step + 1]:
            continue
        cache = items[starts[step]] // width
        for i in range(starts[step], starts[step + 1]):
            item = items[i]
            if resident[item]:
                hits[phases[step]] += 1
            else:
                resident[item] = True
                used[cache] += sizes[item]
            last[item] = step
            lookups[item] += 1
            if kind == LRU:
                key[item] = step
            elif kind == LFU:
                key[item] = lookups[item] * (S + 1) + step
            else:
                key[item] = -following[i]
        while used[cache] > capacity:
            victim = -1
            for item in range(cache * width, min(n_items, (cache + 1) * width)):
                if not resident[item]:
                    continue
                if victim < 0:
                    victim = item
                elif (last[item] == step) != (last[victim] == step):
                    if last[victim] == step:
                        victim = item
                elif key[item] < key[victim]:
                    victim = item
            resident[victim] = False
            used[cache] -= sizes[victim]
