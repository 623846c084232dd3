"""The alphas of a profile."""

import numpy as np
from numpy.typing import NDArray

# 200 alphas a decade below 0.01, then steps of 0.001: the resolution of alpha_for
GRID = tuple(
    sorted({*np.geomspace(1e-6, 1e-2, 801).round(9).tolist(), *(i / 1000 for i in range(10, 1000))})
)
_ROUND = (0.001, 0.002, 0.005, 0.01, 0.02, *(i / 20 for i in range(1, 20)))
MOST_CELLS = 1 << 25  # counts of a profile in all its layers: 256 MiB


def grid_for(n_layers: int, n_experts: int) -> tuple[float, ...]:
    """GRID; or, where a profile of this shape would not hold it in MOST_CELLS, every m-th alpha of
    it, and the round ones that people ask for."""
    every = -(-n_layers * n_experts * (len(GRID) + 1) // MOST_CELLS)
    return GRID if every <= 1 else tuple(sorted({*GRID[::every], *_ROUND}))


def rising(alphas: NDArray[np.float64]) -> bool:
    """Whether alphas rise inside (0, 1); not if there are none, or NaN."""
    inside = len(alphas) > 0 and alphas[0] > 0 and alphas[-1] < 1
    return bool(inside and np.all(np.diff(alphas) > 0))
