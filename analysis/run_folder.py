"""The folder of a run, on disk or in an object store, whose files are checked at the door."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from bhlog.analysis.replay.listed import LIST_NAME, MOST_LIST_BYTES, read_list
from bhlog.analysis.storage import filesystem, read_manifest
from bhlog.capture.contract.errors import CorruptManifest, CorruptShard, one_line
from bhlog.capture.contract.manifest import Seal, manifest_name
from bhlog.capture.contract.opening import open_sealed, refused
from bhlog.capture.contract.schema import SHARD_NAME, schema_difference, shard_schema
from bhlog.capture.contract.store import reached
from bhlog.capture.contract.uris import shown

_NO_LISTS = 1  # version of the schema whose replays have no list of their parts


class RunFolder:
    """The one place that opens a run's files.

    Attributes:
        path: the folder or URI as given, less the secrets of a URI.
        manifest: what the run is, merged over its ranks.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = shown(str(path))
        self._fs, self._root = filesystem(str(path))
        self._given = str(path)
        self.manifest = read_manifest(self.path, self._fs, self._root)
        self._replays: dict[str, Mapping[str, Seal] | None] = {}

    @property
    def location(self) -> PurePosixPath:
        """The folder in its file system: absolute on a disk, bucket and key in an object store."""
        return PurePosixPath(self._root)

    @property
    def source(self) -> str:
        """What opens the run again in another process, with the secrets of a URI."""
        return self._root if self.is_local else self._given

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
    def expert_bytes(self) -> dict[int, int] | None:
        """Bytes of an expert of each layer, where the run tells: logs of some engines do.

        Raises:
            CorruptManifest: it tells something else.
        """
        told = self.manifest.options.get("expert_bytes")
        if not told:
            return None
        try:
            sizes = {int(layer): size for layer, size in told.items()}
            if not all(type(size) is int and 0 < size < 1 << 53 for size in sizes.values()):
                raise ValueError
        except (AttributeError, ValueError):
            raise CorruptManifest(
                f"{self.path}: expert_bytes is no number of bytes for each layer; restore the "
                "manifest from a copy"
            ) from None
        return sizes

    @property
    def has_logits(self) -> bool:
        """Whether the run logged logits, not decisions alone."""
        return self.manifest.logits

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

    @property
    def gap(self) -> str | None:
        """What readers are told where files are missing."""
        missing = self.missing
        if not missing:
            return None
        return (
            f"{self.path}: {len(missing)} files are missing, from {missing[0]} on; what follows is "
            "of the rest: see bhlog verify"
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
        """A file of the run for reading, by its path inside the run.

        Raises:
            CorruptShard: it is a link out of the run, no regular file, or a shard that the
                manifest of a closed run does not list.
            OSError: it cannot be opened.
        """
        folder, _, name = path.rpartition("/")
        if folder in ("routing", "tokens") and self.manifest.closed and name not in self._listed:
            raise CorruptShard(
                f"{self.path}/{path}: not in the manifest of the closed run; move it away to read "
                "the rest"
            )
        why = refused(Path(self._root), path) if self.is_local else None
        if why is not None:
            raise CorruptShard(f"{self.path}/{path}: {why}; replace it by a copy of the file")
        return self._fs.open_input_file(f"{self._root}/{path}")

    def seal(self, path: str) -> Seal | None:
        """What a shard was when it was written, by its path inside the run; None if unknown."""
        folder, _, name = path.rpartition("/")
        if folder.startswith("replay/"):
            parts = self.replay_parts(folder)
            if parts is not None and name not in parts:
                raise CorruptShard(f"{self.path}/{path}: not in {LIST_NAME} beside it")
            return None if parts is None else parts[name]
        return self._seals.get(path)

    @cached_property
    def replay_folders(self) -> tuple[str, ...]:
        """Folders of the run's replays, by their path inside the run, sorted."""
        folders = {path.rpartition("/")[0] for path in self.tree()}
        return tuple(sorted(f for f in folders if f.startswith("replay/") and f.count("/") == 1))

    def replay_parts(self, folder: str) -> Mapping[str, Seal] | None:
        """Seals of a replay's parts by file name; None of an older run's, which may have no list.

        Raises:
            CorruptShard: the list cannot be read, or is gone.
        """
        if folder not in self._replays:
            path = f"{folder}/{LIST_NAME}"
            parts = None
            if path in self.tree():
                with self.open_file(path) as file:
                    text = file.read(MOST_LIST_BYTES)
                parts = read_list(text, f"{self.path}/{path}")
            elif self.manifest.schema_version > _NO_LISTS:
                raise CorruptShard(
                    f"{self.path}/{path}: missing: its replay is not whole; remove the folder and "
                    "make the replay again with bhlog replay"
                )
            self._replays[folder] = parts
        return self._replays[folder]

    @cached_property
    def _listed(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.manifest.shards)

    @cached_property
    def _seals(self) -> dict[str, Seal]:
        entries = self.manifest.shards
        routing = {f"routing/{e.name}": e.routing_seal for e in entries}
        tokens = {f"tokens/{e.name}": e.tokens_seal for e in entries}
        return {path: seal for path, seal in {**routing, **tokens}.items() if seal is not None}

    def open_shard(self, folder: str, name: str) -> pq.ParquetFile:
        """A sealed shard of `routing` or `tokens`, its columns checked against the schema.

        Raises:
            CorruptShard: no readable footer, or other columns.
        """
        where = f"{self.path}/{folder}/{name}"
        try:
            file = self.open_file(f"{folder}/{name}")
        except OSError as error:
            raise CorruptShard(
                f"{where}: cannot be opened ({one_line(str(error))}); restore the file, or move it "
                "away to read the rest"
            ) from error
        return self.open_parquet(f"{folder}/{name}", file, self.schema(folder))

    def open_parquet(
        self, path: str, file: pa.NativeFile, schema: pa.Schema | None
    ) -> pq.ParquetFile:
        """An open file of the run as Parquet, checked against its seal and these columns.

        Raises:
            CorruptShard: no readable footer, another one than was sealed, or other columns.
        """
        where = f"{self.path}/{path}"
        try:
            shard = open_sealed(file, self.seal(path), bounded=schema is not None)
            found = shard.schema_arrow
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = one_line(str(error).splitlines()[0])
            raise CorruptShard(
                f"{where}: no readable Parquet footer in {file.size():,} bytes ({reason}). Shards "
                "get their name only when complete, so this copy is probably cut short or "
                "damaged: compare it with the original, or move it away to read the rest."
            ) from error
        difference = None if schema is None else schema_difference(found, schema)
        if difference:
            raise CorruptShard(f"{where}: {difference}")
        return shard

    def _shards(self, folder: str) -> tuple[str, ...]:
        return tuple(sorted(name for name in self._names(folder) if SHARD_NAME.fullmatch(name)))

    def _names(self, folder: str) -> list[str]:
        selector = pafs.FileSelector(
            f"{self._root}/{folder}" if folder else self._root, allow_not_found=True
        )
        with reached(self.path):
            return [info.base_name for info in self._fs.get_file_info(selector)]
