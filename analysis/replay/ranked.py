"""Ranked rows: logits sorted row by row, which is all that counting experts needs.

Sorting values is eight times as fast as sorting experts by value. So the chosen experts of a row
are found as those at or above its smallest chosen logit; only rows with equal logits there need to
know which expert comes first.
"""

from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from capture.contract.bh import finite_keys

BLOCK_LOGITS = 1 << 18  # of a block: with what is derived from it, it stays in the cache


def block_rows(n_experts: int) -> int:
    """Rows of a block."""
    return max(1, BLOCK_LOGITS // n_experts)


class RankedRows:
    """T rows of one layer whose experts rank by falling logit, ties to the lower index.

    A row without a finite logit keeps the experts that were logged, ahead of all others.

    Args:
        logits: (T, E) float32.
        logged: (T,) list column, the experts that the run used.
    """

    def __init__(self, logits: NDArray[np.float32], logged: pa.ListArray) -> None:
        self.keys = finite_keys(logits)
        self.rising = np.sort(self.keys, axis=1)  # (T, E)
        T, E = self.keys.shape
        self._start = np.arange(T) * E  # of each row in a flat (T, E)
        self.undecided = np.flatnonzero(self.rising[:, -1] == -np.inf)
        self.n_logged = logged.value_lengths().to_numpy(zero_copy_only=False)
        self._logged_experts = logged.flatten().to_numpy()
        self._weights: dict[float, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        self._packed_first: dict[int, NDArray[np.uint64]] = {}

    def n_rejected(self, thresholds: NDArray[np.float32]) -> NDArray[np.int64]:
        """(T,) raw BH counts: the largest k whose k-th largest logit reaches t_k; 0 if none does.

        Args:
            thresholds: (E,) float32, t_1..t_E.
        """
        E = len(thresholds)
        passes = self.rising >= thresholds[::-1]
        first = passes.argmax(axis=1)  # rank E - first is the last that passes
        return np.where(passes.ravel().take(self._start + first), E - first, 0)

    def n_selected(
        self, n_rejected: NDArray[np.int64], min_k: int, max_k: int
    ) -> NDArray[np.int64]:
        """(T,) experts used: raw counts within the bounds."""
        n = np.clip(n_rejected, min_k, max_k)
        n[self.undecided] = self.n_logged[self.undecided]
        return n

    def first(self, k: int) -> NDArray[np.bool_]:
        """(T, E): the first k experts of each row."""
        return self.chosen(self.n_selected(np.full(len(self.keys), k), k, k))

    def chosen(self, n_selected: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(T, E): the first n_selected experts of each row."""
        E = self.keys.shape[1]
        last = self.rising.ravel().take(self._start + np.minimum(E - n_selected, E - 1))
        if not n_selected.all():
            last[n_selected == 0] = np.inf
        chosen: NDArray[np.bool_] = self.keys >= last[:, None]
        tied = np.flatnonzero(popcount(packed(chosen)) != n_selected)
        if len(tied):
            chosen[tied] = _first(self.keys[tied], last[tied], n_selected[tied])
        if len(self.undecided):
            chosen[self.undecided] = self.logged[self.undecided]
        return chosen

    def kept(self, chosen: NDArray[np.bool_], temperature: float = 1.0) -> NDArray[np.float32]:
        """(T,) float32: softmax(logits / temperature) summed over the chosen experts.

        0 in a row without a finite logit.

        Args:
            chosen: (T, E).
        """
        if temperature not in self._weights:
            top = self.rising[:, -1:]
            if len(self.undecided):
                top = np.where(top == -np.inf, np.float32(0), top)
            difference = self.keys - top
            if temperature != 1.0:
                difference /= np.float32(temperature)
            weight = np.exp(difference, out=difference)
            total = np.einsum("ij->i", weight)
            self._weights[temperature] = weight, np.where(total > 0, total, np.float32(1))
        weight, total = self._weights[temperature]
        kept: NDArray[np.float32] = np.einsum("ij,ij->i", weight, chosen.view(np.int8)) / total
        return kept

    def packed_first(self, k: int) -> NDArray[np.uint64]:
        """The first k experts of each row, as bits; see packed."""
        if k not in self._packed_first:
            self._packed_first[k] = packed(self.first(k))
        return self._packed_first[k]

    @cached_property
    def logged(self) -> NDArray[np.bool_]:
        """(T, E): the experts that the run used."""
        logged = np.zeros(self.keys.shape, dtype=np.bool_)
        if len(self._logged_experts) == self.n_logged[:1].sum() * len(self.n_logged):
            start = self._start[:, None]  # as many in every row: no need to count
            shape = (len(self._start), -1)
            logged.ravel()[(start + self._logged_experts.reshape(shape)).ravel()] = True
        else:
            logged.ravel()[np.repeat(self._start, self.n_logged) + self._logged_experts] = True
        return logged

    @cached_property
    def packed_logged(self) -> NDArray[np.uint64]:
        """The experts that the run used, as bits; see packed."""
        return packed(self.logged)


def packed(chosen: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """(T, W) uint64: the bits of (T, E) bool, 64 a word, to be counted."""
    T, E = chosen.shape
    bits = np.packbits(chosen, axis=1)
    if E % 64:
        whole = np.zeros((T, -(-E // 64) * 8), dtype=np.uint8)
        whole[:, : bits.shape[1]] = bits
        bits = whole
    return bits.view(np.uint64)


def popcount(bits: NDArray[np.uint64]) -> NDArray[np.integer]:
    """(T,): ones in each row of (T, W) words."""
    ones = np.bitwise_count(bits)
    return ones[:, 0] if ones.shape[1] == 1 else ones.sum(axis=1, dtype=np.int64)


def _first(
    keys: NDArray[np.float32], last: NDArray[np.float32], n: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """(T, E): the n experts of each row with keys at least `last`, lower ones first among equals.

    At most one in ten rows of bfloat16 logits comes here.
    """
    equal = keys == last[:, None]
    chosen = keys >= last[:, None]
    excess = chosen.sum(axis=1) - n
    few = np.flatnonzero(excess == 1)
    E = keys.shape[1]
    chosen[few, E - 1 - equal[few, ::-1].argmax(axis=1)] = False
    many = np.flatnonzero(excess > 1)
    if len(many):
        place = np.cumsum(equal[many], axis=1)  # from 1, among equals
        room = place[:, -1] - excess[many]
        chosen[many] &= ~equal[many] | (place <= room[:, None])
    return chosen
