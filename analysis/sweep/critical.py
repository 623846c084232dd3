"""Critical alphas: the first alpha of a grid at which each rank of a row is selected.

The float32 thresholds remain the definition: logits are held against them, and only where to begin
is looked up.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.kernels.first_alphas import BUCKETS, count_critical, make_guide
from bhlog.analysis.kernels.places import threshold_places
from bhlog.analysis.kernels.sorting import network
from bhlog.analysis.kernels.thresholds import find_thresholds
from bhlog.capture.contract.null.curve import NullCurve

MOST_ALPHAS = 60_000  # of a grid: their places fit 16 bits
ONE = 1 << 20  # fixed-point unit of probability

_FAR = np.float32(1 << 20)  # logits, beyond every grid
_BEYOND = np.iinfo(np.int32).max  # a place that no logit has


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

    def __getstate__(self) -> dict[str, NDArray[np.int64] | None]:
        return {"steps": _narrow(self.steps), "kept": self.kept}

    def __setstate__(self, state: dict[str, NDArray[np.int64]]) -> None:
        self.__dict__.update(state | {"steps": state["steps"].astype(np.int64)})

    def __add__(self, other: "Counted") -> "Counted":
        kept = None if self.kept is None or other.kept is None else self.kept + other.kept
        return Counted(self.steps + other.steps, kept)


def _narrow(numbers: NDArray[np.int64]) -> NDArray[np.signedinteger]:
    """The same numbers in as few bytes as they need."""
    widest = min(numbers.min(initial=0), -numbers.max(initial=0) - 1)
    return numbers.astype(np.min_scalar_type(widest))


def table_bytes(n_experts: int, n_alphas: int) -> int:
    """What the CriticalAlphas of a layer take."""
    return n_experts * ((n_alphas + 1) * 2 * 4 + BUCKETS * 2)


@dataclass(frozen=True, eq=False)
class CriticalAlphas:
    """Finds critical alphas of rows of one layer.

    Attributes:
        thresholds: (E, J) float32, t_k at each alpha of the grid, rank k along the first axis; they
            fall along both.
    """

    thresholds: NDArray[np.float32]

    @classmethod
    def under(
        cls, curve: NullCurve, alphas: NDArray[np.float64], n_experts: int
    ) -> "CriticalAlphas":
        """Those of a null, at alphas that rise inside (0, 1)."""
        thresholds = np.empty((n_experts, len(alphas)), dtype=np.float32)
        find_thresholds(curve.tail, curve.x0, curve.dx, curve.beyond, alphas, thresholds)
        return cls(thresholds)

    def count(
        self, logits: NDArray[np.float32], *, weigh: bool = False, into: Counted | None = None
    ) -> Counted:
        """Count rows by rank and critical alpha; those without a finite logit are left out.

        Args:
            logits: (T, E).
            weigh: whether to add up probabilities too.
            into: counts to add to, which are returned; they say whether to weigh.
        """
        if into is None:
            E, J = self.thresholds.shape
            kept = np.zeros((E, J + 1), dtype=np.int64) if weigh else None
            into = Counted(np.zeros((E, J + 1), dtype=np.int64), kept)
        kept = into.steps[:0] if into.kept is None else into.kept
        pairs = network(len(self.thresholds))
        count_critical(logits, self._places, *self._guides, pairs, into.steps, float(ONE), kept)
        return into

    @cached_property
    def _places(self) -> NDArray[np.int32]:
        """(E, J + 1): places of the thresholds, after a column that no logit reaches."""
        places = np.full((len(self.thresholds), self.thresholds.shape[1] + 1), _BEYOND, np.int32)
        places[:, 1:] = threshold_places(self.thresholds)
        return places

    @cached_property
    def _guides(self) -> tuple[NDArray[np.uint16], NDArray[np.float32], NDArray[np.float32]]:
        """(E, BUCKETS) guides, (E,) where the buckets of a rank start and how fine they are."""
        finite = np.where(np.isfinite(self.thresholds), self.thresholds, -_FAR)
        highs = finite.max(axis=1)
        lows = np.minimum(self.thresholds[:, -1], highs)
        width = np.maximum(highs.astype(np.float64) - lows, 1e-30)
        per_logit = (BUCKETS / width).astype(np.float32)
        guides = np.empty((len(lows), BUCKETS), dtype=np.uint16)
        for of_rank, low, fine, guide in zip(self.thresholds, lows, per_logit, guides, strict=True):
            make_guide(of_rank, low, fine, guide)
        return guides, lows, per_logit
