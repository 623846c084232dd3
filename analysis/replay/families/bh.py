"""Benjamini-Hochberg: the rule that bhlog routes with."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy, unit_value
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.rule import count_rejected_by_expert, critical_values, last_passing


@dataclass(frozen=True)
class Bh(Policy):
    """The step-up rule: n = max {k : p_(k) <= k * alpha / E}, 0 if there is none.

    Decided by the same float32 thresholds as capture and replay, bit for bit.

    Attributes:
        alpha: BH level, 0 < alpha < 1.

    Reference:
        Benjamini and Hochberg (1995), J. R. Stat. Soc. B 57(1), eq. (1).
    """

    alpha: float
    name: ClassVar[str] = "bh"
    parameter: ClassVar[str] = "alpha"
    example: ClassVar[float] = 0.3
    tests: ClassVar[bool] = True

    def count(self, rows: Rows) -> NDArray[np.integer]:
        return step_up(rows, self.alpha)

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(position)


def step_up(rows: Rows, alpha: float) -> NDArray[np.integer]:
    """(T,) n_rejected by the one decision rule, wherever p-values come from."""
    if rows.p_follows_logits:
        return rows.step_up(rows.thresholds(alpha), 0, rows.n_experts)[0]
    if rows.null is not None:
        return count_rejected_by_expert(rows.keys, rows.thresholds(alpha))
    return last_passing(rows.sorted_p <= critical_values(alpha, rows.n_experts))
