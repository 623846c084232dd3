"""Watching a capture: lines of progress for files, and an orderly end for signals."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from bhlog.capture.writing.place import Place

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, job schedulers, a terminal that is closed


def in_bytes(n_bytes: int) -> str:
    """A size as people read it: 26 bytes, 42.2 kB, 1.3 GB."""
    from rich.filesize import decimal

    return decimal(n_bytes)


class ProgressLines:
    """A line on stderr now and then where it is a file, in which a bar cannot move."""

    EVERY_SECONDS = 30.0

    def __init__(self, run: str, total: int | None) -> None:
        self._run, self._total, self._done = run, total, 0
        self._first: tuple[float, int] | None = None  # when speed is measured from
        self._said = time.monotonic()

    def advance(self, tokens: int, n_bytes: int) -> None:
        """Tokens just done, and the bytes on disk by now."""
        now = time.monotonic()
        self._done += tokens
        if self._first is None:
            self._first = now, self._done
        if sys.stderr.isatty() or now - self._said < self.EVERY_SECONDS:
            return
        self._said = now
        speed = (self._done - self._first[1]) / max(1e-9, now - self._first[0])
        of = "" if self._total is None else f" of {self._total:,}"
        click.echo(
            f"{self._run}: {self._done:,}{of} tokens, {speed:,.0f} tokens/s"
            + (f", {in_bytes(n_bytes)}" if n_bytes else ""),
            err=True,
        )


@contextmanager
def interruptible(place: "Place") -> Iterator[None]:
    """A block that Ctrl-C, SIGTERM and SIGHUP interrupt once: what is logged is then sealed.

    Further signals wait until it is.
    """
    with _once():
        try:
            yield
        except KeyboardInterrupt:
            staged = place.staged()
            if staged:
                click.echo(
                    f"{place}: {len(staged)} shards did not get there and wait in {place.folder}; "
                    "the same command with --resume uploads them and goes on",
                    err=True,
                )
            elif place.begun():
                click.echo(
                    f"{place} is closed; the same command with --resume goes on with it", err=True
                )
            raise


@contextmanager
def _once() -> Iterator[None]:
    """A block in which the first signal raises KeyboardInterrupt, and no other does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if not came:
            came = True
            raise KeyboardInterrupt

    before: dict[int, Any] = {}
    for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and is meant to
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
