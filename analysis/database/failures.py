"""What went wrong inside what DuckDB calls, kept whole: DuckDB passes on its text alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from bhlog.capture.contract.errors import RouterLogError


class Failures:
    """Errors of bhlog's own that were raised where DuckDB calls back, in its threads."""

    def __init__(self) -> None:
        self._first: RouterLogError | None = None
        self._lock = threading.Lock()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps an error of bhlog that leaves the block, the first one of a query."""
        try:
            yield
        except RouterLogError as error:
            with self._lock:
                self._first = self._first or error
            raise

    def take(self) -> RouterLogError | None:
        """The error kept, which is forgotten."""
        with self._lock:
            first, self._first = self._first, None
        return first
