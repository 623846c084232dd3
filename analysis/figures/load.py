"""Load: how often each expert was selected, and how many a row used, counted over a whole log."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bhlog.analysis.fold import Progress, Scope, fold
from bhlog.analysis.log import Log, layer_of
from bhlog.capture.contract.arrays import values_of


class ExpertLoad:
    """Counts of the experts that rows selected.

    Attributes:
        rows: (L,) int64, rows of each layer.
        experts: (L, E) int64, rows that selected the expert.
        n_selected: (L, E + 1) int64, rows by number of experts.
    """

    COLUMNS = ("layer", "experts", "n_selected")

    def __init__(self, layers: Sequence[int], n_experts: int) -> None:
        self._index = {layer: i for i, layer in enumerate(layers)}
        self.rows = np.zeros(len(layers), dtype=np.int64)
        self.experts = np.zeros((len(layers), n_experts), dtype=np.int64)
        self.n_selected = np.zeros((len(layers), n_experts + 1), dtype=np.int64)

    def update(self, batch: pa.RecordBatch) -> None:
        layer, E = self._index[layer_of(batch)], self.experts.shape[1]
        self.rows[layer] += batch.num_rows
        self.experts[layer] += _counted(batch.column("experts").flatten(), E)
        self.n_selected[layer] += _counted(batch.column("n_selected"), E + 1)

    def merge(self, other: Self) -> None:
        self.rows += other.rows
        self.experts += other.experts
        self.n_selected += other.n_selected

    @property
    def share(self) -> NDArray[np.float64]:
        """(L, E) share of the layer's rows that selected the expert."""
        share: NDArray[np.float64] = self.experts / np.maximum(self.rows, 1)[:, None]
        return share


def expert_load(log: Log, progress: Progress | None = None) -> ExpertLoad:
    """Count a log's choices in one pass."""
    counting = partial(ExpertLoad, log.layers, log.n_experts)
    return fold(log, counting, ExpertLoad.COLUMNS, Scope(progress=progress))


@dataclass(frozen=True, eq=False)
class SourceLoad:
    """Expert load of two sources.

    Attributes:
        names: the sources, the one with more tokens first.
        tokens: tokens of each.
        share: (2, L, E) share of their tokens that selected the expert.
        n_sources: sources in the run.
    """

    names: tuple[str, str]
    tokens: tuple[int, int]
    share: NDArray[np.float64]
    n_sources: int


def source_load(log: Log) -> SourceLoad | None:
    """Expert load of the two sources with most tokens; None if the run has fewer than two.

    Holds the tokens of one shard and one row group at a time.
    """
    tokens: dict[str, int] = {}
    for name in log.token_shards:
        source = log.read_tokens(name, ["source"])["source"].cast("string")
        for pair in pc.value_counts(source).to_pylist():
            if pair["values"] is not None:
                tokens[pair["values"]] = tokens.get(pair["values"], 0) + pair["counts"]
    if len(tokens) < 2:
        return None
    first, second = sorted(tokens, key=lambda name: (-tokens[name], name))[:2]
    loads = [ExpertLoad(log.layers, log.n_experts) for _ in range(2)]
    shard, keys, which = "", np.zeros(0, np.uint64), np.zeros(0, np.int64)
    for group in log.row_groups():
        if group.shard != shard:
            shard = group.shard
            keys, which = _sources_of(log, shard, (first, second))
        batch = log.read(group, [*ExpertLoad.COLUMNS, "sequence", "position"])
        if not len(keys) or not batch.num_rows:
            continue
        mine = _keys(batch)
        at = np.minimum(np.searchsorted(keys, mine), len(keys) - 1)
        of_row = np.where(keys[at] == mine, which[at], -1)
        for i, load in enumerate(loads):
            rows = batch.filter(pa.array(of_row == i))
            if rows.num_rows:
                load.update(rows)
    return SourceLoad(
        names=(first, second),
        tokens=(tokens[first], tokens[second]),
        share=np.stack([load.share for load in loads]),
        n_sources=len(tokens),
    )


def _sources_of(
    log: Log, shard: str, names: tuple[str, str]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Keys of a shard's tokens, rising, and which of the two sources each is from, or -1."""
    if shard not in log.token_shards:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    tokens = log.read_tokens(shard, ["sequence", "position", "source"])
    found = pc.index_in(tokens["source"].cast("string"), pa.array(names))
    which = np.asarray(found.fill_null(-1)).astype(np.int64)
    keys = _keys(tokens)
    order = np.argsort(keys, kind="stable")
    return keys[order], which[order]


def _keys(table: pa.Table | pa.RecordBatch) -> NDArray[np.uint64]:
    """(T,) one number for each (sequence, position)."""
    sequence = values_of(table.column("sequence")).astype(np.uint64)
    keys: NDArray[np.uint64] = (sequence << np.uint64(32)) | values_of(table.column("position"))
    return keys


def _counted(values: pa.Array, size: int) -> NDArray[np.int64]:
    """How often each of 0..size-1 occurs."""
    return np.bincount(values_of(values), minlength=size)[:size]
