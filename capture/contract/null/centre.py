"""Centring: a row's logits less their median, which a shift of the row does not change.

Softmax ignores a shift of all logits of a row; a null model of the logits as they are does not.
The median is the lower of the two middle ones where their number is even, those that are not
finite left out, and one float32 subtraction a logit: every backend computes the same numbers.
Experts are ordered by their logits as they are; what is centred is held against thresholds.
"""

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.rule import finite_keys

LARGEST = np.finfo(np.float32).max


def row_medians(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(T, 1) float32: the lower median of each row's finite logits, 0 where there is none."""
    rising = np.sort(finite_keys(logits), axis=1)
    E = logits.shape[1]
    n_finite = np.count_nonzero(rising > -np.inf, axis=1)[:, None]
    middle = np.minimum(E - 1 - n_finite // 2, E - 1)  # the rest come before, as -inf
    median = np.take_along_axis(rising, middle, axis=1)
    return np.where(n_finite > 0, median, np.float32(0))


def centred(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(T, E) float32: logits less their row's median; -inf where they are not finite."""
    with np.errstate(over="ignore"):
        found: NDArray[np.float32] = np.minimum(finite_keys(logits) - row_medians(logits), LARGEST)
    return found
