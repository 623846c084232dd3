"""The log of a run, opened for reading: manifest, null model, and folds over its rows."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bhlog.analysis.condition import TOKEN, Condition, ShardTokens, condition
from bhlog.analysis.run_folder import RunFolder
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.checksum import MOST_BYTES
from bhlog.capture.contract.errors import (
    CorruptKde,
    CorruptShard,
    InvalidOption,
)
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.opening import refused
from bhlog.capture.contract.schema import (
    COLUMNS,
    filled,
    lacking,
    shard_schema,
)
from bhlog.capture.contract.store import reached

_MOST_TOKENS = 8  # shards of tokens kept for conditions that ask for their columns


@dataclass(frozen=True)
class RowGroup:
    """A row group of a shard, which holds one layer.

    Attributes:
        shard: file name, such as rank00000-00000.parquet.
        index: row group in the shard.
        layer: decoder layer of its rows.
        rows: number of rows.
    """

    shard: str
    index: int
    layer: int
    rows: int


class Log(RunFolder):
    """A run's folder, on disk or in an object store, open for reading.

    Attributes:
        path: the folder or URI as given, less the secrets of a URI.
        manifest: what the run is, merged over its ranks.
        executor: does what no Scope with one of its own is given for; None: threads here.
    """

    executor: Executor | None = None

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._tokens: dict[tuple[str, tuple[str, ...]], ShardTokens] = {}

    def __repr__(self) -> str:
        model = self.manifest.model
        layers = "1 layer" if len(model.layers) == 1 else f"{len(model.layers)} layers"
        rows = f"{self.manifest.totals.rows:,} rows" if self.manifest.closed else "open"
        routing = self.manifest.routing.kind
        return (
            f"{type(self).__name__}({self.path!r}: {routing}, {layers} of {model.n_experts} "
            f"experts, {rows})"
        )

    def require_logits(self) -> None:
        """Raise InvalidOption if the run has no logits."""
        if not self.has_logits:
            raise InvalidOption(
                f"{self.path} has no logits, only the experts that were chosen: replays, sweeps, "
                "null models and their checks need a run with logits"
            )

    @cached_property
    def kde(self) -> KdeModel | None:
        """The null model in force in the run; None if it has none.

        Raises:
            CorruptKde: it cannot be read, or is not the one that the run was routed by.
        """
        path, name = f"{self._root}/kde.parquet", f"{self.path}/kde.parquet"
        with reached(self.path):
            info = self._fs.get_file_info(path)
            if info.type == pafs.FileType.NotFound:
                return None
            why = refused(Path(self._root), "kde.parquet") if self.is_local else None
            if why is not None:
                raise CorruptKde(f"{name}: {why}; replace it by a copy of the file")
            if info.type != pafs.FileType.File or info.size > MOST_BYTES:
                raise CorruptKde(f"{name}: no file of at most {MOST_BYTES:,} bytes")
            with self._fs.open_input_stream(path) as stream:
                data = stream.read()
        return KdeModel.from_bytes(data, name, sha256=self.manifest.routing.kde_sha256)

    def row_groups(self, layers: Iterable[int] | None = None) -> Iterator[RowGroup]:
        """Row groups of the routing shards in log order, of these layers (None: all).

        Raises:
            InvalidOption: the run has no such layer.
        """
        wanted = self.check_layers(layers)
        for name in self.shards:
            groups = self.groups_of(name, self.open_shard("routing", name))
            yield from (group for group in groups if group.layer in wanted)

    def groups_of(self, name: str, shard: pq.ParquetFile) -> list[RowGroup]:
        """Row groups of one open routing shard.

        Raises:
            CorruptShard: a row group holds several layers.
        """
        column = shard.metadata.schema.names.index("layer")
        groups = []
        for index in range(shard.metadata.num_row_groups):
            group = shard.metadata.row_group(index)
            statistics = group.column(column).statistics
            if statistics is None or statistics.min != statistics.max:
                raise CorruptShard(
                    f"{self.path}/routing/{name}: row group {index} holds several layers or "
                    "has no statistics; expected one layer per row group"
                )
            if statistics.min not in self.layers:
                raise CorruptShard(
                    f"{self.path}/routing/{name}: row group {index} is of layer {statistics.min}, "
                    "which the manifest does not have; restore the file from a copy"
                )
            groups.append(RowGroup(name, index, statistics.min, group.num_rows))
        return groups

    def read(
        self,
        group: RowGroup,
        columns: Sequence[str],
        where: str | None = None,
        *,
        shard: pq.ParquetFile | None = None,
    ) -> pa.RecordBatch:
        """Columns of one row group, the rows that match `where`, as one record batch.

        Columns that are newer than the run hold nulls.

        Args:
            where: a condition in SQL on columns of routing and of tokens, such as
                "phase = 'decode' AND source = 'notes.txt'".
            shard: the group's shard, if it is open already.

        Raises:
            CorruptShard: its pages cannot be decoded.
            InvalidOption: `logits` of a run without them.
        """
        pieces = self.pieces(group, columns, where, most_rows=group.rows, shard=shard)
        table = pa.Table.from_batches(pieces).combine_chunks()
        batches = table.to_batches()
        if batches:
            batch: pa.RecordBatch = batches[0]
            return batch
        return pa.RecordBatch.from_pylist([], schema=table.schema)

    def pieces(
        self,
        group: RowGroup,
        columns: Sequence[str],
        where: str | None = None,
        *,
        most_rows: int,
        shard: pq.ParquetFile | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """The same in pieces read from at most this many rows, which may all fail to match."""
        needed = list(columns)
        asked = None if where is None else condition(where)
        if asked is not None:
            needed += [name for name in asked.columns if name not in needed]
        if "logits" in needed:
            self.require_logits()
        shard = shard or self.open_shard("routing", group.shard)
        there = [name for name in needed if name in self.schema("routing").names]
        read = shard.iter_batches(max(1, most_rows), [group.index], there, use_threads=False)
        seen = 0
        while True:
            try:
                batch = next(read, None)
            except (pa.ArrowException, OSError) as error:
                raise CorruptShard(
                    f"{self.path}/routing/{group.shard}: row group {group.index} cannot be read "
                    f"({str(error).splitlines()[0]}); restore the file, or move it away to read "
                    "the rest"
                ) from error
            if batch is None:
                self._check_rows(seen, group.rows, f"routing/{group.shard}")
                return
            seen += batch.num_rows
            self._check_values(batch, f"routing/{group.shard}")
            if "layer" in there:
                layers = values_of(batch.column("layer"))
                if (layers != group.layer).any():
                    raise CorruptShard(
                        f"{self.path}/routing/{group.shard}: row group {group.index} has rows of "
                        f"layer {layers[layers != group.layer][0]}, its statistics say "
                        f"{group.layer}; restore the file from a copy"
                    )
            if len(there) < len(needed):
                batch = filled(batch, "routing", needed)
            if asked is not None:
                tokens = self._beside(group.shard, asked)
                batch = batch.filter(asked.matches(batch, tokens)).select(list(columns))
            yield batch

    def _beside(self, name: str, asked: Condition) -> ShardTokens | None:
        """What a condition asks of the tokens shard of this name; the last few are kept."""
        if not asked.of_tokens:
            return None
        key = name, asked.of_tokens
        found = self._tokens.get(key)
        if found is None:
            found = ShardTokens(self.read_tokens(name, [*TOKEN, *asked.of_tokens]))
            if len(self._tokens) >= _MOST_TOKENS:
                self._tokens.clear()
            self._tokens[key] = found
        return found

    def batches(
        self,
        columns: Sequence[str],
        *,
        layers: Iterable[int] | None = None,
        where: str | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Record batches of one layer each, in log order."""
        for group in self.row_groups(layers):
            yield self.read(group, columns, where)

    def check_layers(self, layers: Iterable[int] | None) -> set[int]:
        """The layers asked for as a set, all of the run's for None.

        Raises:
            InvalidOption: the run has no such layer.
        """
        wanted = set(self.layers) if layers is None else set(layers)
        unknown = wanted - set(self.layers)
        if unknown:
            raise InvalidOption(
                f"no layer {min(unknown)} in {self.path}; it has layers "
                f"{', '.join(map(str, self.layers))}"
            )
        return wanted

    def rows_listed(self, layers: Iterable[int] | None = None) -> int | None:
        """Rows of these layers (None: all) by the manifest, for which no shard is opened; each
        layer has as many. None where it does not say yet.

        Raises:
            InvalidOption: the run has no such layer.
        """
        share = len(self.check_layers(layers)) / max(1, len(self.layers))
        return round(self.manifest.totals.rows * share) or None

    def tokens(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Token rows of all shards, in order of rank, shard and row."""
        schema = shard_schema("tokens", self.n_experts)
        names = list(columns) if columns is not None else schema.names
        tables = [self.read_tokens(name, names) for name in self.token_shards]
        empty = pa.schema([schema.field(name) for name in names]).empty_table()
        return pa.concat_tables([empty, *tables]).unify_dictionaries()

    def read_tokens(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of one tokens shard; None reads all columns. Newer ones than the run hold nulls.

        Raises:
            CorruptShard: its pages cannot be decoded.
        """
        shard = self.open_shard("tokens", name)
        names = [column.name for column in COLUMNS["tokens"]] if columns is None else list(columns)
        there = [name for name in names if name in self.schema("tokens").names]
        try:
            table: pa.Table = shard.read(columns=there)
        except (pa.ArrowException, OSError) as error:
            raise CorruptShard(
                f"{self.path}/tokens/{name}: cannot be read ({str(error).splitlines()[0]}); "
                "restore the file, or move it away to read the rest"
            ) from error
        self._check_rows(table.num_rows, shard.metadata.num_rows, f"tokens/{name}")
        self._check_values(table, f"tokens/{name}")
        return table if len(there) == len(names) else filled(table, "tokens", names)

    def _check_rows(self, found: int, expected: int, path: str) -> None:
        """Raise CorruptShard unless pages held the rows that the footer counts."""
        if found != expected:
            raise CorruptShard(
                f"{self.path}/{path}: {found:,} rows in its pages, its footer counts "
                f"{expected:,}; restore the file, or move it away to read the rest"
            )

    def _check_values(self, rows: pa.RecordBatch | pa.Table, path: str) -> None:
        """Raise CorruptShard if a value is missing that every row has."""
        name = lacking(rows, path.partition("/")[0])
        if name is not None:
            raise CorruptShard(
                f"{self.path}/{path}: column '{name}' lacks values; restore the file, or move it "
                "away to read the rest"
            )


def logits_of(batch: pa.RecordBatch) -> NDArray[np.float32]:
    """(T, E) float32 view of a batch's logits, without a copy."""
    column = batch.column("logits")
    flat = values_of(column.flatten())
    return flat.view(np.float32).reshape(len(column), column.type.list_size)


def layer_of(batch: pa.RecordBatch) -> int:
    """The layer of a batch of the fold (all its rows have the same)."""
    layer: int = batch.column("layer")[0].as_py()
    return layer
