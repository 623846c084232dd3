"""Waiting for DuckDB so that Ctrl-C and a time limit stop the query, and nothing else."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import duckdb

from bhlog.capture.contract.errors import InvalidOption

_T = TypeVar("_T")
_POLL_SECONDS = 0.1


def wait_for(
    work: Callable[[], _T],
    connection: duckdb.DuckDBPyConnection,
    *,
    deadline: float | None = None,
) -> _T:
    """What work gives, done in a thread of its own, so that this one sees signals meanwhile.

    Args:
        work: something that runs a query on the connection.
        deadline: of time.monotonic(), at which the query is interrupted.

    Raises:
        KeyboardInterrupt: SIGINT came; the query is interrupted and has ended.
        InvalidOption: the deadline has passed.
        Exception: whatever work raises.
    """
    finished = threading.Event()
    results: list[_T] = []
    errors: list[BaseException] = []
    pressed = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the thread that waits
            errors.append(error)
        finally:
            finished.set()

    with _handled(pressed) as before:
        threading.Thread(target=run, daemon=True).start()
        late = False
        while not finished.wait(_POLL_SECONDS):
            late = late or (deadline is not None and time.monotonic() > deadline)
            if late or pressed.is_set():
                connection.interrupt()  # again: a query that was not there yet did not see it
    if pressed.is_set():
        if callable(before):
            before(signal.SIGINT, None)
        raise KeyboardInterrupt
    if late and errors and isinstance(errors[0], duckdb.InterruptException):
        raise InvalidOption("SQL: stopped, the time of --timeout is over") from errors[0]
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _handled(pressed: threading.Event) -> Iterator[object]:
    """SIGINT sets the event; gives what handled it before, None where nothing is changed."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield None
        return
    signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield before
    finally:
        signal.signal(signal.SIGINT, before)
