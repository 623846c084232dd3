"""Budget: experts shared among layers where they keep most of the router's probability."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray


def share_budget(
    experts: NDArray[np.float64],
    kept: NDArray[np.float64],
    weights: NDArray[np.float64],
    budget: float,
) -> NDArray[np.int64]:
    """Choose a place of the grid for each layer: at least `budget` experts, most probability kept.

    Maximised is sum_l w_l kept_l with sum_l w_l experts_l >= budget. From the first places on, the
    layer whose next expert keeps most is raised (water-filling), along the upper hull of its points
    (experts, kept): where the curves are smooth, the last expert then keeps as much in every layer,
    d kept / d experts. The last layer raised stops at the first place that reaches the budget, so
    the result is the best up to that one step.

    Args:
        experts: (L, J) mean experts per token of each layer, never falling along the grid.
        kept: (L, J) mean probability kept.
        weights: (L,) share of each layer's rows, summing to 1.
        budget: experts per token over all layers, at most what the last place gives.

    Returns:
        (L,) places in the grid.
    """
    steps = []
    for layer, (m, p) in enumerate(zip(experts, kept, strict=True)):
        for start, end in pairwise(_upper_hull(m, p)):
            steps.append(((p[start] - p[end]) / (m[end] - m[start]), layer, end))
    places = np.zeros(len(experts), dtype=np.int64)
    spent = float(weights @ experts[:, 0])
    for _, layer, end in sorted(steps):
        if spent >= budget:
            break
        curve, start = experts[layer], places[layer]
        wanted = curve[start] + (budget - spent) / weights[layer]
        # rounding must not ask for a step more
        places[layer] = min(end, int(np.searchsorted(curve, wanted - 1e-9)))
        spent += float(weights[layer] * (curve[places[layer]] - curve[start]))
    return places


def _upper_hull(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[int]:
    """Indices of the corners of the upper hull of points with x never falling; the first of equal
    x alone counts."""
    hull: list[int] = []
    for i in range(len(x)):
        if hull and x[i] == x[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (x[i] - x[b]) > (y[i] - y[b]) * (x[b] - x[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
