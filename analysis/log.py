"""The log of a run, opened for reading: manifest, null model, and folds over its rows."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bhlog.analysis.condition import TOKEN, Condition, ShardTokens, condition
from bhlog.analysis.storage import filesystem, reached, read_manifest
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.checksum import MOST_BYTES
from bhlog.capture.contract.errors import (
    CorruptKde,
    CorruptShard,
    InvalidOption,
)
from bhlog.capture.contract.manifest import (
    manifest_name,
)
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.schema import (
    COLUMNS,
    SHARD_NAME,
    filled,
    lacking,
    schema_difference,
    shard_schema,
)
from bhlog.capture.contract.uris import shown

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


class Log:
    """A run's folder, on disk or in an object store, open for reading.

    Attributes:
        path: the folder or URI as given, less the secrets of a URI.
        manifest: what the run is, merged over its ranks.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = shown(str(path))
        self._fs, self._root = filesystem(str(path))
        self._tokens: dict[tuple[str, tuple[str, ...]], ShardTokens] = {}
        self.manifest = read_manifest(self.path, self._fs, self._root)

    def __repr__(self) -> str:
        model = self.manifest.model
        layers = "1 layer" if len(model.layers) == 1 else f"{len(model.layers)} layers"
        rows = f"{self.manifest.totals.rows:,} rows" if self.manifest.closed else "open"
        routing = self.manifest.routing.kind
        return (
            f"{type(self).__name__}({self.path!r}: {routing}, {layers} of {model.n_experts} "
            f"experts, {rows})"
        )

    @property
    def location(self) -> PurePosixPath:
        """The folder in its file system: absolute on a disk, bucket and key in an object store."""
        return PurePosixPath(self._root)

    @property
    def is_local(self) -> bool:
        """Whether the folder is on a disk of this machine."""
        return isinstance(self._fs, pafs.LocalFileSystem)

    @property
    def name(self) -> str:
        """Last part of the path: how tables call the run."""
        return self.location.name

    @property
    def n_experts(self) -> int:
        """Experts per router."""
        return self.manifest.model.n_experts

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers with a router, rising."""
        return self.manifest.model.layers

    @property
    def has_logits(self) -> bool:
        """Whether the run logged logits, not decisions alone."""
        return self.manifest.logits

    def require_logits(self) -> None:
        """Raise InvalidOption if the run has no logits."""
        if not self.has_logits:
            raise InvalidOption(
                f"{self.path} has no logits, only the experts that were chosen: replays, sweeps, "
                "null models and their checks need a run with logits"
            )

    def schema(self, folder: str) -> pa.Schema:
        """Columns of the run's shards in `routing` or `tokens`: those of its own version."""
        version = self.manifest.schema_version
        return shard_schema(folder, self.n_experts, version, logits=self.has_logits)

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """File names of the sealed routing shards, in order of rank and number."""
        return self._shards("routing")

    @cached_property
    def token_shards(self) -> tuple[str, ...]:
        """File names of the sealed token shards."""
        return self._shards("tokens")

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
            if info.type != pafs.FileType.File or info.size > MOST_BYTES:
                raise CorruptKde(f"{name}: no file of at most {MOST_BYTES:,} bytes")
            with self._fs.open_input_stream(path) as stream:
                data = stream.read()
        return KdeModel.from_bytes(data, name, sha256=self.manifest.routing.kde_sha256)

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """Files that the run should have and has not, by their path inside it: rows are gone."""
        listed = {shard.name for shard in self.manifest.shards}
        routing, tokens = set(self.shards), set(self.token_shards)
        manifests = {manifest_name(rank) for rank in range(self.manifest.ranks)}
        return (
            *sorted(manifests - set(self._names(""))),
            *(f"routing/{name}" for name in sorted(listed - routing)),
            *(f"tokens/{name}" for name in sorted((listed | routing) - tokens)),
        )

    def files(self, folder: str = "") -> dict[str, int]:
        """Bytes of each file in the run's folder or in one of its folders, by name, sorted."""
        selector = pafs.FileSelector(f"{self._root}/{folder}", allow_not_found=True)
        with reached(self.path):
            found = self._fs.get_file_info(selector)
        return {f.base_name: f.size for f in sorted(found, key=lambda f: f.base_name) if f.is_file}

    def tree(self) -> dict[str, int]:
        """Bytes of each file in the run's folder and below, by its path inside the run, sorted."""
        with reached(self.path):
            found = self._fs.get_file_info(pafs.FileSelector(self._root, recursive=True))
        sizes = {f.path[len(self._root) + 1 :]: f.size for f in found if f.is_file}
        return dict(sorted(sizes.items()))

    def open_file(self, path: str) -> pa.NativeFile:
        """A file of the run for reading, by its path inside the run."""
        return self._fs.open_input_file(f"{self._root}/{path}")

    def open_shard(self, folder: str, name: str) -> pq.ParquetFile:
        """A sealed shard of `routing` or `tokens`, its columns checked against the schema.

        Raises:
            CorruptShard: no readable footer, or other columns.
        """
        where = f"{self.path}/{folder}/{name}"
        file = None
        try:
            file = self._fs.open_input_file(f"{self._root}/{folder}/{name}")
            shard = pq.ParquetFile(file, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            size = 0 if file is None else file.size()
            raise CorruptShard(
                f"{where}: no readable Parquet footer in {size:,} bytes. Shards get their name "
                "only when complete, so this copy is probably cut short: compare its size with "
                "the original, or move it away to read the rest."
            ) from error
        difference = schema_difference(shard.schema_arrow, self.schema(folder))
        if difference:
            raise CorruptShard(f"{where}: {difference}")
        return shard

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
                return
            self._check_values(batch, f"routing/{group.shard}")
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
        self._check_values(table, f"tokens/{name}")
        return table if len(there) == len(names) else filled(table, "tokens", names)

    def _check_values(self, rows: pa.RecordBatch | pa.Table, path: str) -> None:
        """Raise CorruptShard if a value is missing that every row has."""
        name = lacking(rows, path.partition("/")[0])
        if name is not None:
            raise CorruptShard(
                f"{self.path}/{path}: column '{name}' lacks values; restore the file, or move it "
                "away to read the rest"
            )

    def _shards(self, folder: str) -> tuple[str, ...]:
        return tuple(sorted(name for name in self._names(folder) if SHARD_NAME.fullmatch(name)))

    def _names(self, folder: str) -> list[str]:
        selector = pafs.FileSelector(
            f"{self._root}/{folder}" if folder else self._root, allow_not_found=True
        )
        with reached(self.path):
            return [info.base_name for info in self._fs.get_file_info(selector)]


def logits_of(batch: pa.RecordBatch) -> NDArray[np.float32]:
    """(T, E) float32 view of a batch's logits, without a copy."""
    column = batch.column("logits")
    flat = values_of(column.flatten())
    return flat.view(np.float32).reshape(len(column), column.type.list_size)


def layer_of(batch: pa.RecordBatch) -> int:
    """The layer of a batch of the fold (all its rows have the same)."""
    layer: int = batch.column("layer")[0].as_py()
    return layer
