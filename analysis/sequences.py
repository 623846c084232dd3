"""Sequences: exact sums of values over each sequence of a log, and the standard errors they give.

Tokens of one text are alike, so a mean over them is less sure than their number says. What counts
is how much it differs from sequence to sequence: the ratio estimator, clustered by sequence.
"""

from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.fold import mix
from bhlog.capture.contract.arrays import values_of

ONE = 1 << 32  # of the fixed point that shares are summed in: whole numbers add up in any order
MOST = 1024  # sums that are held; of more sequences, each sum is over several whole ones
COLUMNS = ("rank", "sequence")


class SequenceSums:
    """Sums of `width` whole numbers over each sequence, in each of `tables`.

    Beyond MOST sequences they are put into MOST groups by a hash of (rank, sequence): memory stays
    flat, and groups of whole sequences are as independent as these are. All sums are exact, so they
    are the same however a log is split.

    Attributes:
        sums: (tables, slots, width) int64, slots from slots(); those not used are 0.
    """

    def __init__(self, tables: int, width: int) -> None:
        self._slots: dict[int, int] = {}
        self._grouped = False
        self.sums = np.zeros((tables, 0, width), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._slots)

    def slots(self, batch: pa.RecordBatch) -> NDArray[np.int64]:
        """(T,) int64: where the sums of each row's sequence are; `sums` has room for them.

        Args:
            batch: with the columns rank and sequence.
        """
        rank, sequence = (values_of(batch.column(name)) for name in COLUMNS)
        keys = (rank.astype(np.int64) << 32) | sequence
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        lengths = np.diff(starts, append=len(keys))
        return np.repeat(self._find(keys[starts]), lengths)

    def merge(self, other: Self) -> None:
        """Add the sums of another."""
        if other._grouped:
            self._group()
        keys = np.fromiter(other._slots, dtype=np.int64, count=len(other))
        found = self._find(keys, grouped=other._grouped)
        for mine, theirs in zip(self.sums, other.sums, strict=True):
            np.add.at(mine, found, theirs[: len(other)])

    def table(self, i: int) -> NDArray[np.int64]:
        """(G, width) int64: the sums of one table, in the order of (rank, sequence)."""
        order = [self._slots[key] for key in sorted(self._slots)]
        table: NDArray[np.int64] = self.sums[i, order]
        return table

    def _find(self, keys: NDArray[np.int64], *, grouped: bool = False) -> NDArray[np.int64]:
        """Slots of keys, which are groups already or (rank << 32 | sequence)."""
        if self._grouped and not grouped:
            keys = _groups(keys)
        new = set(keys.tolist()) - self._slots.keys()
        for key in sorted(new):
            self._slots[key] = len(self._slots)
        if len(self) > MOST:
            self._group()
            return self._find(keys)
        room = self.sums.shape[1]
        if len(self) > room:
            tables, _, width = self.sums.shape
            wider = np.zeros((tables, max(8, 2 * room, len(self)), width), dtype=np.int64)
            wider[:, :room] = self.sums
            self.sums = wider
        return np.array([self._slots[key] for key in keys.tolist()], dtype=np.int64)

    def _group(self) -> None:
        """Put sequences into groups."""
        if self._grouped:
            return
        held = np.fromiter(self._slots, dtype=np.int64, count=len(self))
        sums, self._slots, self._grouped = self.sums, {}, True
        self.sums = np.zeros_like(sums[:, :0])
        found = self._find(held)
        n = sums.shape[1]  # keys that came last may have no sums yet
        for new, old in zip(self.sums, sums, strict=True):
            np.add.at(new, found[:n], old[: len(found)])


def _groups(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    mixed = mix(keys >> 32, keys & 0xFFFFFFFF)
    return (mixed % np.uint64(MOST)).astype(np.int64)


def ratio_se(y: NDArray[Any], x: NDArray[Any]) -> float | None:
    """Standard error of sum(y) / sum(x), clustered; None for one cluster, which tells nothing.

    Args:
        y, x: (G,), sums over each cluster.

    Reference:
        Cochran (1977), Sampling Techniques, section 6.3: the ratio estimator, linearized.
    """
    x = np.asarray(x, dtype=np.float64)
    seen = x > 0
    total = x.sum()
    G = int(seen.sum())
    if G < 2:
        return None
    y = np.asarray(y, dtype=np.float64)
    residuals = (y - y.sum() / total * x)[seen]
    return float(np.sqrt(G / (G - 1) * (residuals @ residuals)) / total)


def scaled(error: float | None, by: float) -> float | None:
    """The standard error of a multiple."""
    return None if error is None else error * by
