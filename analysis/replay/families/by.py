"""Benjamini-Yekutieli: BH that holds under any dependence between experts."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.families.bh import step_up
from bhlog.analysis.replay.policy import Policy, unit_value
from bhlog.analysis.replay.rows import Rows


@dataclass(frozen=True)
class By(Policy):
    """BH at the smaller level alpha / c(E), c(E) = 1 + 1/2 + ... + 1/E.

    n = max {k : p_(k) <= k * alpha / (E * c(E))}, 0 if there is none. At E = 64, c is 4.74. It
    chooses what BH at that level chooses, so on a curve of costs the two are one.

    Attributes:
        alpha: level, 0 < alpha < 1.

    Reference:
        Benjamini and Yekutieli (2001), Ann. Statist. 29(4), theorem 1.3.
    """

    alpha: float
    name: ClassVar[str] = "by"
    parameter: ClassVar[str] = "alpha"
    example: ClassVar[float] = 0.3
    tests: ClassVar[bool] = True

    def count(self, rows: Rows) -> NDArray[np.integer]:
        c = float((1 / np.arange(1, rows.n_experts + 1)).sum())
        return step_up(rows, self.alpha / c)

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(position)
