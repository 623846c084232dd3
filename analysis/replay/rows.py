"""Rows as policies see them: ranked, with probabilities and p-values, each computed once."""

from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.replay.ranked import RankedRows
from bhlog.capture.contract.errors import KdeMismatch
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.rule import p_value_order

PIECE = 1 << 16  # p-values computed at once: a null model makes many arrays of them


class Rows(RankedRows):
    """T rows of one layer.

    Args:
        logits: (T, E) float32.
        null: the layer's null model; None where p-values are given or not needed.
        p: (T, E) float64 p-values that no null model gave.
        logged: (T,) list column, the experts that the run used; a row without a finite logit keeps
            them, or gets none where it is None.
        thresholds: thresholds of the null by alpha, filled as they are asked for; blocks of one
            layer share it.
    """

    def __init__(
        self,
        logits: NDArray[np.float32],
        null: LayerNull | None = None,
        *,
        p: NDArray[np.float64] | None = None,
        logged: pa.ListArray | None = None,
        thresholds: dict[float, NDArray[np.float32]] | None = None,
    ) -> None:
        super().__init__(logits, logged)
        self.null = null
        self._given_p = p
        self._thresholds = {} if thresholds is None else thresholds

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

    def chosen_by_p(self, n_selected: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(T, E): the first n_selected experts of each row by rising p-value.

        Ties go to the larger logit, then to the lower index.
        """
        if self.p_follows_logits:
            return self.chosen(n_selected)
        chosen: NDArray[np.bool_] = self._place_by_p < n_selected[:, None]
        self.keep_logged(chosen)
        return chosen

    @cached_property
    def _place_by_p(self) -> NDArray[np.uint16]:
        """(T, E): place of each expert in the order by p-value, from 0."""
        order = p_value_order(self.keys, self.p)
        place = np.empty(order.shape, dtype=np.uint16)
        ranks = np.arange(self.n_experts, dtype=np.uint16)
        np.put_along_axis(place, order, np.broadcast_to(ranks, order.shape), axis=1)
        return place
