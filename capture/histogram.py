"""Histogram of router logits: the sufficient statistic of a null model, exact in integers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BIN_WIDTH = 2.0**-10  # logits; most bfloat16 logits lie exactly on a multiple of it
ONE_VALUE = 1 << 20  # fixed-point weight of one value, shared between its two neighbours


@dataclass(frozen=True, eq=False)
class Histogram:
    """Linearly binned logits on nodes at multiples of BIN_WIDTH.

    Integers, so histograms of several shards, ranks or runs add up bit for bit in any order.

    Attributes:
        first: index of the first node; node j lies at (first + j) * BIN_WIDTH logits.
        counts: (N,) int64, ONE_VALUE per value, split between the two nodes around it.
    """

    first: int
    counts: NDArray[np.int64]

    @property
    def lo(self) -> float:
        """Position of the first node, in logits."""
        return self.first * BIN_WIDTH

    @property
    def n(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum()) // ONE_VALUE

    @classmethod
    def empty(cls) -> "Histogram":
        """A histogram of no values."""
        return cls(first=0, counts=np.zeros(0, dtype=np.int64))

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> "Histogram":
        """Histogram of finite float32 values of any shape."""
        if values.size == 0:
            return cls.empty()
        node = values.astype(np.float64).ravel() / BIN_WIDTH  # exact: a power of two
        left = np.floor(node)
        to_right = np.rint((node - left) * ONE_VALUE)
        first = int(left.min())
        index = (left - first).astype(np.int64)
        size = int(index.max()) + 2
        # float64 sums of integers are exact below 2^53, which is 2^33 values in one call
        counts = np.bincount(index, ONE_VALUE - to_right, size)
        counts += np.bincount(index + 1, to_right, size)
        return cls(first=first, counts=counts.astype(np.int64))

    def merge(self, other: "Histogram") -> "Histogram":
        """Histogram of the values of both."""
        if not len(self.counts) or not len(other.counts):
            return self if len(self.counts) else other
        first = min(self.first, other.first)
        last = max(self.first + len(self.counts), other.first + len(other.counts))
        counts = np.zeros(last - first, dtype=np.int64)
        for part in (self, other):
            start = part.first - first
            counts[start : start + len(part.counts)] += part.counts
        return Histogram(first=first, counts=counts)
