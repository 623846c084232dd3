"""Object stores: a folder behind a URI, whose objects are put whole and confirmed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOENT
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.fs as pafs

from bhlog.capture.contract.errors import InvalidOption, MissingRun, RouterLogError
from bhlog.capture.contract.uris import shown, without_secrets

_PIECE = 1 << 23  # bytes compared at a time


class Store:
    """A folder of an object store.

    Attributes:
        name: its URI, less the secrets.
        fs, root: its file system, and where it is in it.

    Raises:
        MissingRun: the URI cannot be read.
    """

    def __init__(self, uri: str) -> None:
        self.name = shown(uri)
        self._uri = uri
        with reached(uri):
            fs, root = pafs.FileSystem.from_uri(uri)
        self.fs: pafs.FileSystem = fs
        self.root: str = root.rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether it is a folder on a disk of this machine after all: file:///runs/bh."""
        return isinstance(self.fs, pafs.LocalFileSystem)

    def put(self, path: Path, inside: str = "") -> None:
        """Upload a file, and confirm it by its size and by each byte, read back.

        An object is there whole or not at all; one that is not what was sent is removed.

        Args:
            inside: its path inside the folder; none if the folder's name is the object's.

        Raises:
            OSError: it is not there; in a line, without secrets.
        """
        target = self._path(inside)
        with self._answering():
            # not a stream of Python's: its end, by an error too, would name what came so far
            pafs.copy_files(
                str(path),
                target,
                source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=self.fs,
            )
            differ = self._difference(path, target)
            if differ:
                with suppress(OSError):
                    self.remove(inside)
                raise OSError(f"{differ} arrived of what was uploaded; removed there")

    def names(self, inside: str = "") -> list[str]:
        """Names of what is in the folder or in one of its folders, sorted.

        Raises:
            OSError: the store does not answer.
        """
        selector = pafs.FileSelector(self._path(inside), allow_not_found=True)
        with self._answering():
            found = self.fs.get_file_info(selector)
        return sorted(info.base_name for info in found)

    def read(self, inside: str = "", most: int = 1 << 31) -> bytes | None:
        """The first bytes of an object; None if it is not there.

        Raises:
            OSError: the store does not answer.
        """
        with self._answering():
            if not self.fs.get_file_info(self._path(inside)).is_file:
                return None
            with self.open(inside) as file:
                data: bytes = file.read_at(min(most, file.size()), 0)
                return data

    def open(self, inside: str) -> pa.NativeFile:
        """An object for reading.

        Raises:
            OSError: it cannot be opened.
        """
        return self.fs.open_input_file(self._path(inside))

    def remove(self, inside: str = "") -> None:
        """Remove an object.

        Raises:
            OSError: it is not there, or the store does not answer.
        """
        with self._answering():
            self.fs.delete_file(self._path(inside))

    def check(self) -> None:
        """Raise InvalidOption, before the work rather than after, if there is no such bucket."""
        bucket = self.root.partition("/")[0]
        with reached(self.name):
            if self.fs.get_file_info(bucket).type == pafs.FileType.NotFound:
                raise InvalidOption(f"{self.name}: no such bucket ({bucket}); make it first")

    def _path(self, inside: str) -> str:
        return f"{self.root}/{inside}" if inside else self.root

    def _difference(self, path: Path, target: str) -> str | None:
        """How an object is not the file, in words."""
        sent = path.stat().st_size
        with path.open("rb") as mine, self.fs.open_input_file(target) as there:
            if there.size() != sent:
                return f"{there.size():,} of {sent:,} bytes"
            while piece := mine.read(_PIECE):
                if there.read(_PIECE) != piece:
                    return "other bytes"
        return None

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, ValueError, OSError) as error:
            raise OSError(reason_of(error, self._uri)) from error


def read_object(uri: str, most: int) -> bytes:
    """The bytes of the object of a URI, at most so many.

    Raises:
        OSError: it is not there, or the store does not answer.
    """
    data = Store(uri).read("", most)
    if data is None:
        raise FileNotFoundError(ENOENT, "no such bucket or object")
    return data


@contextmanager
def uploaded(uri: str) -> Iterator[IO[bytes]]:
    """A file that becomes the object of a URI after the block, whole; nothing if it fails.

    Raises:
        InvalidOption: the store does not take it.
    """
    try:
        store = Store(uri)
    except MissingRun as error:  # an OSError, which callers would tell as one of theirs
        raise InvalidOption(str(error)) from error
    with tempfile.NamedTemporaryFile(prefix="bhlog-") as file:
        yield file
        file.flush()
        try:
            store.put(Path(file.name))
        except OSError as error:
            raise InvalidOption(
                f"{store.name}: cannot be written ({error}); check the bucket, its endpoint and "
                "your credentials"
            ) from error


def reason_of(error: Exception, uri: str) -> str:
    """What a file system says, in a line, without the secrets of the URI it is about."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    plain = first[max(0, first.find("AWS Error")) :].partition(" (Request ID")[0]
    return without_secrets(plain, uri)


@contextmanager
def reached(path: str) -> Iterator[None]:
    """Turns what a file system says when it cannot be read into one line.

    Raises:
        MissingRun: the storage does not answer or refuses.
    """
    try:
        yield
    except RouterLogError:
        raise
    except (pa.ArrowException, ValueError, OSError) as error:
        check = "; check the bucket, its endpoint and your credentials" if "://" in path else ""
        raise MissingRun(
            f"{shown(path)}: cannot be opened ({reason_of(error, path)}){check}"
        ) from error
