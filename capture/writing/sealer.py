"""Encodes buffers side by side and seals them as shards, one after the other."""

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from bhlog.capture.contract.files import final_path, seal, write_part
from bhlog.capture.contract.manifest import ShardEntry, Totals
from bhlog.capture.contract.null.histogram import HistogramAccumulator
from bhlog.capture.contract.opening import seal_of
from bhlog.capture.contract.schema import shard_name
from bhlog.capture.writing.buffer import Buffer
from bhlog.capture.writing.counting import counted
from bhlog.capture.writing.folder import Standing, next_number
from bhlog.capture.writing.uploads import Uploads


class Sealer:
    """Turns the buffers of one rank into shards; all but the encoding happens in their order.

    Args:
        folder: the run's.
        rank: of the shards.
        threads: buffers encoded at once; one more waits for them.
        shards: sealed before.
        totals: counts up to the last of them.
        uploads: takes each to an object store, before it counts as sealed; None keeps it here.

    Attributes:
        histograms: counts the logits of every shard that is sealed; None counts nothing.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        threads: int,
        shards: tuple[ShardEntry, ...],
        totals: Totals,
        uploads: Uploads | None = None,
    ) -> None:
        self.histograms: HistogramAccumulator | None = None
        self._folder = folder
        self._rank = rank
        self._threads = threads
        self._shards = shards
        self._totals = totals
        self._uploads = uploads
        self._number = next_number(shards)
        self._running: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="bhlog-encode")
        self._lock = threading.Lock()

    @property
    def sealed(self) -> tuple[tuple[ShardEntry, ...], Totals]:
        """The shards that are sealed, and the counts up to the last of them."""
        with self._lock:
            return self._shards, self._totals

    def seal(self, buffer: Buffer, progress: Standing) -> None:
        """Start writing a buffer as a shard, behind those that are being written.

        Args:
            progress: counts and numbers up to its end.

        Raises: what an earlier buffer failed with.
        """
        while len(self._running) >= self._threads:
            self._running.popleft().result()
        if self._running and self._running[0].done():
            self._running.popleft().result()
        name = shard_name(self._rank, self._number)
        self._number += 1
        progress = replace(progress, totals=replace(progress.totals, shards=self._number))
        before = self._running[-1] if self._running else None
        self._running.append(self._pool.submit(self._write, buffer, name, progress, before))

    def wait(self) -> None:
        """Wait until every buffer is sealed.

        Raises: what one of them failed with.
        """
        while self._running:
            self._running.popleft().result()
        if self._uploads is not None:
            self._uploads.wait()

    def cancel(self) -> None:
        """Start no more buffers, and wait little for an object store."""
        for future in self._running:
            future.cancel()
        if self._uploads is not None:
            self._uploads.hurry()

    def close(self) -> None:
        """Stop the threads, once they have nothing to do."""
        self._pool.shutdown()

    def _write(
        self,
        buffer: Buffer,
        name: str,
        progress: Standing,
        before: Future[None] | None,
    ) -> None:
        """Encode a shard, and seal it once the one before is sealed."""
        parts: list[Path] = []
        counts = None if self.histograms is None else self.histograms.empty_copy()
        tables = buffer.routing_tables()
        try:
            tokens = buffer.tokens_table(progress.metadata())
            parts.append(write_part(self._folder / "tokens" / name, [tokens]))
            parts.append(
                write_part(
                    self._folder / "routing" / name,
                    tables if counts is None else counted(tables, counts),
                )
            )
            tokens_seal, routing_seal = map(seal_of, parts)
            n_bytes = tokens_seal.bytes + routing_seal.bytes
            if before is not None:
                before.result()
            for part in parts:  # tokens first: a routing shard without its tokens cannot exist
                seal(part)
        except BaseException:
            for part in reversed(parts):
                part.unlink(missing_ok=True)
                final_path(part).unlink(missing_ok=True)  # half a pair is no shard
            raise
        entry = ShardEntry(name, buffer.rows, buffer.tokens, n_bytes, routing_seal, tokens_seal)
        listed = partial(self._list, entry, progress.totals, counts)
        if self._uploads is None:
            listed()
        else:
            self._uploads.add(name, n_bytes, listed)

    def _list(self, entry: ShardEntry, totals: Totals, counts: HistogramAccumulator | None) -> None:
        """Count a shard as sealed; one at a time comes here."""
        if self.histograms is not None and counts is not None:
            self.histograms.merge(counts)
        with self._lock:
            self._shards, self._totals = (*self._shards, entry), totals
