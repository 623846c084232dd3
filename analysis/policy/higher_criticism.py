"""Higher Criticism thresholding: cut where small p-values are most in excess."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from analysis.policy.policy import Policy
from analysis.policy.rows import Rows
from capture.contract.errors import InvalidOption

# p-values are moved this far inside (0, 1), where the score is finite
SMALLEST, LARGEST = 2.0**-1000, 1 - 2.0**-53


@dataclass(frozen=True)
class HigherCriticism(Policy):
    """The rank with the largest Higher Criticism score among the first beta * E ranks.

    HC_k = sqrt(E) * (k / E - p_(k)) / sqrt(p_(k) * (1 - p_(k))),
    n = argmax {HC_k : 1 <= k <= beta * E}, the lowest rank on a tie; 0 if no score is above 0:
    then there are no more small p-values than the null expects.

    beta = 1 takes all ranks. Its grid is 1/E, so a budget is met only to the nearest step.

    Attributes:
        beta: share of the ranks that are looked at, 0 < beta <= 1 (alpha_0 in the paper); at least
            the first rank always is.

    Reference:
        Donoho and Jin (2004), Ann. Statist. 32(3), 962-994; as a threshold, Donoho and Jin (2008),
        PNAS 105(39), 14790-14795.
    """

    beta: float = 1.0
    name: ClassVar[str] = "hc"
    parameter: ClassVar[str] = "beta"
    tests: ClassVar[bool] = True
    plus: ClassVar[bool] = False

    def check(self) -> None:
        if not 0 < self.beta <= 1:
            raise InvalidOption(f"beta must be above 0 and at most 1, got {self.beta:g}")

    def count(self, rows: Rows) -> NDArray[np.integer]:
        E = rows.n_experts
        ranks = max(1, int(self.beta * E * (1 + 1e-12)))  # beta = j / E means j ranks
        sorted_p = rows.sorted_p[:, :ranks]
        p = np.clip(sorted_p, SMALLEST, LARGEST)
        score = (np.arange(1, ranks + 1) / E - p) / np.sqrt(p * (1 - p))
        seen = np.isfinite(sorted_p)
        if self.plus:
            seen &= sorted_p > 1 / E
        score = np.where(seen, score, -np.inf)
        best = np.argmax(score, axis=1)
        top = np.take_along_axis(score, best[:, None], axis=1)[:, 0]
        return np.where(top > 0, best + 1, 0)

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return max(1, ceil(position * n_experts)) / n_experts


@dataclass(frozen=True)
class HigherCriticismPlus(HigherCriticism):
    """HC+: the score is maximised over ranks with p_(k) > 1/E alone.

    The score of a very small p-value is huge on its own; without these the maximum is about the
    excess of moderate ones. The experts before the chosen rank are selected with it; n is 0 if no
    rank is left or no score is above 0.
    """

    name: ClassVar[str] = "hc+"
    plus: ClassVar[bool] = True
