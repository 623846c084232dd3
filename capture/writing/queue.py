"""What waits to be written, in the order it came, bounded in bytes."""

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Queue(Generic[Item]):
    """Items from any thread to one that takes them.

    Args:
        limit: most bytes that wait or are being worked on; a single item is always let in.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[tuple[Item, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def bytes(self) -> int:
        """Bytes that wait or are being worked on."""
        return self._bytes

    def admit(self, n_bytes: int, *, wait: bool) -> bool:
        """Whether there is room for n_bytes, after waiting for it if asked; a closed queue has."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._room(n_bytes))
            return self._room(n_bytes)

    def put(self, item: Item, n_bytes: int = 0) -> bool:
        """Queue an item; False if the queue is closed and nobody will take it."""
        with self._changed:
            if self._closed:
                return False
            self._items.append((item, n_bytes))
            self._bytes += n_bytes
            self._changed.notify_all()
            return True

    def take(self, patience: float | None = None) -> Item:
        """The next item, once there is one; its bytes count until `free`.

        Raises:
            TimeoutError: none came in so many seconds; None waits for ever.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: bool(self._items), patience):
                raise TimeoutError
            return self._items.popleft()[0]

    def free(self, n_bytes: int) -> None:
        """The memory of an item that was taken is free."""
        with self._changed:
            self._bytes -= n_bytes
            self._changed.notify_all()

    def close(self) -> list[Item]:
        """Take nothing more and let all who wait go; returns what was not taken."""
        with self._changed:
            left = [item for item, _ in self._items]
            self._items.clear()
            self._bytes, self._closed = 0, True
            self._changed.notify_all()
        return left

    def _room(self, n_bytes: int) -> bool:
        return self._closed or self._bytes == 0 or self._bytes + n_bytes <= self._limit
