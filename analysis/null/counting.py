"""Counting the logits of runs: what a null model is fitted from, in one pass over the shards."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import pyarrow as pa

from bhlog.analysis.fold import Progress, Scope, fold
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.histogram import HistogramAccumulator
from bhlog.capture.contract.null.model import layer_ranges


def count_logits(
    logs: Sequence[Log],
    accumulator: HistogramAccumulator,
    *,
    layers: Iterable[int] | None = None,
    where: str | None = None,
    sample: float = 1.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> HistogramAccumulator:
    """Count the logits of runs into an accumulator and return it; see fit_kde."""
    if not logs:
        raise InvalidOption("name at least one run")
    model = logs[0].manifest.model
    for log in logs:
        other = log.manifest.model
        if (other.layers, other.n_experts) != (model.layers, model.n_experts):
            raise KdeMismatch(
                f"{log.path} has layers {layer_ranges(other.layers)} of {other.n_experts} experts, "
                f"{logs[0].path} has {layer_ranges(model.layers)} of {model.n_experts}; "
                "fit a null model from runs of one model"
            )
    for trim in accumulator.trims:
        trim.check(model.n_experts)
    by_thread: dict[int, HistogramAccumulator] = {}
    for log in logs:
        fold(
            log,
            lambda: _Counting(accumulator, by_thread),
            ["logits"],
            Scope(layers, where, sample, threads, progress),
        )
    for part in by_thread.values():
        accumulator.merge(part)
    return accumulator


@dataclass
class _Counting:
    """The fold over record batches that feeds HistogramAccumulators.

    Integers add up alike in any order, so batches go to one accumulator per thread rather than one
    per stretch of the log: fewer tables to fill and to merge.
    """

    kind: HistogramAccumulator
    by_thread: dict[int, HistogramAccumulator]

    def update(self, batch: pa.RecordBatch) -> None:
        logits = logits_of(batch)
        thread = threading.get_ident()
        if thread not in self.by_thread:
            self.by_thread[thread] = self.kind.empty_copy()
        self.by_thread[thread].update(layer_of(batch), logits)

    def merge(self, other: Self) -> None:
        """Nothing to do: all parts share the accumulators of the threads."""
