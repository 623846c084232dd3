"""Benjamini-Yekutieli: BH that holds under any dependence between experts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.families.bh import step_up
from bhlog.analysis.replay.policy import Policy, unit_value
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract import named


@dataclass(frozen=True)
class By(named.By, Policy):
    """BH at the smaller level alpha / c(E), c(E) = 1 + 1/2 + ... + 1/E."""

    def count(self, rows: Rows) -> NDArray[np.integer]:
        return step_up(rows, self.level(rows.n_experts))

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(position)
