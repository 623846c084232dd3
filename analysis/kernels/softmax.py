"""Softmax of a row of logits."""

import numpy as np
from numpy import float32, int32
from numpy.typing import NDArray

from analysis.kernels.compiled import inlined
from analysis.kernels.places import NOWHERE

LOG2_E = float32(1.4426950408889634)
_LEAST = float32(-126)  # exponent of the smallest normal float32


@inlined
def exponential(z: float32) -> tuple[float32, int32]:
    """2^z of a float32 up to 0, as a mantissa and the bits of a power of two; to about 5e-7.

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
    return m, int32(int32(i + int32(127)) << int32(23))


@inlined
def keep(
    logits: NDArray[np.float32],
    places: NDArray[np.int32],
    top: float32,
    temperature: float32,
    chosen: NDArray[np.int32],
    mantissas: NDArray[np.float32],
    powers: NDArray[np.int32],
) -> float32:
    """softmax(logits / temperature) summed over the chosen experts, in float32, to about 1e-6.

    Logits that are not finite have no probability.

    Args:
        logits, places: (E,).
        top: the largest finite logit.
        temperature: above 0.
        chosen: (E,) 1 or 0.
        mantissas, powers: (E,), overwritten; see exponential.
    """
    scale = LOG2_E / temperature
    for expert in range(mantissas.size):
        mantissa, power = exponential((logits[expert] - top) * scale)
        mantissas[expert] = mantissa if places[expert] > int32(NOWHERE) else float32(0)
        powers[expert] = power
    two_to_i = powers.view(np.float32)
    total = float32(0)
    kept = float32(0)
    for expert in range(mantissas.size):
        weight = mantissas[expert] * two_to_i[expert]
        total += weight
        kept += weight if chosen[expert] != int32(0) else float32(0)
    return kept / total
