"""Benjamini-Hochberg: the rule that bhlog routes with."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy, unit_value
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract import named
from bhlog.capture.contract.rule import (
    count_rejected_by_expert,
    critical_values,
    finite_keys,
    last_passing,
)


@dataclass(frozen=True)
class Bh(named.Bh, Policy):
    """The step-up rule: n = max {k : p_(k) <= k * alpha / E}, 0 if there is none."""

    def count(self, rows: Rows) -> NDArray[np.integer]:
        if rows.null is None:  # alphas by layer come with a null model
            return step_up(rows, self.alpha)
        return step_up(rows, self.alpha_of(rows.null.layer))

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(position)


def step_up(rows: Rows, alpha: float) -> NDArray[np.integer]:
    """(T,) n_rejected by the one decision rule, wherever p-values come from."""
    if rows.p_follows_logits:
        return rows.step_up(rows.thresholds(alpha), 0, rows.n_experts)[0]
    if rows.null is not None:
        return count_rejected_by_expert(finite_keys(rows.tested), rows.thresholds(alpha))
    return last_passing(rows.sorted_p <= critical_values(alpha, rows.n_experts))
