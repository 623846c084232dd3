"""Higher Criticism thresholding: cut where small p-values are most in excess."""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.errors import InvalidOption

# below the line, p-values are moved this far inside (0, 1), so that scores are finite
SMALLEST, LARGEST = 2.0**-1000, 1 - 2.0**-53


@dataclass(frozen=True)
class HigherCriticism(Policy):
    """The rank with the largest Higher Criticism score among the first beta * E ranks.

    HC_k = sqrt(E) * (k / E - p_(k)) / sqrt(p_(k) * (1 - p_(k))),
    n = argmax {HC_k : 1 <= k <= beta * E}, the lowest rank on a tie; 0 if no score is above 0:
    then there are no more small p-values than the null expects.

    The score is that of 2004, scaled by the spread of p_(k) under a null with p_(k) in place of
    its mean; Donoho and Jin (2008) divide by sqrt(k / E * (1 - k / E)) instead, which favours
    small p-values less. beta = 1 takes all ranks: full Higher Criticism. beta counts in steps of
    1/E, so a budget is met only to the nearest step, and where few ranks hold the largest score
    even beta = 1 stays below it.

    Attributes:
        beta: share of the ranks that are looked at, 0 < beta <= 1 (alpha_0 in the paper); at least
            the first rank always is.

    Reference:
        Donoho and Jin (2004), Ann. Statist. 32(3), 962-994; its maximiser as a threshold: Donoho
        and Jin (2008), PNAS 105(39), 14790-14795.
    """

    beta: float = 1.0
    name: ClassVar[str] = "hc"
    parameter: ClassVar[str] = "beta"
    example: ClassVar[float] = 0.5
    tests: ClassVar[bool] = True
    plus: ClassVar[bool] = False

    def check(self) -> None:
        if not 0 < self.beta <= 1:
            raise InvalidOption(f"beta must be above 0 and at most 1, got {self.beta:g}")

    def count(self, rows: Rows) -> NDArray[np.integer]:
        E = rows.n_experts
        ranks = max(1, int(self.beta * E * (1 + 1e-12)))  # beta = j / E means j ranks
        p = rows.sorted_p[:, :ranks]
        inside = np.clip(p, SMALLEST, LARGEST)
        excess = np.maximum(np.arange(1, ranks + 1) / E - p, 0)
        score = excess * excess / (inside * (1 - inside))  # its square / E, 0 where it is negative
        if self.plus:
            score[p <= 1 / E] = 0
        best = np.argmax(score, axis=1)
        top = score.ravel().take(best + ranks * np.arange(len(rows)))
        return np.where(top > 0, best + 1, 0)

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return max(1, ceil(position * n_experts)) / n_experts


@dataclass(frozen=True)
class HigherCriticismPlus(HigherCriticism):
    """HC+: Higher Criticism over the ranks with p_(k) > 1/E alone.

    The score of a very small p-value is huge on its own; without these the maximum is about the
    excess of moderate ones. The experts before the chosen rank are selected with it; n is 0 if no
    rank is left or no score is above 0.

    Reference:
        Donoho and Jin (2004), as for Higher Criticism.
    """

    name: ClassVar[str] = "hc+"
    plus: ClassVar[bool] = True
