"""Native top-k routing."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.rule import OPEN, Bounds


@dataclass(frozen=True)
class TopK(Policy):
    """The k experts with the largest logits, for every row alike.

    Attributes:
        k: experts per row, from 1 to all of them.

    Reference:
        Shazeer et al. (2017), Outrageously large neural networks, section 2.1.
    """

    k: int
    name: ClassVar[str] = "topk"
    parameter: ClassVar[str] = "k"
    example: ClassVar[float] = 8

    def check(self) -> None:
        if self.k < 1:
            raise InvalidOption(f"k must be at least 1, got {self.k}")

    def count(self, rows: Rows) -> NDArray[np.integer]:
        return np.full(len(rows), self.k)

    def bounds(self, n_experts: int, given: Bounds = OPEN) -> tuple[int, int]:
        if self.k > n_experts:
            raise InvalidOption(f"k is {self.k}, but the model has {n_experts} experts")
        return super().bounds(n_experts, given)

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return 1 + round(position * (n_experts - 1))
