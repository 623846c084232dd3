"""Writes a run in the background: a queue bounded in bytes, blocks in, sealed shards out."""

import math
import threading
import time
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bhlog.capture.contract.errors import WriterFailed
from bhlog.capture.contract.manifest import Manifest, ModelInfo, Origin, Routing, Totals
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.writing.buffer import Block, Buffer, logged_rows
from bhlog.capture.writing.folder import Standing, open_run, remove_run
from bhlog.capture.writing.launch import world_size
from bhlog.capture.writing.place import Place, head_files
from bhlog.capture.writing.queue import Queue
from bhlog.capture.writing.sealer import Sealer
from bhlog.capture.writing.stage import Staged
from bhlog.capture.writing.uploads import Uploads
from bhlog.capture.writing.writer_options import WriterOptions

__all__ = ["Block", "RunWriter", "WriterOptions", "remove_run"]


@dataclass(frozen=True, eq=False)
class _Dropped:
    """Rows that the full queue had no room for: only position and keep, to be counted."""

    staged: Staged


@dataclass(frozen=True)
class _Checkpoint:
    """What came before it is whole, see RunWriter.checkpoint."""

    windows: int


_Item = Block | _Dropped | _Checkpoint | threading.Event | None  # None closes


class RunWriter:
    """Writes the shards and the manifest of one rank of a run.

    `submit` hands rows over; a background thread gathers them and others encode and write. What is
    sealed is never touched again, and shards are sealed in order. An error of the writer is raised
    once, at the next submit or at close.

    Args:
        folder: the run's folder, made if it is not there; or the URI of one in an object store,
            to which shards go once they are sealed on this machine.
        model, routing: what is run and how it is routed.
        kde: null model in force, saved into the run.
        options: see WriterOptions.
        versions: versions of the packages at work.
        extra: other options for the manifest.
        rank: of this process; others than 0 join the run that rank 0 makes.
        ranks: how many write; None means every process of the launch.
        resume: continue the run in the folder after its last sealed shard.

    Attributes:
        place: where the run is written.
        next_sequence, next_forward: numbers that no row submitted so far has.
        windows: windows of text that were done when the run was resumed.
        sealer: what seals its shards.

    Raises:
        RunExists: the folder holds files already.
        RouterLogError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        model: ModelInfo,
        routing: Routing,
        *,
        kde: KdeModel | None = None,
        options: WriterOptions | None = None,
        versions: dict[str, str] | None = None,
        extra: dict[str, Any] | None = None,
        origin: Origin | None = None,
        rank: int = 0,
        ranks: int | None = None,
        resume: bool = False,
    ) -> None:
        self.options = options or WriterOptions()
        self.place = Place.of(folder, self.options.staging, rank)
        self.rank = rank
        self._manifest, self._progress = open_run(
            self.place,
            Manifest(
                run_id=uuid.uuid4().hex,
                created=_now(),
                model=model,
                routing=routing,
                sample_every=self.options.sample_every,
                token_ids=self.options.token_ids,
                versions=versions or {},
                options=extra or {},
                origin=origin,
                ranks=max(ranks or world_size(), rank + 1),
            ),
            kde,
            rank,
            resumed=resume,
        )
        self.next_sequence = self._progress.next_sequence
        self.next_forward = self._progress.next_forward
        self.windows = self._progress.windows
        self._uploads = Uploads.to(self.place, self.options.queue_bytes, self.options.store_seconds)
        self.sealer = Sealer(
            self.place.folder,
            rank,
            self.options.threads,
            self._manifest.shards,
            self._progress.totals,
            self._uploads,
        )
        self._buffer = Buffer(rank, self.version)
        self._began = time.monotonic()
        self._oldest: float | None = None  # when the buffer got its first row
        self._queue: Queue[_Item] = Queue(self.options.queue_bytes)
        self._whole: tuple[int, Standing] | None = None  # tokens in the buffer at a checkpoint
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._raised = False
        self._closed = False
        self._broken = False  # closed by an error of the caller's
        self._thread = threading.Thread(target=self._work, name="bhlog-write", daemon=True)
        self._thread.start()

    @property
    def manifest(self) -> Manifest:
        """The manifest with the counts so far."""
        shards, sealed = self.sealer.sealed
        totals = self._progress.totals
        if self._error is not None:  # what was gathered but not sealed is lost
            totals = replace(
                totals,
                rows=sealed.rows,
                tokens=sealed.tokens,
                nonfinite=sealed.nonfinite,
                dropped=totals.dropped + totals.tokens - sealed.tokens,
            )
        return replace(self._manifest, totals=replace(totals, shards=len(shards)), shards=shards)

    @property
    def version(self) -> int:
        """Schema version of the run: a resumed one keeps its own."""
        return self._manifest.schema_version

    @property
    def closed(self) -> bool:
        """Whether the run is complete."""
        return self._closed

    @property
    def bytes_written(self) -> int:
        """Bytes of the sealed shards."""
        return sum(shard.bytes for shard in self.sealer.sealed[0])

    def admit(self, n_bytes: int) -> bool:
        """Wait until the queue has room for n_bytes; False if they are to be dropped instead."""
        return self._queue.admit(n_bytes, wait=self.options.on_full == "block")

    def submit(self, block: Block) -> None:
        """Queue rows for writing; waits, or drops them, when the queue is full.

        Raises:
            WriterFailed: the writer stopped on an error.
        """
        self.next_sequence = max(self.next_sequence, int(block.sequence.max(initial=0)) + 1)
        self.next_forward = max(self.next_forward, int(block.forward.max(initial=0)) + 1)
        if self.admit(block.staged.n_bytes):
            self._put(block)
        else:
            self.drop(block.staged)
        self.check()

    def drop(self, staged: Staged) -> None:
        """Count rows that are not logged for want of room.

        Args:
            staged: their position and keep, (R,).
        """
        tensors = {name: staged.wait()[name] for name in ("position", "keep")}
        staged.release()
        self._put(_Dropped(Staged(tensors, 0)))

    def checkpoint(self, windows: int = 0) -> None:
        """Say that what was submitted so far is whole: sequences that are complete.

        From the first checkpoint on, shards end at checkpoints alone, and a run that is closed by
        an error forgets what came after the last one: resuming it repeats that.

        Args:
            windows: windows of text done since the checkpoint before.
        """
        self._put(_Checkpoint(windows))

    def flush(self) -> None:
        """Seal what was submitted so far, and bring the manifest up to date.

        Raises:
            WriterFailed: the writer stopped on an error.
        """
        done = threading.Event()
        self._put(done)
        while not done.wait(0.1) and self._thread.is_alive():
            pass
        self.check()
        if self._error is None:
            try:
                self._write(self.manifest)
            except OSError as error:
                raise self._failed(error) from error

    def check(self) -> None:
        """Raise the writer's error, once.

        Raises:
            WriterFailed: the writer stopped on an error.
        """
        with self._lock:
            told, self._raised = self._raised, self._error is not None
        if self._error is not None and not told:
            raise self._failed(self._error) from self._error

    def _failed(self, error: BaseException) -> WriterFailed:
        remains = self.place.remains(len(self.sealer.sealed[0]))
        return WriterFailed(f"{self.place}: writing stopped ({_words(error)}); {remains}")

    def close(self, error: BaseException | None = None) -> None:
        """Seal the rest and complete the manifest. Closing twice does nothing.

        Args:
            error: what ended the capture early, noted in the manifest.

        Raises:
            WriterFailed: the writer stopped on an error that was not raised before.
        """
        if self._closed:
            return
        self._closed, self._broken = True, error is not None
        if self._broken and self._uploads is not None:
            self._uploads.hurry()
        self._put(None)
        self._thread.join()
        self.sealer.close()
        cause = self._error or error
        finished = replace(
            self.manifest, closed=_now(), error=None if cause is None else _words(cause)
        )
        try:
            self._write(finished)
            if self._uploads is not None and not self.place.staged():
                self.place.unstage(head_files(self.rank))
        except OSError as failure:
            self._error = self._error or failure
        if self._uploads is not None:
            self._uploads.close()
        self.check()

    def _write(self, manifest: Manifest) -> None:
        """Bring the manifest on disk, and that of an object store, up to date."""
        manifest.write(self.place.folder, self.rank)
        if self._uploads is not None:
            self._uploads.publish(head_files(self.rank)[-1])

    def _put(self, item: _Item) -> None:
        """Queue something; after an error nobody is there to take it, and it is let go."""
        if not self._queue.put(item, item.staged.n_bytes if isinstance(item, Block) else 0):
            self._let_go(item)

    def _let_go(self, item: _Item) -> None:
        """Count what nobody will write."""
        if isinstance(item, Block | _Dropped):
            logged, n_kept = logged_rows(item.staged.wait(), self.options.sample_every)
            dropped = int(logged.sum())
            item.staged.release()
            self._count(Totals(dropped=dropped, sampled_out=n_kept - dropped))
        elif isinstance(item, threading.Event):
            item.set()

    def _work(self) -> None:
        """The gathering thread: blocks into columns, columns into shards."""
        gathering: Block | None = None
        try:
            while True:
                try:
                    item = self._queue.take(self._patience())
                except TimeoutError:
                    self._seal()
                    continue
                if isinstance(item, Block):
                    gathering = item
                    self._gather(item)
                    gathering = None
                    if self._whole is None:
                        self._seal_if_due()
                elif isinstance(item, _Dropped):
                    self._let_go(item)
                elif isinstance(item, _Checkpoint):
                    self._count(Totals(), windows=item.windows)
                    self._seal_if_due()
                    self._whole = self._buffer.tokens, self._progress
                else:
                    self._finish(closing=item is None)
                    if item is None:
                        return
                    item.set()
        except BaseException as error:
            self._fail(error, gathering)

    def _finish(self, *, closing: bool) -> None:
        """Seal what is there, and wait until it is on disk."""
        if closing and self._broken and self._whole is not None:
            tokens, self._progress = self._whole
            self._buffer.cut(tokens)
        self._seal()
        self.sealer.wait()

    def _fail(self, error: BaseException, gathering: Block | None) -> None:
        self.sealer.cancel()
        with self._lock:
            self._error = error
        for item in (gathering, *self._queue.close()):
            self._let_go(item)

    def _gather(self, block: Block) -> None:
        """Append the rows to log to the buffer."""
        block.staged.wait()
        counts = self._buffer.add(
            block,
            sample_every=self.options.sample_every,
            token_ids=self.options.token_ids,
        )
        if self._oldest is None and self._buffer.tokens:
            self._oldest = time.monotonic()
        self._count(counts + Totals(rejected=block.rejected), block)
        block.staged.release()
        self._queue.free(block.staged.n_bytes)

    def _count(self, counts: Totals, block: Block | None = None, *, windows: int = 0) -> None:
        with self._lock:  # the model's thread counts what it drops
            before = self._progress
            progress = replace(
                before, totals=before.totals + counts, windows=before.windows + windows
            )
            if block is not None and len(block.sequence):
                progress = replace(
                    progress,
                    totals=progress.totals + Totals(forwards=len(np.unique(block.forward))),
                    next_sequence=max(before.next_sequence, int(block.sequence.max()) + 1),
                    next_forward=max(before.next_forward, int(block.forward.max()) + 1),
                )
            self._progress = progress

    def _seal_if_due(self) -> None:
        if self._buffer.rows >= self.options.shard_rows or self._seconds_left() <= 0:
            self._seal()

    def _seconds_left(self) -> float:
        """Until the buffer is old enough to be sealed; infinite if it is empty."""
        if self._oldest is None:
            return math.inf
        now = time.monotonic()
        most = max(self.options.seal_seconds, (now - self._began) / 20)
        return max(0.0, self._oldest + most - now)

    def _patience(self) -> float | None:
        """How long to wait for the next item before what is there is sealed; None: for ever."""
        after_checkpoint = self._whole is not None and self._whole[0] != self._buffer.tokens
        left = math.inf if after_checkpoint else self._seconds_left()
        return None if left == math.inf else left

    def _seal(self) -> None:
        """Start writing the buffer as a shard."""
        if not self._buffer.tokens:
            return
        buffer, self._buffer = self._buffer, Buffer(self.rank, self.version)
        self._oldest = None
        if self._whole is not None:  # what is sealed stands
            self._whole = 0, self._progress
        self.sealer.seal(buffer, self._progress)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _words(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
