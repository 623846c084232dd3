"""Touched: how many different experts the tokens of a forward choose together, layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.capture.contract.arrays import values_of

MOST = 4096  # forwards of a layer that are held at a time
FORWARD = ("forward", "rank")

Held = tuple[NDArray[np.int64], NDArray[np.unsignedinteger]]  # (N,) numbers, (P, N, W) bits


def forward_numbers(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """(T,) which forward of which rank each row is of: rank << 32 | forward."""
    forward, rank = (values_of(batch.column(name)).astype(np.int64) for name in FORWARD)
    return np.asarray(rank << 32 | forward)


def stretches(batch: pa.RecordBatch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(T,) which stretch of rows of one forward each row is in, and (N,) the stretches' numbers."""
    numbers = forward_numbers(batch)
    begins = np.append(True, numbers[1:] != numbers[:-1])
    return np.cumsum(begins) - 1, numbers[begins]


def merged(parts: Sequence[Held]) -> Held:
    """What several parts hold, each number once, in order."""
    numbers = np.concatenate([numbers for numbers, _ in parts])
    bits = np.concatenate([bits for _, bits in parts], axis=1)
    if (numbers[1:] < numbers[:-1]).any():
        order = np.argsort(numbers, kind="stable")
        numbers, bits = numbers[order], bits[:, order]
    begins = np.append(True, numbers[1:] != numbers[:-1])
    again = np.flatnonzero(~begins)  # few of them, in a log in order
    found, places = bits[:, begins], np.cumsum(begins)[again] - 1
    for of_policy, more in zip(found, bits[:, again], strict=True):
        np.bitwise_or.at(of_policy, places, more)
    return numbers[begins], found


class TouchedExperts:
    """Experts that each forward touched at one layer under P policies: a mean over forwards.

    A forward is held as a bit an expert, since its rows may go on in another part of the log. Past
    MOST forwards all but the first and the last are counted and closed: in a log in order of (rank,
    forward), as capture writes it, no row comes back to them. In a log that is not, as other
    tools may write it, one could, and nothing is told of more than MOST. Order and number are
    those of the log, and counts are whole, so the answer is the same however a log is split.

    Attributes:
        span: the first and the last forward, in the order of the log.
        totals: (P + 1,) int64, different experts summed over closed forwards, and their number.
    """

    def __init__(self, policies: int) -> None:
        self.held: list[Held] = []
        self.totals = np.zeros(policies + 1, dtype=np.int64)
        self.span: tuple[int, int] | None = None
        self.in_order, self.lost = True, False

    def add(self, numbers: NDArray[np.int64], touched: NDArray[np.bool_]) -> None:
        """Count stretches of rows.

        Args:
            numbers: (N,), N > 0, see forward_numbers.
            touched: (P, N, 64 W), which experts their rows chose; from E on False.
        """
        part = type(self)(len(touched))
        part.held = [(numbers, np.packbits(touched, axis=2).view(np.uint64))]
        part.span = int(numbers[0]), int(numbers[-1])
        part.in_order = bool((numbers[1:] >= numbers[:-1]).all())
        self.merge(part)

    def merge(self, other: Self) -> None:
        """Add what another saw later in the log."""
        if other.span is None:
            return
        first, last = self.span or (other.span[0], other.span[0])
        self.in_order &= other.in_order and last <= other.span[0]
        self.span = first, other.span[1]
        self.held += other.held
        self.totals += other.totals
        self.lost |= other.lost or (self.totals[-1] > 0 and not self.in_order)
        if sum(len(numbers) for numbers, _ in self.held) > MOST:
            numbers, bits = merged(self.held)
            self.held = [(numbers, bits)]
            if len(numbers) > MOST:
                self.lost |= not self.in_order
                self.totals += _counted(numbers[1:-1], bits[:, 1:-1])
                self.held = [(numbers[[0, -1]], bits[:, [0, -1]])]

    def count(self) -> NDArray[np.float64]:
        """`totals` of all forwards; NaN where they cannot be told."""
        if self.lost:
            return np.full(len(self.totals), np.nan)
        return (self.totals + _counted(*merged(self.held))).astype(np.float64)


def mean_distinct(layers: Mapping[int, TouchedExperts]) -> list[list[float | None]]:
    """Mean different experts of a forward, by policy: for each layer in order, then over all.

    None where it cannot be told.
    """
    counts = np.array([layers[layer].count() for layer in sorted(layers)])
    counts = np.vstack([counts, counts.sum(axis=0)])
    return [
        [None if np.isnan(mean) else float(mean) for mean in means]
        for means in (counts[:, :-1] / counts[:, -1:]).T
    ]


def _counted(numbers: NDArray[np.int64], bits: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    """(P + 1,): different experts of each policy summed over forwards, and how many these are."""
    return np.append(np.bitwise_count(bits).sum(axis=(1, 2), dtype=np.int64), len(numbers))
