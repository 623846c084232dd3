"""A fixed threshold on the router's probability."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import BOUNDARY, Policy, unit_value
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract import named


@dataclass(frozen=True)
class Threshold(named.Threshold, Policy):
    """Every expert whose softmax probability is at least q."""

    def count(self, rows: Rows) -> NDArray[np.integer]:
        return np.asarray((rows.probability >= self.q).sum(axis=1))

    def unsure(self, rows: Rows) -> NDArray[np.bool_]:
        return np.asarray((np.abs(rows.probability - self.q) <= BOUNDARY * self.q).any(axis=1))

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(1 - position)
