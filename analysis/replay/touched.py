"""Touched: how many different experts the tokens of a forward choose together, layer by layer."""

from collections.abc import Mapping
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.capture.contract.arrays import values_of

MOST = 4096  # forwards of a layer that are held at a time
FORWARD = ("forward", "rank")

Held = tuple[NDArray[np.int64], NDArray[np.uint8]]  # (N,) forwards, (P, N, E / 8) bits


def forward_numbers(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """(T,) which forward of which rank each row is of: rank << 32 | forward."""
    forward = values_of(batch.column("forward")).astype(np.int64)
    number: NDArray[np.int64] = values_of(batch.column("rank")).astype(np.int64) << 32 | forward
    return number


def stretches(batch: pa.RecordBatch) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(T,) which stretch of rows of one forward each row is in, and (N,) the stretches' numbers."""
    numbers = forward_numbers(batch)
    begins = np.append(True, numbers[1:] != numbers[:-1])
    return np.cumsum(begins) - 1, numbers[begins]


def mean_distinct(
    layers: Mapping[int, "TouchedExperts"], n_policies: int
) -> list[list[float | None]]:
    """Mean different experts of a forward, by policy: for each layer in order, then over all.

    None where it cannot be told.
    """
    totals = [layers[layer].totals() for layer in sorted(layers)]
    known = [total for total in totals if total is not None]
    every = (sum(n for n, _ in known), sum((sums for _, sums in known), np.zeros(n_policies, int)))
    totals.append(every if len(known) == len(totals) else None)
    return [
        [None if total is None else float(total[1][i] / total[0]) for total in totals]
        for i in range(n_policies)
    ]


class TouchedExperts:
    """Experts that each forward touched at one layer under P policies: a mean over forwards.

    A forward is held as a bit an expert, since its rows may go on in another part of the log. Past
    MOST forwards all but the first and the last are counted and closed: in a log in order of (rank,
    forward), as capture writes it, no row comes back to them. In a log that is not, as other
    tools may write it, one could, and nothing is told of more than MOST. Order and number are
    those of the log, and counts are whole, so the answer is the same however a log is split.

    Args:
        policies: how many.
    """

    def __init__(self, policies: int) -> None:
        self.held: list[Held] = []
        self.closed = 0
        self.sums = np.zeros(policies, dtype=np.int64)  # over closed forwards
        self.span: tuple[int, int] | None = None  # the first and last forward, in log order
        self.in_order, self.lost = True, False

    def add(self, numbers: NDArray[np.int64], touched: NDArray[np.bool_]) -> None:
        """Count stretches of rows.

        Args:
            numbers: (N,), N > 0, see forward_numbers.
            touched: (P, N, E), which experts the rows chose.
        """
        in_order = bool((numbers[1:] >= numbers[:-1]).all())
        self._go_on((int(numbers[0]), int(numbers[-1])), in_order)
        self.held.append((numbers, np.packbits(touched, axis=2)))
        self._close()

    def merge(self, other: Self) -> None:
        """Add what another saw later in the log."""
        if other.span is not None:
            self._go_on(other.span, other.in_order)
            self.held += other.held
            self.closed += other.closed
            self.sums += other.sums
            self.lost |= other.lost
            self._close()

    def totals(self) -> tuple[int, NDArray[np.int64]] | None:
        """Forwards, and (P,) different experts summed over them; None where that cannot be told."""
        self._close(at_once=True)
        if self.lost:
            return None
        return self.closed + sum(len(n) for n, _ in self.held), sum(
            (np.bitwise_count(bits).sum(axis=(1, 2), dtype=np.int64) for _, bits in self.held),
            self.sums,
        )

    def _go_on(self, span: tuple[int, int], in_order: bool) -> None:
        first, last = self.span or span
        self.in_order &= in_order and (self.span is None or last <= span[0])
        self.span = first, span[1]

    def _close(self, *, at_once: bool = False) -> None:
        """Hold each forward once, if there are more than MOST stretches or at once."""
        if not self.lost and sum(len(n) for n, _ in self.held) > (0 if at_once else MOST):
            numbers, bits = _merged(self.held)
            if len(numbers) > MOST and self.in_order:
                self.closed += len(numbers) - 2
                self.sums += np.bitwise_count(bits[:, 1:-1]).sum(axis=(1, 2), dtype=np.int64)
                numbers, bits = numbers[[0, -1]], bits[:, [0, -1]]
            self.held = [(numbers, bits)]
            self.lost = len(numbers) > MOST
        self.lost |= self.closed > 0 and not self.in_order
        if self.lost:
            self.held = []


def _merged(parts: list[Held]) -> Held:
    """The same, each forward once, in order."""
    numbers = np.concatenate([numbers for numbers, _ in parts])
    bits = np.concatenate([bits for _, bits in parts], axis=1)
    order = np.argsort(numbers, kind="stable")
    numbers = numbers[order]
    first = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1]))
    return numbers[first], np.bitwise_or.reduceat(bits[:, order], first, axis=1)
