"""Top-p routing: as many experts as it takes to hold a share of the probability."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import BOUNDARY, Policy, unit_value
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract import named


@dataclass(frozen=True)
class TopP(named.TopP, Policy):
    """The smallest set of experts whose softmax probability reaches p."""

    def count(self, rows: Rows) -> NDArray[np.integer]:
        short = rows.cumulative_probability < self.p  # (T, E)
        return np.asarray(np.minimum(1 + short.sum(axis=1), rows.n_finite))

    def unsure(self, rows: Rows) -> NDArray[np.bool_]:
        gap = np.abs(rows.cumulative_probability - self.p)
        return np.asarray((gap <= BOUNDARY * self.p).any(axis=1))

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(position)
