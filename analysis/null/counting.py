"""Counting the logits of runs: what a null model is fitted from, in one pass over the shards."""

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.log import Log, Progress, layer_of, logits_of
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
    if not 0 < sample <= 1:
        raise InvalidOption(f"sample must be above 0 and at most 1, got {sample}")
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
    columns = ["logits"] if sample == 1 else ["logits", "rank", "sequence", "position"]
    by_thread: dict[int, HistogramAccumulator] = {}
    for log in logs:
        log.fold(
            lambda: _Counting(accumulator, by_thread, sample),
            columns,
            layers=layers,
            where=where,
            threads=threads,
            progress=progress,
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
    sample: float

    def update(self, batch: pa.RecordBatch) -> None:
        logits = logits_of(batch)
        if self.sample < 1:
            logits = logits[sampled(batch, self.sample)]
        thread = threading.get_ident()
        if thread not in self.by_thread:
            self.by_thread[thread] = self.kind.empty_copy()
        self.by_thread[thread].update(layer_of(batch), logits)

    def merge(self, other: Self) -> None:
        """Nothing to do: all parts share the accumulators of the threads."""


def sampled(batch: pa.RecordBatch, share: float) -> NDArray[np.bool_]:
    """(T,) bool: rows of the tokens in a sample, decided by (rank, sequence, position) alone.

    Reference:
        Steele, Lea and Flood (2014), OOPSLA: the finalizer of SplitMix64.
    """
    rank, sequence, position = (
        batch.column(name).to_numpy().astype(np.uint64) for name in ("rank", "sequence", "position")
    )
    mixed = np.zeros(len(rank), dtype=np.uint64)
    for part in (rank, sequence, position):
        mixed = (mixed ^ part) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    uniform = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    chosen: NDArray[np.bool_] = uniform < share
    return chosen
