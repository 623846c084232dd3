"""Min-p routing: experts whose probability is near the largest one."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy, unit_value
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract import named


@dataclass(frozen=True)
class MinP(named.MinP, Policy):
    """Every expert whose softmax probability is at least T times the largest."""

    def count(self, rows: Rows) -> NDArray[np.integer]:
        cut = rows.keys.max(axis=1, keepdims=True) + self.step  # (T, 1) float32
        return np.asarray((rows.keys >= cut).sum(axis=1))

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(1 - position)
