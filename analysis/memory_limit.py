"""A limit on a process's memory, as `ulimit -v` sets it: a command that meets it ends in one line.

Python and Arrow say that memory is out; Rust, C++ and glibc end the process, with lines of their
own. So a command under a limit runs in a child, whose last lines are left out if it ends so.
"""

import os
import re
import resource
import signal
import sys
from types import FrameType

_ENDS = {-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS, 127}  # 127: glibc, for its threads
_LAST_WORDS = re.compile(
    rb"memory allocation of|stack backtrace:|note: |skipping backtrace|terminate called|  what\(\):"
    rb"|cannot allocate memory for thread-local|thread '.*panicked|Fatal Python error|Traceback"
    rb"|OpenBLAS|LLVM ERROR|<jemalloc>|libgcc_s|.*Warning: "
)
_NO_ROOM = re.compile(
    r"can't start new thread|failed to map segment|out of memory|memory allocation"
    r"|MemoryError|SystemError|jemalloc|(launch|spawn) worker thread",
    re.IGNORECASE,
)
_HELD_BYTES = 1 << 20  # of last words, which one library repeats


def is_limited() -> bool:
    """Whether this process has such a limit."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, or a thread's stack, could not be had."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or _NO_ROOM.search(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def told() -> str:
    """The line."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    more = f", limited to {limit >> 20:,} MiB (ulimit -v)" if is_limited() else ""
    return f"bhlog: out of memory{more}; --threads 1 takes less, and so does one layer at a time"


def supervise() -> None:
    """Return in a child process; this one passes on what it says and ends as it does."""
    os.environ.setdefault("POLARS_MAX_THREADS", "1")  # a thread's stack counts, used or not
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        os.dup2(writing, 2)
        os.close(writing)
        return
    os.close(writing)

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.kill(child, number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    held, said, ours = b"", b"", f"{told()}\n".encode()
    with os.fdopen(reading, "rb") as lines:
        blank = b""  # before a line, which it belongs to
        for line in lines:
            if line == b"\n":
                blank += line
                continue
            if not held and said != ours and not _LAST_WORDS.match(line):
                os.write(2, blank + line)
                said = line
            elif len(held) < _HELD_BYTES or line.startswith(b"bhlog: "):
                held += blank + line
            blank = b""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in _ENDS or said == ours or (code and _NO_ROOM.search(held.decode(errors="replace"))):
        last = [line for line in held.splitlines(True) if line.startswith(b"bhlog: ")][-1:]
        held, code = b"" if said.startswith(b"bhlog: ") else (last or [ours])[0], 1
    os.write(2, held)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
