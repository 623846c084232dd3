"""Storage that runs lie in: a folder on disk, or an object store behind a URI."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from bhlog.capture.contract.errors import MissingRun, RouterLogError


def filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a path or a URI, and the path in it.

    Raises:
        MissingRun: the URI cannot be read, or its storage does not answer.
    """
    if "://" in path:
        with reached(path):
            fs, root = pafs.FileSystem.from_uri(path)
        return fs, root.rstrip("/")
    return pafs.LocalFileSystem(), Path(path).expanduser().resolve().as_posix()


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
        reason = str(error).splitlines()[0]
        check = "; check the bucket, its endpoint and your credentials" if "://" in path else ""
        raise MissingRun(f"{path}: cannot be opened ({reason}){check}") from error
