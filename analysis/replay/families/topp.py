"""Top-p routing: as many experts as it takes to hold a share of the probability."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy, unit_value
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.errors import InvalidOption


@dataclass(frozen=True)
class TopP(Policy):
    """The smallest set of experts whose softmax probability reaches p.

    n = min {k : q_(1) + ... + q_(k) >= p}, with q_(1) >= q_(2) >= ... the softmax over all experts
    in float64. Logits that are not finite have no probability and never help to reach p.

    Attributes:
        p: probability to reach, 0 < p <= 1.

    Reference:
        Huang et al. (2024), Harder tasks need more experts: dynamic routing in MoE models;
        the nucleus of Holtzman et al. (2020), applied to experts.
    """

    p: float
    name: ClassVar[str] = "topp"
    parameter: ClassVar[str] = "p"
    example: ClassVar[float] = 0.5

    def check(self) -> None:
        if not 0 < self.p <= 1:
            raise InvalidOption(f"p must be above 0 and at most 1, got {self.p:g}")

    def count(self, rows: Rows) -> NDArray[np.integer]:
        short = rows.cumulative_probability < self.p  # (T, E)
        return np.asarray(np.minimum(1 + short.sum(axis=1), rows.n_finite))

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(position)
