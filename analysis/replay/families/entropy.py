"""Entropy routing: as many experts as the router is unsure."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import BOUNDARY, Policy
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract import named


@dataclass(frozen=True)
class Entropy(named.Entropy, Policy):
    """More experts, up to K, the less sure the router is: K times its relative entropy."""

    def count(self, rows: Rows) -> NDArray[np.integer]:
        return np.clip(np.ceil(self._share(rows)), 1, self.most(rows.n_experts)).astype(np.int64)

    def unsure(self, rows: Rows) -> NDArray[np.bool_]:
        share = self._share(rows)
        near = np.abs(share - np.rint(share)) <= BOUNDARY * self.k
        return np.asarray(near & (share > 0.5) & (share < self.most(rows.n_experts) - 0.5))

    def _share(self, rows: Rows) -> NDArray[np.float64]:
        """(T,): K times the relative entropy."""
        q = rows.probability
        entropy = -(q * np.log(np.where(q > 0, q, 1.0))).sum(axis=1)
        return np.asarray(self.k * (entropy / np.log(rows.n_experts)))

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return float(f"{n_experts * 10 ** (6 * position - 3):.6g}")
