"""Counts of rows by rank and critical alpha: what holds of them, and what they say."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import CorruptProfile

Counts = Mapping[int, NDArray[np.int64]]


def check_counts(
    counts: Counts, shape: tuple[int, int], kept: Counts | None, noise: Counts | None
) -> None:
    """Hold counts by layer, and what stands beside them, against their invariants.

    Args:
        shape: of each, (E, J + 1).

    Raises:
        CorruptProfile: they break one.
    """
    for layer, of_layer in counts.items():
        if of_layer.ndim != 2 or of_layer.shape != shape:
            raise CorruptProfile(
                f"layer {layer}: counts have the shape {of_layer.shape}, expected {shape}"
            )
        if of_layer.min(initial=0) < 0 or np.ptp(of_layer.sum(axis=1)):
            raise CorruptProfile(
                f"layer {layer}: counts must be at least 0, with the same sum at each rank"
            )
        if np.diff(np.cumsum(of_layer, axis=1), axis=0).max(initial=0) > 0:
            raise CorruptProfile(f"layer {layer}: a rank is selected before the one below it")
        beside = of_layer if kept is None else kept.get(layer, of_layer[:0])
        if beside.shape != shape or beside.min() < 0:
            raise CorruptProfile(f"layer {layer}: probability kept does not fit the counts")
        beside = of_layer if noise is None else noise.get(layer, of_layer[:0])
        if beside.shape != shape or beside.min() < 0 or np.ptp(beside.sum(axis=1)):
            raise CorruptProfile(f"layer {layer}: the noise does not fit the counts")


def mean_and_error(
    counts: NDArray[np.int64], place: int, min_k: int, max_k: int
) -> tuple[float, float]:
    """Mean n_selected of independent rows at the alpha of a place, and its standard error.

    Args:
        counts: (E, J + 1), of one layer.
    """
    rows = max(1, int(counts[0].sum()))
    reached = counts[min_k:max_k, : place + 1].sum(axis=1) / rows  # rows with n above min_k, ...
    mean = float(min_k + reached.sum())
    square = float(min_k**2 + (2 * np.arange(min_k + 1, max_k + 1) - 1) @ reached)
    return mean, float(np.sqrt(max(0.0, square - mean**2) / rows))


def sum_of(a: Counts, b: Counts) -> dict[int, NDArray[np.int64]]:
    """Counts of both, by layer, rising."""
    return {
        i: a[i] + b[i] if i in a and i in b else (a if i in a else b)[i] for i in sorted({*a, *b})
    }
