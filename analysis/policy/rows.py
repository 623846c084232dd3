"""Rows as policies see them: logits, ranks, probabilities and p-values, each computed once."""

from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from capture.contract.bh import finite_keys, no_finite_logit, p_value_order
from capture.contract.errors import KdeMismatch
from capture.contract.null import LayerNull


class Ranking:
    """Experts of T rows in order of preference.

    Attributes:
        order: (T, E) uint16, experts from the first choice on.
        probability: (T, E) float64, softmax probability of the experts in that order.
    """

    def __init__(self, order: NDArray[np.uint16], probability: NDArray[np.float64]) -> None:
        self.order, self.probability = order, probability

    @cached_property
    def place(self) -> NDArray[np.uint16]:
        """(T, E): place of each expert in the order, from 0."""
        T, E = self.order.shape
        place = np.empty((T, E), dtype=np.uint16)
        ranks = np.broadcast_to(np.arange(E, dtype=np.uint16), (T, E))
        place[np.arange(T)[:, None], self.order] = ranks
        return place

    @cached_property
    def cumulative(self) -> NDArray[np.float64]:
        """(T, E + 1): softmax probability of the first k experts, k = 0..E."""
        T, E = self.order.shape
        sums = np.zeros((T, E + 1))
        np.cumsum(self.probability, axis=1, out=sums[:, 1:])
        return sums


class Rows:
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
        self.logits, self.null, self.logged = logits, null, logged
        self._given_p = p
        self._thresholds = {} if thresholds is None else thresholds
        self.undecided = np.flatnonzero(no_finite_logit(logits))
        self.n_logged = np.zeros(len(self.undecided), dtype=np.uint16)
        self._kept: list[list[int]] = [[] for _ in self.undecided]
        if logged is not None and len(self.undecided):
            self._kept = logged.take(pa.array(self.undecided)).to_pylist()
            self.n_logged = np.array([len(experts) for experts in self._kept], dtype=np.uint16)

    @property
    def n_experts(self) -> int:
        """Experts per router."""
        return int(self.logits.shape[1])

    @cached_property
    def keys(self) -> NDArray[np.float32]:
        """(T, E) logits, those that are not finite as -inf."""
        return finite_keys(self.logits)

    @cached_property
    def n_finite(self) -> NDArray[np.int64]:
        """(T,): finite logits of each row."""
        return np.asarray(np.isfinite(self.logits).sum(axis=1))

    @cached_property
    def by_logit(self) -> Ranking:
        """Experts by falling logit, ties to the lower index."""
        return self._ranking(self._falling)

    @cached_property
    def sorted_keys(self) -> NDArray[np.float32]:
        """(T, E) keys, each row falling."""
        return np.take_along_axis(self.keys, self._falling, axis=1)

    @cached_property
    def probability(self) -> NDArray[np.float64]:
        """(T, E) softmax over all experts, in order of falling logit; 0 where not finite."""
        keys = self.sorted_keys.astype(np.float64)
        top = keys[:, :1]
        weight = np.exp(keys - np.where(np.isfinite(top), top, 0.0))
        total = weight.sum(axis=1, keepdims=True)
        return np.asarray(weight / np.where(total > 0, total, 1.0))

    @property
    def p_follows_logits(self) -> bool:
        """Whether the order by p-value is the order by logit: one null curve for all experts."""
        return self._given_p is None and self.null is not None and self.null.pooled

    @cached_property
    def p(self) -> NDArray[np.float64]:
        """(T, E) p-values of the experts.

        Raises:
            KdeMismatch: there is neither a null model nor p-values.
        """
        if self._given_p is not None:
            return self._given_p
        if self.null is None:
            raise KdeMismatch("p-values need a null model; name one with --kde FILE")
        return self.null.p_value(self.logits)

    @cached_property
    def by_p(self) -> Ranking:
        """Experts by rising p-value, ties to the larger logit, then to the lower index."""
        if self.p_follows_logits:
            return self.by_logit
        return self._ranking(p_value_order(self.keys, self.p))

    @cached_property
    def sorted_p(self) -> NDArray[np.float64]:
        """(T, E) p-values in the order of by_p; infinite where the logit is not finite."""
        if self.p_follows_logits:
            assert self.null is not None
            p = self.null.p_value(self.sorted_keys)
            return np.where(self.sorted_keys == -np.inf, np.inf, p)
        p = np.where(np.isfinite(self.logits), self.p, np.inf)
        return np.take_along_axis(p, self.by_p.order.astype(np.int64), axis=1)

    def thresholds(self, alpha: float) -> NDArray[np.float32]:
        """Thresholds of the null model at alpha; see LayerNull.thresholds."""
        if alpha not in self._thresholds:
            assert self.null is not None
            self._thresholds[alpha] = self.null.thresholds(alpha, self.n_experts)
        return self._thresholds[alpha]

    @cached_property
    def _falling(self) -> NDArray[np.int64]:
        return np.argsort(-self.keys, axis=1, kind="stable")

    def _ranking(self, by: NDArray[np.int64]) -> Ranking:
        order = by.astype(np.uint16)
        for row, experts in zip(self.undecided, self._kept, strict=True):
            order[row] = [*experts, *np.setdiff1d(np.arange(self.n_experts), experts)]
        if by is self._falling:
            return Ranking(order, self.probability)
        places = self.by_logit.place[np.arange(len(order))[:, None], order]
        return Ranking(order, np.take_along_axis(self.probability, places.astype(np.int64), 1))


def last_passing(passes: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(T,): the largest rank k from 1 whose column k - 1 is true, 0 if none is: a step-up rule."""
    E = passes.shape[1]
    last = E - np.argmax(passes[:, ::-1], axis=1)
    return np.where(passes.any(axis=1), last, 0)
