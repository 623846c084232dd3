"""Native top-k routing."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract import named


@dataclass(frozen=True)
class TopK(named.TopK, Policy):
    """The k experts with the largest logits, for every row alike."""

    def count(self, rows: Rows) -> NDArray[np.integer]:
        return np.full(len(rows), self.k)

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return 1 + round(position * (n_experts - 1))
