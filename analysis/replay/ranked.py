"""Ranked rows: what rules ask of rows of logits, each thing computed once."""

from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.kernels.choice import choose_rows, step_up
from bhlog.analysis.kernels.places import NOWHERE, threshold_places
from bhlog.capture.contract.rule import finite_keys, no_finite_logit

BLOCK_LOGITS = 1 << 18  # of a block: with what is derived from it, it stays in the cache


def block_rows(n_experts: int) -> int:
    """Rows of a block."""
    return max(1, BLOCK_LOGITS // n_experts)


class RankedRows:
    """T rows of one layer whose experts rank by falling logit, ties to the lower index.

    A row without a finite logit keeps the experts that were logged, ahead of all others.

    Args:
        logits: (T, E) float32.
        logged: (T,) list column, the experts that the run used; None means none.

    Attributes:
        logged_starts: (T + 1,) int32, where each row's experts start in `logged_experts`.
        logged_experts: uint16, the experts that the run used, row by row.
        cuts: (T,) int32, the place that the experts of the last n_rejected reach and no others do.
    """

    def __init__(self, logits: NDArray[np.float32], logged: pa.ListArray | None = None) -> None:
        if logged is None:
            starts = pa.array(np.zeros(len(logits) + 1, dtype=np.int32))
            logged = pa.ListArray.from_arrays(starts, pa.array([], pa.uint16()))
        self.logits = logits
        self.logged_starts = logged.offsets.to_numpy()
        self.logged_experts = logged.values.to_numpy()
        self.cuts = np.full(len(logits), NOWHERE, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def n_experts(self) -> int:
        """Experts per router."""
        return int(self.logits.shape[1])

    @cached_property
    def undecided(self) -> NDArray[np.int64]:
        """(U,): indices of rows without a finite logit."""
        if np.isfinite([self.logits.min(initial=0), self.logits.max(initial=0)]).all():
            return np.zeros(0, dtype=np.int64)
        return np.flatnonzero(no_finite_logit(self.logits))

    @cached_property
    def n_logged(self) -> NDArray[np.int64]:
        """(T,): experts that the run used."""
        n: NDArray[np.int64] = np.diff(self.logged_starts).astype(np.int64)
        return n

    @cached_property
    def keys(self) -> NDArray[np.float32]:
        """(T, E): logits, -inf where they are not finite."""
        return finite_keys(self.logits)

    @cached_property
    def rising(self) -> NDArray[np.float32]:
        """(T, E): keys, each row rising."""
        return np.sort(self.keys, axis=1)

    def step_up(
        self, thresholds: NDArray[np.float32], min_k: int, max_k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(T,) n_rejected and n_selected by the decision rule.

        Args:
            thresholds: (E,) float32, t_1..t_E.
        """
        n_rejected = np.empty(len(self), dtype=np.int64)
        n_selected = np.empty(len(self), dtype=np.int64)
        self.cuts = np.empty(len(self), dtype=np.int32)
        step_up(
            self.logits,
            threshold_places(thresholds),
            min_k,
            max_k,
            self.logged_starts,
            n_rejected,
            n_selected,
            self.cuts,
        )
        return n_rejected, n_selected

    def n_selected(
        self, n_rejected: NDArray[np.int64], min_k: int, max_k: int
    ) -> NDArray[np.int64]:
        """(T,) experts used: raw counts within the bounds."""
        n = np.clip(n_rejected, min_k, max_k)
        n[self.undecided] = self.n_logged[self.undecided]
        return n

    def chosen(self, n_selected: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(T, E): the first n_selected experts of each row."""
        chosen = np.empty(self.logits.shape, dtype=np.bool_)
        choose_rows(self.logits, n_selected, self.cuts, chosen)
        self.keep_logged(chosen)
        return chosen

    def keep_logged(self, chosen: NDArray[np.bool_]) -> None:
        """Choose the logged experts in rows without a finite logit."""
        for row in self.undecided:
            experts = self.logged_experts[self.logged_starts[row] : self.logged_starts[row + 1]]
            chosen[row] = False
            chosen[row, experts] = True
