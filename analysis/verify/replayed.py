"""Whether replaying a run at its own settings gives the decisions that it logged."""

from functools import partial
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.fold import WHOLE, Scope, fold
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.analysis.replay.decide import COLUMNS, Decider, decider_of
from bhlog.analysis.verify.decided import padded_experts
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.rule import finite_keys


def verify_replay(log: Log, scope: Scope = WHOLE) -> pl.DataFrame:
    """Replay a run at its own settings and compare every row with what was logged.

    Under a policy the experts in order, n_selected and n_rejected must be the logged ones, but in
    rows where a probability lies on its boundary; see Policy.unsure. Under native
    routing the logged experts must hold the top_k largest logits; which of several equal ones is
    the model's affair.

    Returns:
        One row per layer: layer, rows, mismatches, and where the first one is.

    Raises:
        InvalidOption: the run's experts are not decided by its logits alone.
    """
    options = log.manifest.routing.options
    decider = None if options is None else decider_of(log, [options])
    total = fold(
        log,
        partial(_Comparison, decider, log.manifest.model.top_k),
        ("layer", "sequence", "position", *COLUMNS[1:], "n_selected", "n_rejected"),
        scope,
        whole_groups=decider is not None and decider.whole_groups,
    )
    rows = [
        {"layer": layer, "rows": n, "mismatches": wrong, "first": first}
        for layer, (n, wrong, first) in sorted(total.layers.items())
    ]
    schema = {"layer": pl.Int64, "rows": pl.Int64, "mismatches": pl.Int64, "first": pl.String}
    return pl.DataFrame(rows, schema=schema)


class _Comparison:
    """Counts rows whose replayed decision differs from the logged one."""

    def __init__(self, decider: Decider | None, top_k: int) -> None:
        self.decider, self.top_k = decider, top_k
        self.layers: dict[int, tuple[int, int, str | None]] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        n = values_of(batch.column("n_selected"))
        logged = padded_experts(batch.column("experts"), self.width(batch))
        if self.decider is None:
            wrong = self._native(batch, logged)
        else:
            (mine,) = self.decider.decide(batch)
            slots = np.arange(logged.shape[1]) < n[:, None]
            rejected = values_of(batch.column("n_rejected").fill_null(0))
            wrong = (
                (mine.n_selected != n)
                | (mine.n_rejected != rejected)
                | ((mine.order[:, : logged.shape[1]] != logged) & slots).any(axis=1)
            )
            wrong &= ~self.decider.unsure(batch)
        first = None
        if wrong.any():
            row = batch.slice(int(np.argmax(wrong)), 1).to_pylist()[0]
            first = f"rank {row['rank']} sequence {row['sequence']} position {row['position']}"
        self._count(layer_of(batch), len(wrong), int(wrong.sum()), first)

    def merge(self, other: Self) -> None:
        for layer, (n, wrong, first) in other.layers.items():
            self._count(layer, n, wrong, first)

    def width(self, batch: pa.RecordBatch) -> int:
        """Slots for the widest row of a batch."""
        return int(values_of(batch.column("n_selected")).max(initial=1))

    def _native(self, batch: pa.RecordBatch, logged: NDArray[np.uint16]) -> NDArray[np.bool_]:
        keys = finite_keys(logits_of(batch))
        best = -np.sort(-keys, axis=1)[:, : logged.shape[1]]
        mine = -np.sort(-np.take_along_axis(keys, logged.astype(np.int64), axis=1), axis=1)
        return np.asarray((best != mine).any(axis=1))

    def _count(self, layer: int, n: int, wrong: int, first: str | None) -> None:
        before = self.layers.get(layer, (0, 0, None))
        self.layers[layer] = (before[0] + n, before[1] + wrong, before[2] or first)
