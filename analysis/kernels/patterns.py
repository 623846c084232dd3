"""Patterns: how often each bfloat16 value occurs among logits."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.kernels.compiled import compiled

_STRETCH = 1 << 18  # values that are counted, or not, together


def count_patterns(
    values: NDArray[np.float32], times: NDArray[np.int64]
) -> Iterator[NDArray[np.float32]]:
    """As bhlog.capture.contract.null.histogram.count_patterns, without the interpreter lock."""
    values = values.reshape(-1)
    for start in range(0, len(values), _STRETCH):
        stretch = values[start : start + _STRETCH]
        if not _count(stretch.view(np.uint32), times):
            yield stretch


@compiled
def _count(bits: NDArray[np.uint32], times: NDArray[np.int64]) -> bool:
    """Count float32 values by the first half of their bits, if the second is 0 in all of them.

    Args:
        bits: (N,) values seen as uint32.
        times: (2^16,), added to.

    Returns:
        Whether they were counted.
    """
    low = np.uint32(0)
    for i in range(bits.size):
        low |= bits[i] & np.uint32(0xFFFF)
        times[bits[i] >> np.uint32(16)] += 1
    if low:
        for i in range(bits.size):
            times[bits[i] >> np.uint32(16)] -= 1
    return not low
