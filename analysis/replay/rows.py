"""Rows: what policies ask of rows of logits, each thing computed once."""

from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.kernels.choice import choose_rows, step_up
from bhlog.analysis.kernels.places import NOWHERE, threshold_places
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.errors import CorruptShard, KdeMismatch
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.rule import finite_keys, no_finite_logit, p_value_order

PIECE = 1 << 16  # p-values computed at once: a null model makes many arrays of them


class Rows:
    """T rows of one layer.

    Args:
        logits: (T, E) float32.
        null: the layer's null model; None where p-values are given or not needed.
        p: (T, E) float64 p-values that no null model gave.
        logged: (T,) list column, the experts that the run used; a row without a finite logit keeps
            them, ahead of all others, or gets none where it is None.
        pools: (T,) int64, which rows are ranked together by policies that do so; None: all.
        thresholds: thresholds of the null by alpha, filled as they are asked for; blocks of one
            layer share it.

    Attributes:
        logged_starts: (T + 1,) int32, where each row's experts start in `logged_experts`.
        logged_experts: uint16, the experts that the run used, row by row.
        cuts: (T,) int32, the place that the experts of the last n_rejected reach and no others do.
    """

    def __init__(
        self,
        logits: NDArray[np.float32],
        null: LayerNull | None = None,
        *,
        p: NDArray[np.float64] | None = None,
        logged: pa.ListArray | None = None,
        pools: NDArray[np.int64] | None = None,
        thresholds: dict[float, NDArray[np.float32]] | None = None,
    ) -> None:
        if logged is None:
            starts = pa.array(np.zeros(len(logits) + 1, dtype=np.int32))
            logged = pa.ListArray.from_arrays(starts, pa.array([], pa.uint16()))
        self.logits = logits
        self.null = null
        self.pools = np.zeros(len(logits), dtype=np.int64) if pools is None else pools
        self.logged_starts = values_of(logged.offsets)
        self.logged_experts = values_of(logged.values)
        self.cuts = np.full(len(logits), NOWHERE, dtype=np.int32)
        self._given_p = p
        self._thresholds = {} if thresholds is None else thresholds

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
    def tested(self) -> NDArray[np.float32]:
        """(T, E): what the null's thresholds are held against: logits, or centred ones."""
        return self.logits if self.null is None else self.null.tested(self.logits)

    @cached_property
    def rising(self) -> NDArray[np.float32]:
        """(T, E): keys, each row rising."""
        return np.sort(self.keys, axis=1)

    @cached_property
    def n_finite(self) -> NDArray[np.int64]:
        """(T,): finite logits of each row."""
        return np.asarray((self.keys > -np.inf).sum(axis=1))

    @cached_property
    def probability(self) -> NDArray[np.float64]:
        """(T, E) softmax over all experts, falling; 0 where the logit is not finite."""
        probability = self.rising[:, ::-1].astype(np.float64)
        probability -= np.where(self.rising[:, -1:] == -np.inf, 0.0, probability[:, :1])
        np.exp(probability, out=probability)
        total = probability.sum(axis=1, keepdims=True)
        probability /= np.where(total > 0, total, 1.0)
        return probability

    @cached_property
    def cumulative_probability(self) -> NDArray[np.float64]:
        """(T, E) softmax probability of the first k experts by falling logit, k = 1..E."""
        return np.cumsum(self.probability, axis=1)

    @property
    def p_follows_logits(self) -> bool:
        """Whether the order by p-value is the order by logit: one null curve for all experts."""
        return self._given_p is None and self.null is not None and self.null.pooled

    @cached_property
    def p(self) -> NDArray[np.float64]:
        """(T, E) p-values of the experts; infinite where the logit is not finite.

        Raises:
            KdeMismatch: there is neither a null model nor p-values.
        """
        p = self._given_p
        if p is None:
            if self.null is None:
                raise KdeMismatch("p-values need a null model; name one with --kde FILE")
            p = self.null.p_value(self.logits)
        return np.where(self.keys == -np.inf, np.inf, p)

    @cached_property
    def sorted_p(self) -> NDArray[np.float64]:
        """(T, E) p-values, rising; infinite where the logit is not finite."""
        if not self.p_follows_logits:
            return np.sort(self.p, axis=1)
        assert self.null is not None
        p = np.empty(self.keys.shape)
        size = max(1, PIECE // self.n_experts)
        for start in range(0, len(p), size):
            falling = self.rising[start : start + size, ::-1]
            p[start : start + size] = self.null.p_value(falling)
        p[self.rising[:, ::-1] == -np.inf] = np.inf
        return p

    def thresholds(self, alpha: float) -> NDArray[np.float32]:
        """Thresholds of the null model at alpha; see LayerNull.thresholds."""
        if alpha not in self._thresholds:
            assert self.null is not None
            self._thresholds[alpha] = self.null.thresholds(alpha, self.n_experts)
        return self._thresholds[alpha]

    def step_up(
        self, thresholds: NDArray[np.float32], min_k: int, max_k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(T,) n_rejected and n_selected by the decision rule under a pooled null.

        Args:
            thresholds: (E,) float32, t_1..t_E.
        """
        n_rejected = np.empty(len(self), dtype=np.int64)
        n_selected = np.empty(len(self), dtype=np.int64)
        undecided = np.empty(len(self), dtype=np.bool_)
        self.cuts = np.empty(len(self), dtype=np.int32)
        step_up(
            self.tested,
            threshold_places(thresholds),
            min_k,
            max_k,
            self.logged_starts,
            n_rejected,
            n_selected,
            self.cuts,
            undecided,
        )
        self.undecided = np.flatnonzero(undecided)
        return n_rejected, n_selected

    def n_selected(
        self, n_rejected: NDArray[np.int64], min_k: int, max_k: int
    ) -> NDArray[np.int64]:
        """(T,) experts used: raw counts within the bounds."""
        n = np.clip(n_rejected, min_k, max_k)
        if len(self.undecided):
            n[self.undecided] = self.n_logged[self.undecided]
        return n

    def chosen(self, n_selected: NDArray[np.int64], *, by_p: bool = False) -> NDArray[np.bool_]:
        """(T, E): the first n_selected experts of each row, by falling logit or rising p-value."""
        chosen: NDArray[np.bool_]
        if by_p and not self.p_follows_logits:
            chosen = self._place_by_p < n_selected[:, None]
            return chosen
        chosen = np.empty(self.logits.shape, dtype=np.bool_)
        choose_rows(self.logits, n_selected, self.cuts, chosen)
        for row in self.undecided:
            chosen[row] = False
            chosen[row, self._logged(row)] = True
        return chosen

    def order(self, *, by_p: bool = False) -> NDArray[np.uint16]:
        """(T, E): experts from the first choice on; see chosen."""
        return self._by_p if by_p and not self.p_follows_logits else self._by_logit

    @cached_property
    def _by_logit(self) -> NDArray[np.uint16]:
        """Experts by falling logit, ties to the lower index."""
        return self._logged_first(np.argsort(-self.keys, axis=1, kind="stable"))

    @cached_property
    def _by_p(self) -> NDArray[np.uint16]:
        """Experts by rising p-value, ties to the larger logit, then to the lower index."""
        return self._logged_first(p_value_order(self.keys, self.p))

    @cached_property
    def _place_by_p(self) -> NDArray[np.uint16]:
        """(T, E): place of each expert in the order by p-value, from 0."""
        order = self._by_p
        place = np.empty_like(order)
        ranks = np.broadcast_to(np.arange(self.n_experts, dtype=np.uint16), order.shape)
        np.put_along_axis(place, order.astype(np.int64), ranks, axis=1)
        return place

    def _logged_first(self, order: NDArray[np.int64]) -> NDArray[np.uint16]:
        """The order, but the logged experts lead in rows without a finite logit."""
        result: NDArray[np.uint16] = order.astype(np.uint16)
        for row in self.undecided:
            logged = self._logged(row)
            rest = np.setdiff1d(np.arange(self.n_experts), logged)
            result[row] = np.concatenate([logged, rest])
        return result

    def _logged(self, row: int) -> NDArray[np.uint16]:
        """Experts that the run used in a row.

        Raises:
            CorruptShard: they are no experts of the model.
        """
        start, end = self.logged_starts[row : row + 2]
        experts: NDArray[np.uint16] = self.logged_experts[start:end]
        if len({*experts.tolist()} & {*range(self.n_experts)}) < len(experts):
            raise damaged(self.n_experts)
        return experts


def damaged(n_experts: int) -> CorruptShard:
    """What to raise where experts are logged that cannot be."""
    return CorruptShard(
        f"an expert beyond the {n_experts} of the model is logged, or more experts "
        "than it has: the log is damaged; bhlog verify names the file"
    )
