"""Sealed shards on their way to an object store, one after another, in a thread of their own."""

import logging
import threading
import time
from collections.abc import Callable

from bhlog.capture.contract.errors import one_line
from bhlog.capture.writing.place import Place, pair
from bhlog.capture.writing.queue import Queue

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0  # seconds between attempts
_HURRY_SECONDS = 10.0  # of patience when the run is being broken off

_log = logging.getLogger("bhlog")
_Item = tuple[str, int, Callable[[], None]] | threading.Event | None  # None ends it


class Uploads:
    """Uploads what is sealed, in order; what is confirmed leaves the staging folder.

    A store that does not answer is asked again and again. Meanwhile shards gather on disk up to a
    limit; then `add` waits, as the queue before it does, and so in the end the model.

    Args:
        limit: most bytes that wait in the staging folder; a single shard always may.
        seconds: how long a store that does not take a file is asked again.
    """

    def __init__(self, place: Place, limit: int, seconds: float) -> None:
        self._place = place
        self._seconds = seconds
        self._queue: Queue[_Item] = Queue(limit)
        self._hurry = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="bhlog-upload", daemon=True)
        self._thread.start()

    @classmethod
    def to(cls, place: Place, limit: int, seconds: float) -> "Uploads | None":
        """For a place behind which there is a store; None for a folder on disk."""
        return None if place.store is None else cls(place, limit, seconds)

    def add(self, shard: str, n_bytes: int, then: Callable[[], None]) -> None:
        """Upload a sealed pair behind those before it; waits while too many bytes do.

        Args:
            then: called in the uploading thread once both files are confirmed.

        Raises: what an earlier upload failed with.
        """
        self._queue.admit(n_bytes, wait=True)
        self._put((shard, n_bytes, then))

    def wait(self) -> None:
        """Wait until all that was added is uploaded.

        Raises: what an upload failed with.
        """
        done = threading.Event()
        self._put(done)
        done.wait()
        self._check()

    def publish(self, inside: str) -> None:
        """Upload a file in this thread, asking again as for shards.

        Raises:
            OSError: the store did not take it in time, or an earlier file: then it is not asked.
        """
        if isinstance(self._error, OSError):
            raise self._error
        began, pause = time.monotonic(), _FIRST_PAUSE
        while True:
            try:
                return self._place.publish(inside)
            except OSError as error:
                spent = time.monotonic() - began
                patience = self._patience()
                if spent >= patience:
                    raise OSError(f"asked for {spent:.0f} s: {one_line(str(error))}") from error
                if pause == _FIRST_PAUSE:
                    _log.warning(
                        "%s: %s is not taken (%s); asking again for up to %.0f s",
                        self._place, inside, one_line(str(error)), patience,
                    )  # fmt: skip
                self._hurry.wait(pause) if not self._hurry.is_set() else time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _patience(self) -> float:
        """Seconds for which a file is tried."""
        return min(self._seconds, _HURRY_SECONDS) if self._hurry.is_set() else self._seconds

    def hurry(self) -> None:
        """Ask a store that does not answer for some seconds more, and no longer."""
        self._hurry.set()

    def close(self) -> None:
        """End the thread, once it has nothing to do."""
        self._queue.put(None)
        self._thread.join()

    def _put(self, item: _Item) -> None:
        if not self._queue.put(item, item[1] if isinstance(item, tuple) else 0):
            self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            while (item := self._queue.take()) is not None:
                if isinstance(item, threading.Event):
                    item.set()
                    continue
                shard, n_bytes, then = item
                for path in pair(shard):
                    self.publish(path)
                then()
                for path in pair(shard):
                    (self._place.folder / path).unlink()
                self._queue.free(n_bytes)
        except BaseException as error:
            self._error = error
            for left in self._queue.close():
                if isinstance(left, threading.Event):
                    left.set()
