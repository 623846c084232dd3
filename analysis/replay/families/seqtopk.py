"""Sequence-level top-k: a budget of experts a sequence, not a token."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.named import require_positive
from bhlog.capture.contract.rule import OPEN, Bounds


@dataclass(frozen=True)
class SeqTopK(Policy):
    """The K T largest softmax probabilities of the T tokens of a sequence: K a token on average.

    Tokens of one sequence in one forward share the budget, K T rounded: a prompt is ranked as a
    whole, of a chunked one each chunk, and a decoded token is alone, so that it gets its K largest.
    Of equal probabilities those of the earlier token count first. Tokens that a rule sees only
    later compete with this one, so that no decoding can route by it: it is replayed only. Forwards
    that are not whole in a row group (sampled or dropped tokens, --sample, --where) are refused.

    Attributes:
        k: K, mean experts a token, above 0 and at most E.

    Reference:
        Wen et al. (2025), Route experts by sequence, not by token, arXiv:2511.06494, without the
        expert cache that they decode with.
    """

    k: float
    name: ClassVar[str] = "seqtopk"
    parameter: ClassVar[str] = "k"
    example: ClassVar[float] = 8
    pools: ClassVar[bool] = True

    def check(self) -> None:
        require_positive(self.parameter, self.k)

    def bounds(self, n_experts: int, given: Bounds = OPEN) -> tuple[int, int]:
        if self.k > n_experts:
            raise InvalidOption(f"k is {self.k:g}, but the model has {n_experts} experts")
        return super().bounds(n_experts, given)

    def count(self, rows: Rows) -> NDArray[np.integer]:
        order = np.argsort(rows.pools, kind="stable")
        starts = np.flatnonzero(np.diff(rows.pools[order], prepend=-1))
        n = np.full(len(rows), round(self.k))  # of a token alone
        for pool in np.split(order, starts[1:]):
            if len(pool) > 1:
                n[pool] = shares(rows.probability[pool], round(self.k * len(pool)))
        return n

    @staticmethod
    def value_at(position: float, n_experts: int) -> float:
        return float(f"{max(position, 1e-6) * n_experts:.6g}")


def shares(probability: NDArray[np.float64], budget: int) -> NDArray[np.int64]:
    """(T,): how many of the `budget` largest of (T, E) probabilities are in each row."""
    size = probability.size
    if not 0 < budget < size:
        return np.full(len(probability), probability.shape[1] if budget else 0)
    cut = np.partition(probability, size - budget, axis=None)[size - budget]
    above, ties = ((probability > cut).sum(axis=1), (probability == cut).sum(axis=1))
    left = budget - above.sum() - (np.cumsum(ties) - ties)
    return np.asarray(above + np.clip(left, 0, ties))
