"""Where DuckDB puts what does not fit into memory: a folder that goes with its process."""

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from bhlog.capture.contract.errors import InvalidOption

PREFIX = "bhlog-sql-"
_LOCK = ".lock"


class SpillFolder:
    """A private folder, and beside it a locked file that says that its process lives.

    The lock goes with the process, however that ends; what dead processes left is removed when the
    next folder is made in the same place.

    Attributes:
        path: the folder.

    Raises:
        InvalidOption: no folder can be made there.
    """

    def __init__(self, parent: str | Path | None = None) -> None:
        place = Path(tempfile.gettempdir() if parent is None else parent)
        try:
            _sweep(place)
            self._lock, lock = _locked_file(place)
            self._lock_path = lock
            self.path = lock.with_name(lock.name.removesuffix(_LOCK))
            self.path.mkdir(mode=0o700)
        except OSError as error:
            raise InvalidOption(
                f"{place}: no folder for spilled data can be made there ({error.strerror})"
            ) from error

    def remove(self) -> None:
        """Remove the folder and all in it; a second call does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):
                self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def _locked_file(place: Path) -> tuple[int, Path]:
    """A new file that this process holds the lock of."""
    while True:
        descriptor, name = tempfile.mkstemp(_LOCK, PREFIX, place)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # swept before it was locked


def _sweep(place: Path) -> None:
    """Remove folders whose process is dead, which is what a lock that can be had shows."""
    for lock in place.glob(f"{PREFIX}*{_LOCK}"):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # of another user, or gone
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_name(lock.name.removesuffix(_LOCK)), ignore_errors=True)
            lock.unlink(missing_ok=True)
        except OSError:  # its process lives
            pass
        finally:
            os.close(descriptor)
