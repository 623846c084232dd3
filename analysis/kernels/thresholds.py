"""Thresholds at every alpha of a grid: the numbers of NullCurve.thresholds, in one loop."""

import numpy as np
from numpy import float32, int32
from numpy.typing import NDArray

from bhlog.analysis.kernels.compiled import compiled, inlined
from bhlog.analysis.kernels.places import INFINITY, value_at


@inlined
def _place(value: float32) -> int:
    """See float32_places."""
    bits = int(value.view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF)


@inlined
def _value(place: int) -> float32:
    """The float32 at a place, infinite beyond the ends."""
    return value_at(int32(min(max(place, -INFINITY), INFINITY)))


@inlined
def _passes(
    place: int, tail: NDArray[np.float64], x0: float, dx: float, beyond: float, critical: float
) -> bool:
    """Whether the p-value of the logit at a place is at most a critical value.

    The operations and their order are those of NullCurve.p_value.
    """
    last = tail.size - 1
    u = (float(_value(place)) - x0) / dx
    if u < 0:
        return critical >= 1.0
    if u > last:
        return beyond <= critical
    cell = min(int(np.floor(u)), last - 1)
    left, right = float(tail[cell]), float(tail[cell + 1])
    return left + (u - cell) * (right - left) <= critical


@compiled
def find_thresholds(
    tail: NDArray[np.float64],
    x0: float,
    dx: float,
    beyond: float,
    alphas: NDArray[np.float64],
    thresholds: NDArray[np.float32],
) -> None:
    """Thresholds of each rank at each alpha, as NullCurve.thresholds has them, bit for bit.

    Args:
        tail, x0, dx, beyond: of the null.
        alphas: (J,), rising.
        thresholds: (E, J), written.
    """
    E = thresholds.shape[0]
    for k in range(E):
        right = tail.size  # the first node with a tail of at most the critical value
        for j in range(alphas.size):
            critical = np.float64(k + 1) * alphas[j] / E
            while right > 0 and tail[right - 1] <= critical:
                right -= 1
            t = float32(np.inf)
            if critical >= beyond:
                t = _smallest(tail, x0, dx, beyond, right, critical)
            thresholds[k, j] = t if k == 0 else min(t, thresholds[k - 1, j])


@compiled
def _smallest(
    tail: NDArray[np.float64], x0: float, dx: float, beyond: float, right: int, critical: float
) -> float32:
    """The smallest float32 with a p-value of at most a critical value.

    Args:
        right: the first node with so small a tail.
    """
    last = tail.size - 1
    inside = min(max(right, 1), last)
    above, below = float(tail[inside - 1]), float(tail[inside])
    drop = above - below if above > below else 1.0
    cell = (inside - 1) + min(max((above - critical) / drop, 0.0), 1.0)
    cell = 0.0 if right == 0 else float(last) if right > last else cell
    x = x0 + dx * cell
    high = _place(float32(x))
    high += 1 if float(_value(high)) < x else 0
    low = high - 1
    early = _passes(low, tail, x0, dx, beyond, critical)
    late = not _passes(high, tail, x0, dx, beyond, critical)
    reach = 1
    while early or late:
        low -= reach if early else 0
        high += reach if late else 0
        reach *= 2
        early = _passes(low, tail, x0, dx, beyond, critical)
        late = not _passes(high, tail, x0, dx, beyond, critical)
    while high - low > 1:
        middle = (high + low) >> 1
        if _passes(middle, tail, x0, dx, beyond, critical):
            high = middle
        else:
            low = middle
    return _value(high)
