"""Histogram of router logits: the sufficient statistic of a null model, exact in integers."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.centre import centred
from bhlog.capture.contract.null.trim import Trim, kept

BIN_WIDTH = 2.0**-10  # logits; most bfloat16 logits lie exactly on a multiple of it
ONE_VALUE = 1 << 20  # fixed-point weight of one value, shared between its two neighbours
ONE_SPREAD = 1 << 12  # fixed-point unit of spread
LARGEST_LOGIT = 1024.0  # finite logits beyond it are left out like infinite ones

_FRACTION_BITS = 20
_CHUNK = 1 << 16  # float32 values binned at a time, so that temporaries stay in the cache
_PATTERNS = 1 << 16  # of bfloat16
_PATTERN_CHUNK = 1 << 18  # bfloat16 values counted at a time: many for each pass over the table
_TABLE_FROM = 1 << 15  # values from which the table of patterns pays

PatternCounter = Callable[[NDArray[np.float32], NDArray[np.int64]], Iterator[NDArray[np.float32]]]

_FEW = 3  # times as many nodes as hold something, from which a histogram is packed

_scratch = threading.local()  # one buffer a thread: fresh pages would cost more than the counting


class _Packed(NamedTuple):
    """An array of numbers that are mostly 0: those that are not, and where; or all of them."""

    size: int
    at: NDArray[np.uint32] | None
    values: NDArray[np.int64]

    @classmethod
    def of(cls, dense: NDArray[np.int64]) -> "_Packed":
        at = np.flatnonzero(dense)
        if _FEW * len(at) > len(dense):
            return cls(len(dense), None, dense)
        return cls(len(dense), at.astype(np.uint32), dense[at])

    @property
    def dense(self) -> NDArray[np.int64]:
        if self.at is None:
            return self.values
        dense = np.zeros(self.size, dtype=np.int64)
        dense[self.at] = self.values
        return dense


@dataclass(frozen=True, eq=False, init=False)
class Histogram:
    """Linearly binned logits on nodes at multiples of BIN_WIDTH.

    Integers, so histograms of several shards, ranks or runs add up bit for bit in any order. A
    value at fraction f between two nodes gives (1 - f) to the left and f to the right one. That
    keeps sums and means exact but adds f (1 - f) BIN_WIDTH^2 to the variance, which spread
    records so that fits can take it back out.

    Attributes:
        first: index of the first node; node j lies at (first + j) * BIN_WIDTH logits.
        counts: (N,) int64, ONE_VALUE per value, split between the two nodes around it; the first
            and the last are not 0.
        spread: (N,) int64, sum of f (1 - f) in units of 1 / ONE_SPREAD over the values between
            nodes j and j + 1; 0 for values on nodes.
        left_out: logits that are not counted: NaN, infinite or beyond +-LARGEST_LOGIT.

    Few values on many nodes, as an expert's of a short run, are kept packed.
    """

    first: int
    left_out: int
    _counts: _Packed
    _spread: _Packed

    def __init__(
        self, first: int, counts: NDArray[np.int64], spread: NDArray[np.int64], left_out: int = 0
    ) -> None:
        object.__setattr__(self, "first", first)
        object.__setattr__(self, "left_out", left_out)
        object.__setattr__(self, "_counts", _Packed.of(counts))
        object.__setattr__(self, "_spread", _Packed.of(spread))

    @property
    def counts(self) -> NDArray[np.int64]:
        return self._counts.dense

    @property
    def spread(self) -> NDArray[np.int64]:
        return self._spread.dense

    @property
    def lo(self) -> float:
        """Position of the first node, in logits."""
        return self.first * BIN_WIDTH

    @property
    def nodes(self) -> NDArray[np.float64]:
        """(N,) float64: positions of the nodes, in logits."""
        return np.arange(self.first, self.first + self._counts.size, dtype=np.float64) * BIN_WIDTH

    @property
    def n(self) -> int:
        """Number of values counted."""
        return int(self._counts.values.sum()) // ONE_VALUE

    @classmethod
    def empty(cls, left_out: int = 0) -> Self:
        """A histogram of no values."""
        none = np.zeros(0, dtype=np.int64)
        return cls(first=0, counts=none, spread=none, left_out=left_out)

    @classmethod
    def of(cls, values: NDArray[np.float32], *, count: PatternCounter | None = None) -> Self:
        """Histogram of float32 values of any shape; those that cannot be counted are left out.

        Args:
            count: does what count_patterns does, which None means.
        """
        values = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        if values.size < _TABLE_FROM:
            return cls._of_float32(values)
        times = np.zeros(_PATTERNS, dtype=np.int64)
        total = cls.empty()
        for rest in (count or count_patterns)(values, times):
            total = total.merge(cls._of_float32(rest))
        return total.merge(cls.of_patterns(times)) if times.any() else total

    @classmethod
    def of_patterns(cls, times: NDArray[np.int64]) -> Self:
        """Histogram of bfloat16 values, from how often each of the 2^16 patterns was seen."""
        patterns = np.flatnonzero(times)
        values = (patterns.astype(np.uint32) << 16).view(np.float32)
        countable = np.abs(values) <= LARGEST_LOGIT
        seen = times[patterns]
        return cls._add_up(
            [_bin(values[countable], seen[countable])], left_out=int(seen[~countable].sum())
        )

    @classmethod
    def _of_float32(cls, values: NDArray[np.float32]) -> Self:
        left_out = 0
        if values.size and not max(-values.min(), values.max()) <= LARGEST_LOGIT:  # NaN fails too
            countable = np.abs(values) <= LARGEST_LOGIT
            left_out = int(values.size - np.count_nonzero(countable))
            values = values[countable]
        chunks = [_bin(values[i : i + _CHUNK], None) for i in range(0, len(values), _CHUNK)]
        return cls._add_up(chunks, left_out)

    @classmethod
    def _add_up(
        cls,
        parts: Iterable[tuple[int, NDArray[np.int64], NDArray[np.int64]]],
        left_out: int,
    ) -> Self:
        """Sum of parts (first, counts, spread), without empty nodes at its ends."""
        parts = [part for part in parts if len(part[1])]
        if not parts:
            return cls.empty(left_out)
        first = min(part[0] for part in parts)
        last = max(part[0] + len(part[1]) for part in parts)
        counts = np.zeros(last - first, dtype=np.int64)
        spread = np.zeros(last - first, dtype=np.int64)
        for start, part_counts, part_spread in parts:
            here = slice(start - first, start - first + len(part_counts))
            counts[here] += part_counts
            spread[here] += part_spread
        low = int(np.argmax(counts > 0))
        high = len(counts) - int(np.argmax(counts[::-1] > 0))
        return cls(first + low, counts[low:high], spread[low:high], left_out)

    def merge(self, other: Self) -> Self:
        """Histogram of the values of both."""
        parts = [(part.first, part.counts, part.spread) for part in (self, other)]
        return self._add_up(parts, self.left_out + other.left_out)


def is_bfloat16(values: NDArray[np.float32]) -> bool:
    """Whether every value of a contiguous array is one of bfloat16: its pattern ends in zeros."""
    bits = values.view(np.uint32)
    return not int(np.bitwise_or.reduce(bits, axis=None)) & 0xFFFF


def count_patterns(
    values: NDArray[np.float32], times: NDArray[np.int64]
) -> Iterator[NDArray[np.float32]]:
    """Add to times, (2^16,), how often each bfloat16 pattern is among contiguous values.

    Yields:
        Stretches that hold other values, and are not counted: their patterns do not end in zeros.
    """
    values = values.reshape(-1)
    bits = values.view(np.uint32)
    if not hasattr(_scratch, "patterns"):
        _scratch.patterns = np.empty(_PATTERN_CHUNK, dtype=np.intp)
    for start in range(0, len(bits), _PATTERN_CHUNK):
        stretch = values[start : start + _PATTERN_CHUNK]
        if not is_bfloat16(stretch):
            yield stretch
            continue
        patterns = _scratch.patterns[: len(stretch)]
        np.right_shift(bits[start : start + _PATTERN_CHUNK], 16, out=patterns, casting="unsafe")
        seen = np.bincount(patterns)
        times[: len(seen)] += seen


def _bin(
    values: NDArray[np.float32], times: NDArray[np.int64] | None
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """First node, counts and spread of values within +-LARGEST_LOGIT, each counted `times`."""
    if not len(values):
        return 0, np.zeros(0, np.int64), np.zeros(0, np.int64)
    position = values.astype(np.float64)
    position *= ONE_VALUE / BIN_WIDTH  # exact: a power of two
    fixed = np.rint(position, out=position).astype(np.int64)  # in 2^-30 logits
    left = fixed >> _FRACTION_BITS
    to_right = fixed & (ONE_VALUE - 1)
    first = int(left.min())
    left -= first
    size = int(left.max()) + 2
    spread = (to_right * (ONE_VALUE - to_right)) // (ONE_VALUE**2 // ONE_SPREAD)
    if times is not None:
        to_right *= times
        spread *= times
    # float64 sums of integers are exact below 2^53: 2^33 values in one call
    n = np.bincount(left, times, size).astype(np.int64)
    moved = np.bincount(left, to_right, size).astype(np.int64)
    counts = n * ONE_VALUE - moved
    counts[1:] += moved[:-1]
    return first, counts, np.bincount(left, spread, size).astype(np.int64)


class HistogramKey(NamedTuple):
    """Which logits a histogram counts; expert None is all experts of the layer."""

    layer: int
    expert: int | None
    trim: Trim


class HistogramAccumulator:
    """Histograms of logits that arrive in batches of one layer; flat in memory.

    Batches may come in any order and any split, and accumulators merge in any order: the result is
    the same integers. Pooled bfloat16 logits are counted by pattern and binned once, at the end.
    """

    def __init__(
        self,
        trims: Iterable[Trim] = (Trim(),),
        *,
        by_expert: bool = False,
        count: PatternCounter | None = None,
        centre: str = "none",
    ) -> None:
        """Count at each of these trimming levels, per layer or per layer and expert.

        Args:
            count: does what count_patterns does, which None means.
            centre: "median" to count logits less their row's median.
        """
        self.centre = centre
        self.trims = tuple(dict.fromkeys(Trim(*trim) for trim in trims))
        self.by_expert = by_expert
        self._counter = count
        self._histograms: dict[HistogramKey, Histogram] = {}
        self._patterns: dict[HistogramKey, NDArray[np.int64]] = {}

    def update(self, layer: int, logits: NDArray[np.float32]) -> None:
        """Count the rows of one layer.

        Args:
            logits: (T, E) float32; NaN and infinite ones are left out of their row and counted.

        Raises:
            InvalidOption: a trimming level leaves nothing of a row of E logits.
        """
        for trim in self.trims:
            trim.check(logits.shape[1])
        if self.centre == "median":  # what is not finite stays so, and is left out and counted
            logits = centred(logits)
        if self.by_expert:
            for trim in self.trims:
                keep = kept(logits, trim)
                for expert in range(logits.shape[1]):
                    column = logits[:, expert]
                    self._count(
                        HistogramKey(layer, expert, trim),
                        column if keep is None else column[keep[:, expert]],
                    )
        elif self.trims == (Trim(),):
            self._count(HistogramKey(layer, None, Trim()), logits)
        else:
            step = max(1, _PATTERN_CHUNK // logits.shape[1])
            for start in range(0, len(logits), step):
                self._count_trimmed(layer, logits[start : start + step])

    def merge(self, other: Self) -> None:
        """Add what another accumulator of the same kind counted, which is used up by it."""
        if (self.trims, self.by_expert) != (other.trims, other.by_expert):
            raise InvalidOption("histograms of different trimming levels cannot be merged")
        for key, part in other._histograms.items():
            self._add(key, part)
        for key, times in other._patterns.items():
            if key in self._patterns:
                self._patterns[key] += times
            else:
                self._patterns[key] = times

    def add(self, histograms: Mapping[HistogramKey, Histogram]) -> None:
        """Add what was counted elsewhere at the same trimming levels."""
        for key, part in histograms.items():
            self._add(key, part)

    def empty_copy(self) -> "HistogramAccumulator":
        """An accumulator of the same kind that has counted nothing."""
        return HistogramAccumulator(
            self.trims, by_expert=self.by_expert, count=self._counter, centre=self.centre
        )

    def histograms(self) -> dict[HistogramKey, Histogram]:
        """What was counted so far, by layer, expert and trimming level, in that order."""
        total = dict(self._histograms)
        for key, times in self._patterns.items():
            part = Histogram.of_patterns(times)
            total[key] = total[key].merge(part) if key in total else part
        return dict(sorted(total.items(), key=lambda item: _order(item[0])))

    def _count(self, key: HistogramKey, values: NDArray[np.float32]) -> None:
        values = np.ascontiguousarray(values, dtype=np.float32)
        if self.by_expert or values.size < _TABLE_FROM:
            self._add(key, Histogram.of(values, count=self._counter))
            return
        if key not in self._patterns:
            self._patterns[key] = np.zeros(_PATTERNS, dtype=np.int64)
        for rest in (self._counter or count_patterns)(values, self._patterns[key]):
            self._add(key, Histogram._of_float32(rest))

    def _add(self, key: HistogramKey, part: Histogram) -> None:
        sum_so_far = self._histograms.get(key)
        self._histograms[key] = part if sum_so_far is None else sum_so_far.merge(part)

    def _count_trimmed(self, layer: int, logits: NDArray[np.float32]) -> None:
        """Count pooled rows at every level."""
        E = logits.shape[1]
        whole = np.isfinite(logits).all(axis=1)
        ranked = np.sort(logits[whole], axis=1)
        for trim in self.trims:
            self._count(HistogramKey(layer, None, trim), ranked[:, trim.low : E - trim.high])
        if not whole.all():
            broken = logits[~whole]
            for trim in self.trims:
                keep = kept(broken, trim)
                self._count(
                    HistogramKey(layer, None, trim), broken if keep is None else broken[keep]
                )


def _order(key: HistogramKey) -> tuple[int, int, Trim]:
    return key.layer, -1 if key.expert is None else key.expert, key.trim
