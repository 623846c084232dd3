"""The files of opened runs as DuckDB sees them: by name, for reading only, nothing beside them.

What is read of a shard is checked as it passes: a column chunk against the checksums of its pages.
"""

import os
import re
import threading
import warnings
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem

from bhlog.analysis.database.failures import Failures
from bhlog.analysis.database.pages import Chunk, chunks_of, page_error
from bhlog.analysis.log import Log
from bhlog.analysis.replay.parts import SCHEMA as DECISIONS
from bhlog.capture.contract.errors import CorruptShard
from bhlog.capture.contract.manifest import Seal
from bhlog.capture.contract.schema import SHARD_NAME

SCHEME = "bhlog"
_SMALL_BYTES = 1 << 15  # of a chunk whose headers take longer to read than its data to check
_HELD_BYTES = 256 << 20  # of chunks that are read in parts, over all files


class RunFiles(AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """A read-only file system of runs' sealed files: bhlog://RUN/routing/rank00000-00000.parquet.

    The files are listed once, when the run is opened. A path that is not among them does not
    exist, whatever it spells; opening one for writing is refused. Reads go through the log's own
    pyarrow file system, so a folder and an object store are the same here.

    Attributes:
        failures: the errors that a reader of these files met.
    """

    protocol = SCHEME
    cachable = False

    def __init__(self, runs: Mapping[str, Log]) -> None:
        """List the files of these runs, which are named by the keys."""
        super().__init__()
        self._opened = datetime.now(UTC)
        self.failures = Failures()
        self._files: dict[str, tuple[Log, str, int]] = {}  # log, path inside the run, bytes
        for name, log in runs.items():
            for path, size in log.tree().items():
                folder, _, file = path.rpartition("/")
                shard = folder in ("routing", "tokens") or re.fullmatch(r"replay/[^/]+", folder)
                if path == "kde.parquet" or (shard and SHARD_NAME.fullmatch(file)):
                    self._files[f"{name}/{path}"] = (log, path, size)
            for folder in log.replay_folders:  # a part that is gone is met when it is opened
                for file, seal in (self._listed(log, folder) or {}).items():
                    self._files.setdefault(
                        f"{name}/{folder}/{file}", (log, f"{folder}/{file}", seal.bytes)
                    )
        self._layouts: dict[str, _Layout] = {}
        self._held = _Held()
        self._unchecked = _Unchecked()

    def _listed(self, log: Log, folder: str) -> Mapping[str, Seal] | None:
        """Seals of a replay's parts; a list that cannot be read is told when a part is opened."""
        try:
            return log.replay_parts(folder)
        except CorruptShard:
            return None

    def listing(self, run: str, folder: str) -> dict[str, int]:
        """Bytes of a file of a run or of those below a folder, by path for DuckDB, sorted."""
        start = f"{run}/{folder}"
        return {
            f"{SCHEME}://{path}": size
            for path, (_, _, size) in sorted(self._files.items())
            if path == start or path.startswith(f"{start}/")
        }

    def outside(self) -> tuple[str, str] | None:
        """The first file that is a link out of its run's folder, and where it leads; else None."""
        folders: dict[Log, Path] = {}
        for log, path, _ in self._files.values():
            if not log.is_local:
                continue
            if log not in folders:
                folders[log] = Path(log.location).resolve()
            found = Path(os.path.realpath(Path(log.location, path)))  # stands links in a circle
            if not found.is_relative_to(folders[log]):
                return f"{log.path}/{path}", str(found)
        return None

    def open(self, path: str, mode: str = "rb", **_: Any) -> "_Reader":
        """Open a listed file for reading; PermissionError for any other mode.

        Raises:
            CorruptShard: it has no readable footer, or other columns than its folder's files.
        """
        if mode not in ("r", "rb"):
            raise PermissionError(f"{path}: the files of a run are only read")
        log, inside, size = self._find(path)
        with self.failures.kept():
            try:
                file = log.open_file(inside)
            except OSError as error:
                raise CorruptShard(f"{log.path}/{inside}: cannot be opened ({error})") from error
            layout = self._layouts.get(path)
            if layout is None:
                layout = self._layouts[path] = _Layout(log, inside, size, file, self._unchecked)
        return _Reader(file, layout, self.failures, self._held)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Size and kind of a listed file."""
        return {"name": path, "size": self._find(path)[2], "type": "file"}

    def modified(self, path: str) -> datetime:
        """When the run was opened: the files of a run never change."""
        self._find(path)
        return self._opened

    def glob(self, path: str, **_: Any) -> list[str]:
        """The path itself if it is listed; names are never patterns."""
        return [path] if path.removeprefix(f"{SCHEME}://") in self._files else []

    def _find(self, path: str) -> tuple[Log, str, int]:
        try:
            return self._files[path.removeprefix(f"{SCHEME}://")]
        except KeyError:
            raise FileNotFoundError(f"{path}: no such file in the opened runs") from None


class _Layout:
    """Where the column chunks of a file lie, as its footer says.

    Attributes:
        where: path of the file, for errors.
        size: its bytes.
        footer: where its footer begins, after the last chunk.
    """

    def __init__(
        self, log: Log, inside: str, size: int, file: pa.NativeFile, unchecked: "_Unchecked"
    ) -> None:
        self.where, self.size = f"{log.path}/{inside}", size
        folder = inside.partition("/")[0]
        expected = DECISIONS if folder == "replay" else None
        if folder in ("routing", "tokens"):
            expected = log.schema(folder)
        self._metadata = log.open_parquet(inside, file, expected).metadata
        self.footer = size - self._metadata.serialized_size - 8
        self._chunks: list[Chunk] | None = None
        self._seen: dict[int, int] = {}  # CRC-32 of small chunks that were checked page by page
        self._unchecked = unchecked

    def chunks(self, start: int, end: int) -> list[Chunk]:
        """The chunks that have a byte in [start, end)."""
        if self._chunks is None:
            self._chunks = chunks_of(self._metadata)
            self._ends = [chunk.end for chunk in self._chunks]
            self._starts = [chunk.start for chunk in self._chunks]
        return self._chunks[bisect_right(self._ends, start) : bisect_left(self._starts, end)]

    def check(self, data: memoryview, chunk: Chunk) -> None:
        """Check the bytes of a chunk; warn where it has no checksums.

        Raises:
            CorruptShard: they are not what was written.
        """
        small = len(data) <= _SMALL_BYTES
        whole = zlib.crc32(data) if small else 0
        if small and self._seen.get(chunk.start) == whole:
            return
        error = page_error(data, chunk)
        if error is None and small:
            self._seen[chunk.start] = whole
        if error:
            raise CorruptShard(
                f"{self.where}: row group {chunk.group} cannot be read (column {chunk.column}: "
                f"{error}); restore the file, or move it away to read the rest"
            )
        if error == "":
            self._unchecked(self.where)


class _Unchecked:
    """Warns of the first file without checksums; the others of a run are as that one is."""

    def __init__(self) -> None:
        self._warned = False

    def __call__(self, where: str) -> None:
        if self._warned:
            return
        self._warned = True
        with suppress(UserWarning):  # DuckDB called: an error here would be the query's
            warnings.warn(
                f"{where}: its pages have no checksums, so that what is read of it is not checked",
                stacklevel=2,
            )


class _Held:
    """Chunks that are read in parts, checked and held until their last byte is asked for."""

    def __init__(self) -> None:
        self._chunks: dict[tuple[str, int], bytes] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[str, int]) -> bytes | None:
        with self._lock:
            return self._chunks.get(key)

    def put(self, key: tuple[str, int], data: bytes) -> None:
        with self._lock:
            self._bytes += len(data) - len(self._chunks.get(key, b""))
            self._chunks[key] = data
            while self._bytes > _HELD_BYTES and len(self._chunks) > 1:
                self._bytes -= len(self._chunks.pop(next(iter(self._chunks))))

    def drop(self, key: tuple[str, int]) -> None:
        with self._lock:
            self._bytes -= len(self._chunks.pop(key, b""))


class _Reader:
    """A file with a position for each thread: DuckDB's threads seek and read one handle."""

    def __init__(
        self, file: pa.NativeFile, layout: _Layout, failures: Failures, held: _Held
    ) -> None:
        self._file, self._layout = file, layout
        self._failures, self._held = failures, held
        self._at = threading.local()
        self._first = True
        self.closed = False

    def seek(self, offset: int, whence: int = 0) -> int:
        start = {0: 0, 1: self.tell(), 2: self._layout.size}[whence]
        self._at.position = start + offset
        return start + offset

    def tell(self) -> int:
        position: int = getattr(self._at, "position", 0)
        return position

    def read(self, size: int = -1) -> bytes:
        """The next bytes, of chunks that were checked whole.

        Raises:
            CorruptShard: a chunk is not what was written, or storage does not give it.
        """
        start = self.tell()
        end = self._layout.size if size < 0 else min(start + size, self._layout.size)
        with self._failures.kept():
            try:
                data = self._checked(start, end)
            except OSError as error:
                raise CorruptShard(f"{self._layout.where}: cannot be read ({error})") from error
        self._at.position = start + len(data)
        return data

    def _checked(self, start: int, end: int) -> bytes:
        first, self._first = self._first, False
        chunks = self._layout.chunks(start, end)
        if not chunks:
            return self._read_at(start, end)
        if first and self._looks_for_the_footer(start, end, chunks[0]):
            footer = self._layout.footer
            return bytes(footer - start) + self._read_at(footer, end)
        if start <= chunks[0].start and chunks[-1].end <= end:
            data = self._read_at(start, end)
            view = memoryview(data)
            for chunk in chunks:
                self._layout.check(view[chunk.start - start : chunk.end - start], chunk)
            return data
        pieces, at = [], start
        for chunk in chunks:
            if at < chunk.start:  # bytes between chunks belong to no column
                pieces.append(self._read_at(at, chunk.start))
                at = chunk.start
            to = min(end, chunk.end)
            pieces.append(self._part(chunk, at, to))
            at = to
        if at < end:
            pieces.append(self._read_at(at, end))
        return b"".join(pieces)

    def _looks_for_the_footer(self, start: int, end: int, chunk: Chunk) -> bool:
        """Whether DuckDB reads the end of a file to find the footer, and asks again for the rest.

        Zeros, which are no page, stand for chunks there: they would have to be read and checked.
        """
        length = end - start
        power = length & (length - 1) == 0
        return end == self._layout.size and start != chunk.start and (power or not start)

    def _part(self, chunk: Chunk, start: int, end: int) -> bytes:
        key = (self._layout.where, chunk.start)
        data = self._held.get(key)
        if data is None:
            data = self._read_at(chunk.start, chunk.end)
            self._layout.check(memoryview(data), chunk)
            self._held.put(key, data)
        if end == chunk.end:
            self._held.drop(key)
        return data[start - chunk.start : end - chunk.start]

    def _read_at(self, start: int, end: int) -> bytes:
        data: bytes = self._file.read_at(end - start, start)
        return data

    def close(self) -> None:
        self._file.close()
        self.closed = True
