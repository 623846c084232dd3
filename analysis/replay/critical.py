"""Critical alphas: the first alpha of a grid at which each rank of a row is selected.

Which thresholds a logit reaches is looked up, not searched for: a table for each rank, by a key
that rises with the logit. The float32 thresholds remain the definition: tables are made from them,
and where a key does not tell, logits are held against the thresholds themselves.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from capture.contract.bh import finite_keys
from capture.contract.histogram import is_bfloat16

MOST_ALPHAS = 60_000  # of a grid: their places fit 16 bits
ONE = 1 << 20  # fixed-point unit of probability

_BLOCK_LOGITS = 1 << 19  # sorted and looked up at a time, so that they stay in the cache
_TILE_ROWS = 64
_SCALE_KEYS = 1 << 12  # of a rank's table for float32 logits


@dataclass(frozen=True, eq=False)
class Counted:
    """Rows of a layer by rank and critical alpha.

    Attributes:
        steps: (E, J + 1) int64, differences of `rows` between a rank and the next. Few ranks of a
            row differ from the next one, so these are quick to count.
        kept: (E, J + 1) int64, the router probability of rank k summed over the rows of each
            count, in units of 1 / ONE, so that sums do not depend on their order; None if not asked
            for.
    """

    steps: NDArray[np.int64]
    kept: NDArray[np.int64] | None

    @property
    def rows(self) -> NDArray[np.int64]:
        """(E, J + 1) int64: rows whose rank k (from 0) becomes selected at the alpha at place j of
        the grid; J stands for none of it."""
        return self.steps[::-1].cumsum(axis=0)[::-1]

    def __add__(self, other: "Counted") -> "Counted":
        kept = None if self.kept is None or other.kept is None else self.kept + other.kept
        return Counted(self.steps + other.steps, kept)


@dataclass(frozen=True, eq=False)
class CriticalAlphas:
    """Finds critical alphas of rows of one layer.

    Attributes:
        thresholds: (E, J) float32, t_k at each alpha of the grid, rank k along the first axis; they
            fall along both.
    """

    thresholds: NDArray[np.float32]

    def count(self, logits: NDArray[np.float32], *, weigh: bool = False) -> Counted:
        """Count rows by rank and critical alpha; those without a finite logit are left out.

        Args:
            logits: (T, E).
            weigh: whether to add up probabilities too, which doubles the cost.
        """
        shape = len(self.thresholds), self.thresholds.shape[1] + 1
        total = Counted(np.zeros(shape, np.int64), np.zeros(shape, np.int64) if weigh else None)
        places = self._by_pattern if is_bfloat16(logits) else self._by_scale
        size = max(1, _BLOCK_LOGITS // len(self.thresholds))
        for start in range(0, len(logits), size):
            rising = np.sort(logits[start : start + size], axis=1)  # NaN and infinity last
            if not np.isfinite(rising[:, -1]).all():
                rising = np.sort(finite_keys(rising), axis=1)
                rising = rising[rising[:, -1] > -np.inf]
            critical = places(rising)
            kept = _kept(critical, _probabilities(rising), shape) if weigh else None
            total += Counted(_steps(critical, shape), kept)
        return total

    def _by_pattern(self, rising: NDArray[np.float32]) -> NDArray[np.uint16]:
        """(E, T): critical alphas of bfloat16 logits; the tables say all, every pattern is a key.

        Args:
            rising: (T, E), each row rising.
        """
        tables = self._pattern_tables
        keys = _columns(_squeezed(_pattern_keys(rising), tables.dead))[::-1]
        keys = np.clip(keys, tables.first, tables.last)
        places = np.subtract(keys, tables.start, dtype=np.intp)
        critical: NDArray[np.uint16] = tables.critical.take(places)
        # a rank is selected with any later one that passes
        for k in range(len(critical) - 2, -1, -1):
            np.minimum(critical[k], critical[k + 1], out=critical[k])
        return critical

    def _by_scale(self, rising: NDArray[np.float32]) -> NDArray[np.uint16]:
        """(E, T): of any logits; a table leaves out those that lower nothing, others are searched.

        Args:
            rising: (T, E), each row rising.
        """
        falling = _columns(rising)[::-1]
        critical = np.empty(falling.shape, dtype=np.uint16)
        later = np.full(len(rising), self.thresholds.shape[1], dtype=np.uint16)
        for k in range(len(critical) - 1, -1, -1):
            scale, thresholds, logits = self._scales[k], self.thresholds[k], falling[k]
            lower = np.flatnonzero(scale.least.take(scale.keys(logits)) < later)
            reached = np.searchsorted(thresholds[::-1], logits[lower], side="right")
            critical[k] = later
            critical[k, lower] = np.minimum(later[lower], len(thresholds) - reached)
            later = critical[k]
        return critical

    @cached_property
    def _pattern_tables(self) -> "_PatternTables":
        keys = _pattern_keys_from(self.thresholds)
        dead = int(np.where(keys > 0, keys - 1, -keys).min())
        keys = _squeezed(keys, dead)
        J = keys.shape[1]
        first, last = keys[:, -1:] - 1, keys[:, :1]
        tables = []
        for of_rank in keys:
            reached = np.bincount(of_rank - of_rank[-1]).cumsum()
            tables.append(np.append(J, J - reached).astype(np.uint16))
        begins = np.cumsum([0, *(len(table) for table in tables[:-1])])[:, None]
        return _PatternTables(
            dead,
            first.astype(np.int16),
            last.astype(np.int16),
            (first - begins).astype(np.int32),
            np.concatenate(tables),
        )

    @cached_property
    def _scales(self) -> "list[_Scale]":
        return [_Scale.over(of_rank) for of_rank in self.thresholds]


@dataclass(frozen=True, eq=False)
class _PatternTables:
    """Places of critical alphas by key.

    Attributes:
        dead: keys from -dead to dead are one, since no threshold tells them apart.
        first, last: (E, 1) int16, the keys of each rank's table; they stand for those beyond too.
        start: (E, 1) int32, what a key of each rank is ahead of its place in `critical`.
        critical: uint16, the tables, one after the other.
    """

    dead: int
    first: NDArray[np.int16]
    last: NDArray[np.int16]
    start: NDArray[np.int32]
    critical: NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class _Scale:
    """Even keys over the thresholds of a rank.

    Attributes:
        low, high: logits; below `high` some thresholds are not reached, at `low` none is.
        keys_per_logit: how fine it is.
        least: uint16, the first place that a logit of each key can reach.
    """

    low: np.float32
    high: np.float32
    keys_per_logit: np.float32
    least: NDArray[np.uint16]

    @classmethod
    def over(cls, thresholds: NDArray[np.float32]) -> "_Scale":
        """The scale of thresholds that fall."""
        low, high = np.nextafter(thresholds[-1], np.float32(-np.inf)), thresholds[0]
        fine = np.float32(min(_SCALE_KEYS / (float(high) - float(low)), 1e30))
        scale = cls(low, high, fine, np.zeros(0, np.uint16))
        reached = np.bincount(scale.keys(thresholds)).cumsum()
        return replace(scale, least=(len(thresholds) - reached).astype(np.uint16))

    def keys(self, logits: NDArray[np.float32]) -> NDArray[np.intp]:
        """Keys from 0; they never fall as logits rise, whatever the rounding."""
        place = np.clip(logits, self.low, self.high)
        place -= self.low
        place *= self.keys_per_logit
        return place.astype(np.intp)


def _pattern_keys(values: NDArray[np.float32]) -> NDArray[np.int16]:
    """Keys in the order of bfloat16 values; 0 has the key 0, -0 the key -1 before it."""
    keys = (values.view(np.int32) >> 16).astype(np.int16)
    keys ^= (keys >> 15) & np.int16(0x7FFF)
    return keys


def _pattern_keys_from(thresholds: NDArray[np.float32]) -> NDArray[np.int64]:
    """The key of the smallest bfloat16 value at least as large as each threshold."""
    bits = thresholds.view(np.int32).astype(np.int64)
    order = np.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return np.where(order == 0, -1, np.where(order > 0, order + 0xFFFF, order) >> 16)


def _squeezed(keys: NDArray[np.signedinteger], dead: int) -> NDArray[np.signedinteger]:
    """Keys moved toward 0 by `dead`, and those up to it to 0."""
    squeezed: NDArray[np.signedinteger] = keys - np.clip(keys, -dead, dead)
    return squeezed


def _steps(critical: NDArray[np.uint16], shape: tuple[int, int]) -> NDArray[np.int64]:
    """Counted.steps of (E, T) critical alphas that never fall along a column."""
    E, T = critical.shape
    flat = critical.reshape(-1)
    at = np.flatnonzero(critical[1:] != critical[:-1])  # the last rank of each run of equal ones
    row = at // max(1, T) * shape[1]
    size = shape[0] * shape[1]
    steps = np.bincount(row + flat[at], minlength=size)
    steps -= np.bincount(row + flat[at + T], minlength=size)
    steps = steps.reshape(shape)
    steps[E - 1] += np.bincount(critical[E - 1], minlength=shape[1])
    return steps


def _kept(
    critical: NDArray[np.uint16], probability: NDArray[np.float32], shape: tuple[int, int]
) -> NDArray[np.int64]:
    """Counted.kept of (E, T) critical alphas and the probabilities of these ranks."""
    kept = np.empty(shape, dtype=np.int64)
    for k, (places, weights) in enumerate(zip(critical, probability, strict=True)):
        kept[k] = np.rint(np.bincount(places, weights, minlength=shape[1]) * ONE)
    return kept


def _probabilities(rising: NDArray[np.float32]) -> NDArray[np.float32]:
    """(E, T): the softmax of each row, by rank."""
    falling = _columns(rising)[::-1]
    weights = np.exp(falling - falling[0])
    weights /= weights.sum(axis=0)
    probabilities: NDArray[np.float32] = weights
    return probabilities


def _columns(rows: NDArray[np.generic]) -> NDArray[np.generic]:
    """(E, T) contiguous copy of (T, E), in tiles that stay in the cache."""
    T, E = rows.shape
    columns = np.empty((E, T), dtype=rows.dtype)
    for start in range(0, T, _TILE_ROWS):
        columns[:, start : start + _TILE_ROWS] = rows[start : start + _TILE_ROWS].T
    return columns
