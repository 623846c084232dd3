"""Ctrl-C: it ends a command in one line, however often it is pressed."""

import os
import signal
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE_SECONDS = 2.0  # in which what was interrupted can end
DUCKDB_INTERRUPTED = "Query interrupted"  # a RuntimeError, in place of what a handler raised


@contextmanager
def patient() -> Iterator[None]:
    """A block in which Ctrl-C raises KeyboardInterrupt, and again only some seconds later.

    People press it more than once: an interrupt of what ends a fold or removes a file that is half
    written would leave threads and files behind.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    last = -PATIENCE_SECONDS

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PATIENCE_SECONDS:
            last = now
            raise KeyboardInterrupt

    def unraisable(problem: "sys.UnraisableHookArgs") -> None:
        """A destructor cannot raise, so that an interrupt of one would be a traceback, and lost."""
        nonlocal last
        if isinstance(problem.exc_value, KeyboardInterrupt):
            last = -PATIENCE_SECONDS
            threading.Timer(0.02, interrupt_main).start()  # from in here it would be lost as well
        else:
            hook(problem)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except RuntimeError as error:
        if str(error) != DUCKDB_INTERRUPTED:
            raise
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = hook


def at_once() -> None:
    """Ctrl-C ends the program in one line, while it has nothing to end: what it is, is loading."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _end)


def by_default() -> None:
    """Ctrl-C raises KeyboardInterrupt, after at_once."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"bhlog: interrupted\n")
    os._exit(130)


def deaf() -> None:
    """Ignore Ctrl-C from here on: the program ends anyway, and its end must not be interrupted."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
