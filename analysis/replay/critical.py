"""Critical alphas: the first alpha of a grid at which each rank of a row is selected.

Which thresholds a logit reaches is looked up, not searched for: a table for each rank, by a key
that rises with the logit. The float32 thresholds remain the definition: tables are made from them,
and where a key does not tell, logits are held against the thresholds themselves.
"""

from collections.abc import Callable
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

# lower(k, critical): places in the grid of T rows, lowered to what their logits of rank k reach
_Lower = Callable[[int, NDArray[np.uint16]], None]


@dataclass(frozen=True, eq=False)
class Counted:
    """Rows of a layer by rank and critical alpha.

    Attributes:
        rows: (E, J + 1) int64, rows whose rank k (from 0) becomes selected at the alpha at place j
            of the grid; J stands for none of it.
        kept: (E, J + 1) int64, the router probability of rank k summed over these rows, in units of
            1 / ONE, so that sums do not depend on their order; None if not asked for.
    """

    rows: NDArray[np.int64]
    kept: NDArray[np.int64] | None

    def __add__(self, other: "Counted") -> "Counted":
        kept = None if self.kept is None or other.kept is None else self.kept + other.kept
        return Counted(self.rows + other.rows, kept)


@dataclass(frozen=True, eq=False)
class CriticalAlphas:
    """Finds critical alphas of rows of one layer.

    Attributes:
        thresholds: (E, J) float32, t_k at each alpha of the grid, rank k along the first axis; they
            fall along both.
    """

    thresholds: NDArray[np.float32]

    def count(self, logits: NDArray[np.float32], *, weigh: bool = False) -> "Counted":
        """Count rows by rank and critical alpha; those without a finite logit are left out.

        Args:
            logits: (T, E).
            weigh: whether to add up probabilities too, which doubles the cost.
        """
        E, J = self.thresholds.shape
        rows = np.zeros((E, J + 1), dtype=np.int64)
        kept = np.zeros_like(rows) if weigh else None
        prepare = self._by_pattern if is_bfloat16(logits) else self._by_scale
        step = max(1, _BLOCK_LOGITS // E)
        for start in range(0, len(logits), step):
            rising = np.sort(logits[start : start + step], axis=1)  # NaN and infinity last
            if not np.isfinite(rising[:, -1]).all():
                rising = np.sort(finite_keys(rising), axis=1)
                rising = rising[rising[:, -1] > -np.inf]
            lower = prepare(rising)
            # a rank is selected with any later one that passes: so from the last rank on
            critical = np.full(len(rising), J, dtype=np.uint16)
            probability = _probabilities(rising) if weigh else None
            for k in range(E - 1, -1, -1):
                lower(k, critical)
                rows[k] += np.bincount(critical, minlength=J + 1)
                if kept is not None and probability is not None:
                    sums = np.bincount(critical, probability[k], minlength=J + 1)
                    kept[k] += np.rint(sums * ONE).astype(np.int64)
        return Counted(rows, kept)

    def _by_pattern(self, rising: NDArray[np.float32]) -> _Lower:
        """For bfloat16 logits: each pattern is a key, so the tables say all."""
        tables = self._pattern_tables
        keys = _columns(_squeezed(_pattern_keys(rising), tables.dead))[::-1]
        keys = np.clip(keys, tables.first, tables.last)
        places = np.subtract(keys, tables.first, dtype=np.intp)

        def lower(k: int, critical: NDArray[np.uint16]) -> None:
            np.minimum(critical, tables.critical[k].take(places[k]), out=critical)

        return lower

    def _by_scale(self, rising: NDArray[np.float32]) -> _Lower:
        """For any logits: a table leaves out those that lower nothing, the others are searched."""
        falling = _columns(rising)[::-1]

        def lower(k: int, critical: NDArray[np.uint16]) -> None:
            scale, thresholds = self._scales[k], self.thresholds[k]
            found = np.flatnonzero(scale.least.take(scale.keys(falling[k])) < critical)
            reached = np.searchsorted(thresholds[::-1], falling[k][found], side="right")
            critical[found] = np.minimum(critical[found], len(thresholds) - reached)

        return lower

    @cached_property
    def _pattern_tables(self) -> "_PatternTables":
        keys = _pattern_keys_from(self.thresholds)
        dead = int(np.where(keys > 0, keys - 1, -keys).min())
        keys = _squeezed(keys, dead)
        J = keys.shape[1]
        critical = []
        for of_rank in keys:
            reached = np.bincount(of_rank - of_rank[-1]).cumsum()
            critical.append(np.append(J, J - reached).astype(np.uint16))
        ends = keys.astype(np.int16)
        return _PatternTables(dead, ends[:, -1:] - 1, ends[:, :1], critical)

    @cached_property
    def _scales(self) -> "list[_Scale]":
        return [_Scale.over(of_rank) for of_rank in self.thresholds]


@dataclass(frozen=True, eq=False)
class _PatternTables:
    """Places of critical alphas by key.

    Attributes:
        dead: keys from -dead to dead are one, since no threshold tells them apart.
        first, last: (E, 1) int16, the keys of each rank's table; they stand for those beyond too.
        critical: for each rank, places by key from `first` on.
    """

    dead: int
    first: NDArray[np.int16]
    last: NDArray[np.int16]
    critical: list[NDArray[np.uint16]]


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
