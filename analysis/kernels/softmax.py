"""Softmax of rows of logits."""

import numpy as np
from numpy import float32, int32
from numpy.typing import NDArray

from bhlog.analysis.kernels.compiled import compiled_sums, inlined
from bhlog.analysis.kernels.places import NOWHERE, find_places, largest, value_at

LOG2_E = float32(1.4426950408889634)
_LEAST = float32(-126)  # exponent of the smallest normal float32


@inlined
def exponential(z: float32) -> float32:
    """2^z of a float32 up to 0, to about 5e-7.

    It is 2^i times a polynomial in z - i, i the nearest integer: exp itself would take longer than
    all else that replay does.

    Reference:
        Moshier, Cephes mathematical library, exp2f: the coefficients.
    """
    z = z if z > _LEAST else _LEAST  # so is NaN
    z = z if z < float32(0) else float32(0)
    i = int32(z - float32(0.5))  # rounds toward 0
    f = z - float32(i)
    m = float32(1.535336188319500e-4)
    m = m * f + float32(1.339887440266574e-3)
    m = m * f + float32(9.618437357674640e-3)
    m = m * f + float32(5.550332471162809e-2)
    m = m * f + float32(2.402264791363012e-1)
    m = m * f + float32(6.931472028550421e-1)
    m = m * f + float32(1)
    two_to_i: float32 = int32(int32(i + int32(127)) << int32(23)).view(np.float32)
    return m * two_to_i


@inlined
def weigh(logit: float32, place: int32, top: float32, scale: float32) -> float32:
    """2^((logit - top) * scale), at most 1; 0 of a logit that is not finite.

    Args:
        place: of the logit.
        top: the largest finite logit of its row.
    """
    weight = exponential((logit - top) * scale)
    return weight if place > int32(NOWHERE) else float32(0)


@inlined
def keep(
    logits: NDArray[np.float32],
    places: NDArray[np.int32],
    top: float32,
    temperature: float32,
    chosen: NDArray[np.int32],
) -> float32:
    """softmax(logits / temperature) summed over the chosen experts, in float32, to about 1e-6.

    Logits that are not finite have no probability.

    Args:
        logits, places: (E,).
        top: the largest finite logit.
        temperature: above 0.
        chosen: (E,) 1 or 0.
    """
    scale = LOG2_E / temperature
    total = float32(0)
    kept = float32(0)
    for expert in range(places.size):
        weight = weigh(logits[expert], places[expert], top, scale)
        total += weight
        kept += weight if chosen[expert] != int32(0) else float32(0)
    return kept / total


@compiled_sums
def find_certainty(
    logits: NDArray[np.float32],
    entropy: NDArray[np.float64],
    top_probability: NDArray[np.float64],
) -> None:
    """Entropy of the softmax in nats, and its largest weight; NaN where no logit is finite.

    Args:
        logits: (T, E).
        entropy, top_probability: (T,), written.
    """
    T, E = logits.shape
    bits = logits.view(np.int32)
    places = np.empty(E, dtype=np.int32)
    for row in range(T):
        find_places(bits[row], places)
        top_place = largest(places)
        if top_place == int32(NOWHERE):
            entropy[row] = top_probability[row] = np.nan
            continue
        top = value_at(top_place)
        total = float32(0)
        weighed = float32(0)
        for expert in range(E):
            weight = weigh(logits[row, expert], places[expert], top, LOG2_E)
            total += weight
            below = logits[row, expert] - top
            below = below if below > float32(-200) else float32(-200)  # where the weight is 0, any
            below = below if below < float32(0) else float32(0)  # finite number serves
            weighed += weight * below
        # H = ln Z - sum(p * (x - max))
        entropy[row] = np.log(np.float64(total)) - np.float64(weighed) / np.float64(total)
        top_probability[row] = 1 / np.float64(total)
