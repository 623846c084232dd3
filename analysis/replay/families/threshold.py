"""A fixed threshold on the router's probability."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy, unit_value
from bhlog.analysis.replay.rows import Rows


@dataclass(frozen=True)
class Threshold(Policy):
    """Every expert whose softmax probability is at least q.

    n = #{i : q_i >= q}, the softmax over all experts in float64. Of all rules with the same mean
    number of experts and the same bounds, this one keeps the most probability: any other leaves
    out an expert above q for one below it.

    Attributes:
        q: least probability, 0 < q < 1.
    """

    q: float
    name: ClassVar[str] = "threshold"
    parameter: ClassVar[str] = "q"
    example: ClassVar[float] = 0.02

    def count(self, rows: Rows) -> NDArray[np.integer]:
        return np.asarray((rows.probability >= self.q).sum(axis=1))

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(1 - position)
