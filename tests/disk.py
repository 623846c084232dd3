"""A disk that refuses what it is told to and notes what was done to it, for tests of faults.

Files are written through Python alone, so that what stands between is Python's: io.open, os.open,
os.fsync, os.rename, os.replace, os.mkdir, os.unlink, os.rmdir, and pyarrow's OSFile for reading.
"""

import builtins
import errno
import io
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa

KINDS = ("open", "write", "fsync", "rename")  # making a folder counts as opening


@dataclass(frozen=True)
class Fault:
    """The n-th operation of a kind fails, and all after it if it lasts."""

    kind: str
    n: int
    lasts: bool

    @property
    def error(self) -> OSError:
        code = errno.ENOSPC if self.kind in ("open", "write") else errno.EIO
        return OSError(code, os.strerror(code))


@dataclass
class Disk:
    """What lies below a folder, see `between`; `done` is replayed by tests.power.

    Attributes:
        counts: operations by kind.
        struck: whether the fault came.
        done: what was done, in order: (verb, *what), paths relative to the root, files by number.
    """

    root: Path
    fault: Fault | None = None
    counts: Counter[str] = field(default_factory=Counter)
    struck: bool = False
    done: list[tuple[Any, ...]] = field(default_factory=list)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _numbers: dict[int, str | int] = field(default_factory=dict)  # by inode
    _files: int = 0

    def holds(self, path: Any) -> bool:
        return isinstance(path, str | Path) and Path(path).is_relative_to(self.root)

    def asked(self, kind: str) -> None:
        """Count an operation, and refuse it if it is the one.

        Raises:
            OSError: it is.
        """
        with self._lock:
            self.counts[kind] += 1
            fault, n = self.fault, self.counts[kind]
            if fault and fault.kind == kind and (n == fault.n or (fault.lasts and n > fault.n)):
                self.struck = True
                raise fault.error

    def note(self, *what: Any) -> None:
        """Note something that was done, or said to be done."""
        with self._lock:
            self.done.append(what)

    def within(self, path: Any) -> str:
        return Path(path).relative_to(self.root).as_posix()

    def new(self, path: Any) -> int:
        """A number for a file that has just been made."""
        with self._lock:
            self._files += 1
            self._numbers[Path(path).stat().st_ino] = self._files
            self.note("make", self.within(path), self._files)
            return self._files

    def synced(self, descriptor: int) -> None:
        with self._lock:
            inode = os.fstat(descriptor).st_ino
            if inode in self._numbers:
                self.note("sync", self._numbers[inode])

    def opened(self, path: Any, descriptor: int) -> None:
        """Remember a folder, which may be synced."""
        with self._lock:
            if Path(path).is_dir():
                self._numbers[os.fstat(descriptor).st_ino] = self.within(path)


class _Raw(io.FileIO):
    """A file being written."""

    def __init__(self, disk: Disk, path: Any, mode: str) -> None:
        super().__init__(path, mode)
        self._disk, self._number = disk, disk.new(path)

    def write(self, data: Any, /) -> int:
        self._disk.asked("write")
        at = self.tell()
        written = super().write(data)
        self._disk.note("write", self._number, at, bytes(data)[:written])
        return written


@contextmanager
def between(root: Path, fault: Fault | None = None) -> Iterator[Disk]:
    """Put a Disk between the block and the files below a folder."""
    disk = Disk(root, fault)
    real_open, real_os_open = io.open, os.open
    real_file = pa.OSFile

    def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not disk.holds(file):
            return real_open(file, mode, *args, **kwargs)
        disk.asked("open")
        if mode in ("xb", "wb"):
            return io.BufferedWriter(_Raw(disk, file, mode[0]))
        assert set(mode) <= {"r", "b", "t"}, f"{file} is opened for {mode}"
        return real_open(file, mode, *args, **kwargs)

    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if not disk.holds(path):
            return real_os_open(path, flags, *args, **kwargs)
        disk.asked("open")
        descriptor = real_os_open(path, flags, *args, **kwargs)
        disk.opened(path, descriptor)
        return descriptor

    def fsync(descriptor: int) -> None:
        disk.asked("fsync")  # the real one would take most of a test's time
        disk.synced(descriptor)

    def reading(path: Any, *args: Any, **kwargs: Any) -> Any:
        if disk.holds(path):
            disk.asked("open")
        return real_file(path, *args, **kwargs)

    def changing(verb: str, real: Any, kind: str | None) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> None:
            if not disk.holds(path) or (verb == "folder" and Path(path).exists()):
                return real(path, *args, **kwargs)
            if kind is not None:
                disk.asked(kind)
            with disk._lock:
                real(path, *args, **kwargs)
                disk.note(
                    verb, disk.within(path), *map(disk.within, args if kind == "rename" else ())
                )

        return call

    with ExitStack() as stack:
        for where, name, ours in (
            (io, "open", open_),
            (builtins, "open", open_),
            (os, "open", os_open),
            (os, "fsync", fsync),
            (pa, "OSFile", reading),
            (os, "rename", changing("rename", os.rename, "rename")),
            (os, "replace", changing("rename", os.replace, "rename")),
            (os, "mkdir", changing("folder", os.mkdir, "open")),
            (os, "unlink", changing("remove", os.unlink, None)),
            (os, "rmdir", changing("remove", os.rmdir, None)),
        ):
            stack.enter_context(mock.patch.object(where, name, ours))
        yield disk


def faults(counts: Counter[str]) -> Iterator[Fault]:
    """Every operation that an undisturbed job asks for fails once, in turn for once and for good.

    With BHLOG_EVERY_FAULT in the environment each does both.
    """
    every = "BHLOG_EVERY_FAULT" in os.environ
    for kind in KINDS:
        for n in range(1, counts[kind] + 1):
            for lasts in (False, True):
                if every or lasts == n % 2:
                    yield Fault(kind, n, lasts)
