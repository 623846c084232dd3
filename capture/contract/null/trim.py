"""Trimming: which logits of a row a null model leaves out."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import InvalidOption


class Trim(NamedTuple):
    """How many logits of each row are left out: its `low` smallest and its `high` largest.

    Rows are ordered as the decision rule orders them: by falling logit, a tie by rising expert.
    """

    low: int = 0
    high: int = 0

    def check(self, n_experts: int) -> None:
        """Raise InvalidOption unless it leaves at least one of n_experts logits of a row."""
        if self.low < 0 or self.high < 0:
            raise InvalidOption(
                f"trim_low and trim_high must be at least 0, got {self.low} and {self.high}"
            )
        if self.low + self.high >= n_experts:
            raise InvalidOption(
                f"trim_low {self.low} and trim_high {self.high} leave nothing of rows of "
                f"{n_experts} experts"
            )


def kept(logits: NDArray[np.float32], trim: Trim) -> NDArray[np.bool_] | None:
    """(T, E) bool: what a trimming level keeps of each row; None for everything.

    Non-finite logits are kept, so that the histogram counts them as left out, and rank nowhere.
    """
    if trim == Trim():
        return None
    E = logits.shape[1]
    padded = np.full((len(logits), E + 2), np.inf, dtype=np.float32)
    padded[:, 0] = -np.inf
    padded[:, 1:-1] = logits
    padded[:, 1:-1].sort(axis=1)
    low, high = trim.low, E - trim.high
    last_below, first_above = padded[:, low], padded[:, high + 1]
    inside: NDArray[np.bool_] = (logits > last_below[:, None]) & (logits < first_above[:, None])
    # A value that repeats across a cut, and non-finite logits, need the order of the experts.
    unclear = (last_below == padded[:, low + 1]) | (padded[:, high] == first_above)
    unclear |= ~np.isfinite(logits).all(axis=1)
    inside[unclear] = _kept_by_order(logits[unclear], trim)
    return inside


def _kept_by_order(logits: NDArray[np.float32], trim: Trim) -> NDArray[np.bool_]:
    """As kept, from the ranks of the decision rule."""
    finite = np.isfinite(logits)
    falling = np.argsort(np.where(finite, -logits, np.float32(np.inf)), axis=1, kind="stable")
    rank = np.empty(logits.shape, dtype=np.int64)
    np.put_along_axis(rank, falling, np.arange(logits.shape[1])[None, :], axis=1)
    n_finite = np.count_nonzero(finite, axis=1)[:, None]
    inside: NDArray[np.bool_] = (rank >= trim.high) & (rank < n_finite - trim.low)
    return inside | ~finite
