"""The files of opened runs as DuckDB sees them: by name, for reading only, nothing beside them."""

import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem

from bhlog.analysis.log import Log
from bhlog.capture.contract.schema import SHARD_NAME

SCHEME = "bhlog"


class RunFiles(AbstractFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """A read-only file system of runs' sealed files: bhlog://RUN/routing/rank00000-00000.parquet.

    The files are listed once, when the run is opened. A path that is not among them does not
    exist, whatever it spells; opening one for writing is refused. Reads go through the log's own
    pyarrow file system, so a folder and an object store are the same here.
    """

    protocol = SCHEME
    cachable = False

    def __init__(self, runs: Mapping[str, Log]) -> None:
        """List the files of these runs, which are named by the keys."""
        super().__init__()
        self._opened = datetime.now(UTC)
        self._files: dict[str, tuple[Log, str, int]] = {}  # log, path inside the run, bytes
        for name, log in runs.items():
            for path, size in log.tree().items():
                folder, _, file = path.rpartition("/")
                shard = folder in ("routing", "tokens") or re.fullmatch(r"replay/[^/]+", folder)
                if path == "kde.parquet" or (shard and SHARD_NAME.fullmatch(file)):
                    self._files[f"{name}/{path}"] = (log, path, size)

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
            found = Path(log.location, path).resolve()
            if not found.is_relative_to(folders[log]):
                return f"{log.path}/{path}", str(found)
        return None

    def open(self, path: str, mode: str = "rb", **_: Any) -> "_Reader":
        """Open a listed file for reading; PermissionError for any other mode."""
        if mode not in ("r", "rb"):
            raise PermissionError(f"{path}: the files of a run are only read")
        log, inside, size = self._find(path)
        return _Reader(log.open_file(inside), size)

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


class _Reader:
    """A file with a position for each thread: DuckDB's threads seek and read one handle."""

    def __init__(self, file: pa.NativeFile, size: int) -> None:
        self._file, self._size = file, size
        self._at = threading.local()
        self.closed = False

    def seek(self, offset: int, whence: int = 0) -> int:
        start = {0: 0, 1: self.tell(), 2: self._size}[whence]
        self._at.position = start + offset
        return start + offset

    def tell(self) -> int:
        position: int = getattr(self._at, "position", 0)
        return position

    def read(self, size: int = -1) -> bytes:
        position = self.tell()
        wanted = self._size - position if size < 0 else size
        data: bytes = self._file.read_at(wanted, position)
        self._at.position = position + len(data)
        return data

    def close(self) -> None:
        self._file.close()
        self.closed = True
