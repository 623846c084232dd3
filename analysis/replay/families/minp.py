"""Min-p routing: experts whose probability is near the largest one."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy, unit_value
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.errors import InvalidOption


@dataclass(frozen=True)
class MinP(Policy):
    """Every expert whose softmax probability is at least T times the largest.

    n = #{i : l_i >= l_max + ln T}, since q_i / q_max = exp(l_i - l_max): logits are compared, and
    no softmax is computed. All in float32, so that any backend decides alike: ln T is computed in
    float64 and rounded to the nearest float32, the sum l_max + ln T is rounded once to the nearest
    float32, and each logit is compared with it. l_max is the row's largest finite logit; logits
    that are not finite are never counted. T = 1 leaves the experts that tie with the best one.

    Attributes:
        t: T, least share of the largest probability, 0 < T <= 1.

    Reference:
        Nguyen et al. (2024), Turning up the heat: min-p sampling for creative and coherent LLM
        outputs, arXiv:2407.01082; applied to experts.
    """

    t: float
    name: ClassVar[str] = "minp"
    parameter: ClassVar[str] = "t"
    example: ClassVar[float] = 0.2

    def check(self) -> None:
        if not 0 < self.t <= 1:
            raise InvalidOption(f"t must be above 0 and at most 1, got {self.t:g}")

    def count(self, rows: Rows) -> NDArray[np.integer]:
        cut = rows.keys.max(axis=1, keepdims=True) + np.float32(np.log(self.t))  # (T, 1) float32
        return np.asarray((rows.keys >= cut).sum(axis=1))

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(1 - position)
