"""Rows: whether the decisions in a batch are such as the rule could have made."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.log import Log, logits_of
from bhlog.analysis.verify.weighed import not_finite
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.rule import finite_keys, no_finite_logit

_OUT_OF_ORDER = "experts are not in order of falling logit"


def expert_problems(
    log: Log, batch: pa.RecordBatch, *, by_logit: bool
) -> tuple[list[tuple[int, str]], int]:
    """What is wrong with the decisions of a batch, and its rows with a NaN or infinite logit.

    Args:
        by_logit: whether experts must come in order of falling logit.

    Returns:
        (first row, problem in words) of each kind of problem, and the count.
    """
    logits = logits_of(batch) if log.has_logits else _no_logits(len(batch), log.n_experts)
    finite = np.asarray(np.isfinite(logits).all(axis=1))
    nonfinite = int((~finite).sum())
    problems = [
        (int(np.argmax(wrong)), f"{words} ({int(wrong.sum()):,} such rows)")
        for wrong, words in _checks(log, batch, logits, finite, by_logit)
        if wrong.any()
    ]
    return problems, nonfinite


def _no_logits(rows: int, n_experts: int) -> NDArray[np.float32]:
    """(T, E): logits that any choice agrees with."""
    return np.broadcast_to(np.float32(0), (rows, n_experts))


def _checks(
    log: Log,
    batch: pa.RecordBatch,
    logits: NDArray[np.float32],
    finite: NDArray[np.bool_],
    by_logit: bool,
) -> Iterator[tuple[NDArray[np.bool_], str]]:
    """(T,) bool of wrong rows, and what is wrong with them."""
    E = log.n_experts
    experts = batch.column("experts")
    n = values_of(batch.column("n_selected")).astype(np.int64)
    lengths, weights = (
        values_of(batch.column(name).value_lengths()).astype(np.int64)
        for name in ("experts", "weights")
    )
    yield n != lengths, "n_selected is not the number of experts"
    yield weights != lengths, "experts and weights differ in number"
    yield not_finite(batch, finite), "a weight is NaN, infinite or negative, its logits are finite"
    width = max(1, int(lengths.max(initial=0)))
    logged = padded_experts(experts, width).astype(np.int64)
    used = np.arange(width) < lengths[:, None]  # (T, width)
    beyond = np.any((logged >= E) & used, axis=1)
    yield np.asarray(beyond), f"an expert is not below {E}"
    filled = np.sort(np.where(used, logged, E + 0x10000 + np.arange(width)), axis=1)
    twice = np.any(np.diff(filled, axis=1) == 0, axis=1)
    yield np.asarray(twice), "an expert is there twice"
    options, rejected = log.manifest.routing.options, batch.column("n_rejected")
    if options is None:
        yield _valid(rejected), "n_rejected under native routing, expected null"
        return
    low, high = options.bounds(E)
    if not options.named.tests:
        yield _valid(rejected), f"n_rejected under {options.policy}, which tests nothing"
        outside = ((n < low) | (n > high)) & ~no_finite_logit(logits)
        yield outside, f"n_selected is not within [{low}, {high}]"
        if by_logit:
            yield _rises(logits, logged, used), _OUT_OF_ORDER
        return
    yield ~_valid(rejected), "no n_rejected under BH routing"
    bounded = np.clip(values_of(rejected.fill_null(0)).astype(np.int64), low, high)
    yield (
        (n != bounded) & ~no_finite_logit(logits),
        f"n_selected is not n_rejected within [{low}, {high}]",
    )
    if by_logit:
        yield _rises(logits, logged, used), _OUT_OF_ORDER


def _rises(
    logits: NDArray[np.float32], logged: NDArray[np.int64], used: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """(T,): rows with an expert after one of a smaller logit."""
    keys = finite_keys(logits)
    safe = np.where(used & (logged < keys.shape[1]), logged, 0)
    chosen = keys[np.arange(len(keys))[:, None], safe]
    return np.asarray(((chosen[:, 1:] > chosen[:, :-1]) & used[:, 1:]).any(axis=1))


def _valid(column: pa.Array) -> NDArray[np.bool_]:
    return values_of(column.is_valid())


def padded_experts(experts: pa.ListArray, width: int) -> NDArray[np.uint16]:
    """(T, width) uint16: the lists of a column side by side, 0 beyond their ends."""
    lengths = values_of(experts.value_lengths())
    result = np.zeros((len(experts), width), dtype=np.uint16)
    result[np.arange(width) < lengths[:, None]] = values_of(experts.flatten())
    return result
