"""Storey-adaptive BH: the share of null experts is estimated row by row."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy, unit_value
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.named import require_unit
from bhlog.capture.contract.rule import critical_values, last_passing


@dataclass(frozen=True)
class Storey(Policy):
    """BH at the larger level alpha / pi0, pi0 the row's estimated share of null experts.

    pi0 = min(1, (1 + #{i : p_i > lambda}) / (E * (1 - lambda))),
    n = max {k : p_(k) <= k * alpha / (E * pi0)}, 0 if there is none.

    Never fewer experts than BH at the same alpha. An expert whose logit is not finite counts as
    one above lambda. The paper's proof of control also wants the selected p-values to be at most
    lambda; as in other software that is not asked here, or lambda would cap the experts.

    Attributes:
        alpha: level, 0 < alpha < 1.
        lambda_: p-values above it are taken for null, 0 < lambda < 1.

    Reference:
        Storey, Taylor and Siegmund (2004), J. R. Stat. Soc. B 66(1), 187-205; the cap at 1 keeps it
        from falling behind BH.
    """

    alpha: float
    lambda_: float = 0.5
    name: ClassVar[str] = "storey"
    parameter: ClassVar[str] = "alpha"
    example: ClassVar[float] = 0.3
    tests: ClassVar[bool] = True

    def check(self) -> None:
        require_unit("alpha", self.alpha)
        require_unit("lambda", self.lambda_)

    def count(self, rows: Rows) -> NDArray[np.integer]:
        p, E = rows.sorted_p, rows.n_experts
        above = (p > self.lambda_).sum(axis=1, keepdims=True)
        pi0 = np.minimum(1.0, (1 + above) / (E * (1 - self.lambda_)))  # (T, 1)
        return last_passing(p <= critical_values(self.alpha, E) / pi0)

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return unit_value(position)
