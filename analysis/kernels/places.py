"""Places: integers in the order of float32 logits, which compiled loops compare eight at a time."""

import numpy as np
from numpy import float32, int32
from numpy.typing import NDArray

from bhlog.analysis.kernels.compiled import inlined
from bhlog.capture.contract.null.curve import float32_places

NOWHERE = np.iinfo(np.int32).min  # place of what is not finite: below all others
_MAGNITUDE = 0x7FFFFFFF
INFINITY = 0x7F800000  # its place


def threshold_places(thresholds: NDArray[np.float32]) -> NDArray[np.int32]:
    """int32 places of thresholds, in their shape: finite logits compare with both alike.

    Infinity is beyond all finite values.
    """
    return float32_places(np.ascontiguousarray(thresholds, dtype=np.float32))


@inlined
def find_places(bits: NDArray[np.int32], places: NDArray[np.int32]) -> None:
    """Places of a row of logits; NaN and infinities are NOWHERE, so that they rank last.

    Args:
        bits: (E,) logits, float32 seen as int32.
        places: (E,), written.
    """
    for expert in range(places.size):
        magnitude = int32(bits[expert] & int32(_MAGNITUDE))
        sign = int32(bits[expert] >> int32(31))  # 0 or -1
        place = int32(int32(magnitude ^ sign) - sign)
        places[expert] = place if magnitude < int32(INFINITY) else int32(NOWHERE)


@inlined
def value_at(place: int32) -> float32:
    """The float32 value at a place."""
    bits = place if place >= int32(0) else int32(int32(-place) | int32(NOWHERE))
    value: float32 = int32(bits).view(np.float32)
    return value


@inlined
def reaching(places: NDArray[np.int32], place: int32) -> int32:
    """How many of a row's places are at least this one."""
    if places.size == 64:  # a loop of known length runs twice as fast
        return _reaching(places, place, 64)
    return _reaching(places, place, places.size)


@inlined
def _reaching(places: NDArray[np.int32], place: int32, size: int) -> int32:
    count = int32(0)
    for expert in range(size):
        count = int32(count + int32(places[expert] >= place))
    return count


@inlined
def largest(places: NDArray[np.int32]) -> int32:
    """The largest of a row's places."""
    most: int32 = places[0]
    for expert in range(1, places.size):
        most = max(most, places[expert])
    return most
