"""Local false discovery rate: experts whose logits are seldom null."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy, unit_value
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract import named
from bhlog.capture.contract.errors import KdeMismatch


@dataclass(frozen=True)
class Lfdr(named.Lfdr, Policy):
    """Every expert whose local false discovery rate is at most X."""

    def count(self, rows: Rows) -> NDArray[np.integer]:
        if rows.null is None:
            raise KdeMismatch(
                "a local fdr needs a null model: bhlog kde fit RUN --null-from central --out FILE"
            )
        return rows.step_up(rows.null.thresholds_of(self, rows.n_experts), 0, rows.n_experts)[0]

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(position)
