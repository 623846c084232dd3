"""Writes a run in the background: a queue bounded in bytes, blocks in, sealed shards out."""

import hashlib
import shutil
import threading
import time
import uuid
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from capture.errors import CorruptShard, InvalidOption, RouterLogError, RunExists, WriterFailed
from capture.kde import KdeModel
from capture.manifest import (
    Manifest,
    ModelInfo,
    Routing,
    ShardEntry,
    Totals,
    manifest_name,
)
from capture.schema import PHASES, SHARD_NAME, routing_schema, shard_name, tokens_schema
from capture.shard import sync_folder, write_shard
from capture.stage import Staged

_RANK_WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class WriterOptions:
    """How a run is written.

    Attributes:
        sample_every: log the tokens whose position is a multiple of it, at every layer.
        token_ids: whether token ids are logged.
        shard_rows: rows after which a shard is sealed.
        queue_bytes: most bytes that wait to be written before `on_full` applies.
        on_full: "block" makes the model wait, "drop" leaves tokens out and counts them.
    """

    sample_every: int = 1
    token_ids: bool = True
    shard_rows: int = 1 << 18
    queue_bytes: int = 1 << 28
    on_full: Literal["block", "drop"] = "block"

    def __post_init__(self) -> None:
        for name in ("sample_every", "shard_rows", "queue_bytes"):
            if getattr(self, name) < 1:
                raise InvalidOption(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.on_full not in ("block", "drop"):
            raise InvalidOption(f"on_full must be 'block' or 'drop', got {self.on_full!r}")


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of one or several forwards, on their way to a shard.

    R rows (tokens), L layers, K slots. Tensors of `staged`: logits (L, R, E) in the router's
    dtype; experts (L, R, K) and weights (L, R, K) by falling choice; n_selected and n_rejected
    (L, R) under BH; position (R,), keep (R,) bool; token_id (R,) and nll (R,) if known.

    Attributes:
        staged: the tensors.
        layers: (L,) decoder layers.
        sequence, forward: (R,) uint32.
        phase: (R,) int8 index into PHASES.
        source: (R,) index into sources, -1 for unknown.
        sources: names.
    """

    staged: Staged
    layers: tuple[int, ...]
    sequence: NDArray[np.uint32]
    forward: NDArray[np.uint32]
    phase: NDArray[np.int8]
    source: NDArray[np.int32]
    sources: tuple[str, ...]


@dataclass(eq=False)
class _Buffer:
    """Columns that wait for their shard, as lists of arrays to be concatenated."""

    routing: dict[int, dict[str, list[NDArray[Any]]]] = field(default_factory=dict)
    tokens: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    rows: int = 0


class RunWriter:
    """Writes the shards and the manifest of one rank of a run.

    `submit` hands rows over; a background thread gathers them and another encodes and writes.
    What is sealed is never touched again. An error of the writer is raised once, at the next
    submit or at close.

    Args:
        folder: the run's folder; made if it is not there.
        model, routing: what is run and how it is routed.
        kde: null model in force, saved into the run.
        options: see WriterOptions.
        versions: versions of the packages at work.
        extra: other options for the manifest.
        rank: of this process; others than 0 join the run that rank 0 makes.
        resume: continue the run in the folder after its last sealed shard; next_sequence and
            next_forward then say which numbers come next.

    Raises:
        RunExists: the folder holds files already.
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
        rank: int = 0,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.options = options or WriterOptions()
        self.rank = rank
        self._schema = routing_schema(model.n_experts)
        self.next_sequence = 0
        self.next_forward = 0
        self._number = 0
        self._manifest = Manifest(
            run_id=uuid.uuid4().hex,
            created=_now(),
            model=model,
            routing=routing,
            sample_every=self.options.sample_every,
            token_ids=self.options.token_ids,
            versions=versions or {},
            options=extra or {},
        )
        if resume:
            self._continue()
        else:
            self._create(kde)
        self._totals = self._manifest.totals
        self._shards = list(self._manifest.shards)
        self._sources: dict[str, int] = {}
        self._buffer = _Buffer()
        self._queue: deque[Block | threading.Event | None] = deque()
        self._queued_bytes = 0
        self._wake = threading.Condition()
        self._error: BaseException | None = None
        self._raised = False
        self._closed = False
        self._sealing: Future[None] | None = None
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="bhlog-seal")
        self._thread = threading.Thread(target=self._work, name="bhlog-write", daemon=True)
        self._thread.start()

    @property
    def manifest(self) -> Manifest:
        """The manifest with the counts so far."""
        return replace(self._manifest, totals=self._totals, shards=tuple(self._shards))

    @property
    def closed(self) -> bool:
        """Whether the run is complete."""
        return self._closed

    @property
    def bytes_written(self) -> int:
        """Bytes of the sealed shards."""
        return sum(shard.bytes for shard in self._shards)

    def submit(self, block: Block) -> None:
        """Queue rows for writing; waits, or drops them, when the queue is full.

        Raises:
            WriterFailed: the writer stopped on an error.
        """
        self.check()
        n_bytes = block.staged.n_bytes
        with self._wake:
            if self._full(n_bytes):
                if self.options.on_full == "drop":
                    dropped = int(block.staged.wait()["keep"].sum())
                    block.staged.release()
                    self._add(dropped=dropped)
                    return
                self._wake.wait_for(lambda: self._error is not None or not self._full(n_bytes))
            self._queue.append(block)
            self._queued_bytes += n_bytes
            self._wake.notify_all()
        self.check()

    def count(self, **counts: int) -> None:
        """Add to the totals: forwards, ..."""
        with self._wake:
            self._add(**counts)

    def flush(self) -> None:
        """Seal what was submitted so far, and bring the manifest up to date."""
        done = threading.Event()
        with self._wake:
            self._queue.append(done)
            self._wake.notify_all()
        while not done.wait(0.1):
            if not self._thread.is_alive():
                break
        self.check()
        self.manifest.write(self.folder, self.rank)

    def check(self) -> None:
        """Raise the writer's error, once.

        Raises:
            WriterFailed: the writer stopped on an error.
        """
        if self._error is not None and not self._raised:
            self._raised = True
            raise WriterFailed(
                f"{self.folder}: writing stopped ({_words(self._error)}); the "
                f"{len(self._shards)} sealed shards are whole, later rows are not logged"
            ) from self._error

    def close(self, error: BaseException | None = None) -> None:
        """Seal the rest and complete the manifest. Closing twice does nothing.

        Args:
            error: what ended the capture early, noted in the manifest.

        Raises:
            WriterFailed: the writer stopped on an error that was not raised before.
        """
        if self._closed:
            return
        self._closed = True
        with self._wake:
            self._queue.append(None)
            self._wake.notify_all()
        self._thread.join()
        self._sealer.shutdown()
        cause = self._error or error
        finished = replace(
            self.manifest, closed=_now(), error=None if cause is None else _words(cause)
        )
        try:
            finished.write(self.folder, self.rank)
        except OSError as failure:
            self._error = self._error or failure
        self.check()

    def _full(self, n_bytes: int) -> bool:
        """Whether n_bytes more would be too many; a single block is always let in."""
        return self._queued_bytes > 0 and self._queued_bytes + n_bytes > self.options.queue_bytes

    def _add(self, **counts: int) -> None:
        self._totals = self._totals + Totals(**counts)

    def _create(self, kde: KdeModel | None) -> None:
        if self.rank == 0:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise RunExists(
                    f"{self.folder}: the folder is not empty; choose another, remove it, or "
                    "continue a broken capture with --resume"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
        else:
            leader = _wait_for(self.folder / manifest_name(0))
            self._manifest = replace(self._manifest, run_id=leader.run_id)
        for name in ("routing", "tokens"):
            (self.folder / name).mkdir(exist_ok=True)
        if kde is not None:
            data = kde.to_bytes()
            if self.rank == 0:
                kde.save(self.folder / "kde.parquet")
            sha256 = hashlib.sha256(data).hexdigest()
            routing = replace(self._manifest.routing, kde_sha256=sha256)
            self._manifest = replace(self._manifest, routing=routing)
        self._manifest.write(self.folder, self.rank)
        sync_folder(self.folder)

    def _continue(self) -> None:
        path = self.folder / manifest_name(self.rank)
        try:
            before = Manifest.from_json(path.read_bytes(), str(path))
        except OSError as error:
            raise RouterLogError(f"{path}: no run to resume ({error.strerror})") from error
        for name in ("model", "sample_every", "token_ids"):
            old, new = getattr(before, name), getattr(self._manifest, name)
            if old != new:
                raise InvalidOption(f"{path}: {name} is {old}, cannot resume with {new}")
        if before.routing.kind != self._manifest.routing.kind or (
            before.routing.options != self._manifest.routing.options
        ):
            raise InvalidOption(
                f"{path}: routed by {before.routing}, cannot resume with {self._manifest.routing}"
            )
        entries, totals = [], Totals()
        for routing in sorted((self.folder / "routing").iterdir()):
            match = SHARD_NAME.fullmatch(routing.name)
            tokens = self.folder / "tokens" / routing.name
            if match is None or int(match["rank"]) != self.rank:
                continue
            try:
                rows = pq.read_metadata(routing).num_rows
                written = pq.read_table(tokens, columns=["sequence", "forward"])
            except (pa.ArrowException, OSError) as error:
                raise CorruptShard(f"{routing}: cannot resume after a broken shard") from error
            size = routing.stat().st_size + tokens.stat().st_size
            n_tokens = written.num_rows
            entries.append(ShardEntry(routing.name, rows, n_tokens, size))
            totals = totals + Totals(rows=rows, tokens=n_tokens, shards=1)
            last = pc.max(written["sequence"]).as_py(), pc.max(written["forward"]).as_py()
            self.next_sequence = max(self.next_sequence, last[0] + 1)
            self.next_forward = max(self.next_forward, last[1] + 1)
            self._number = int(match["number"]) + 1
        totals = totals + Totals(forwards=self.next_forward)
        self._manifest = replace(
            before, totals=totals, shards=tuple(entries), closed=None, error=None
        )
        self._manifest.write(self.folder, self.rank)

    def _work(self) -> None:
        """The gathering thread: blocks into columns, columns into shards."""
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: bool(self._queue))
                    item = self._queue.popleft()
                if isinstance(item, Block):
                    self._gather(item)
                    with self._wake:
                        self._queued_bytes -= item.staged.n_bytes
                        self._wake.notify_all()
                    item.staged.release()
                    if self._buffer.rows >= self.options.shard_rows:
                        self._seal()
                    continue
                self._seal()
                if self._sealing is not None:
                    self._sealing.result()
                if item is None:
                    return
                item.set()
        except BaseException as error:
            with self._wake:
                self._error = error
                for item in self._queue:
                    if isinstance(item, threading.Event):
                        item.set()
                self._queue.clear()
                self._queued_bytes = 0
                self._wake.notify_all()

    def _gather(self, block: Block) -> None:
        """Select the rows to log and append their columns to the buffer."""
        tensors = block.staged.wait()
        keep = tensors["keep"].numpy()
        position = tensors["position"].numpy()
        logged = keep & (position % self.options.sample_every == 0)
        rows = np.flatnonzero(logged)
        with self._wake:
            self._add(sampled_out=int(keep.sum()) - len(rows))
        if not len(rows):
            return
        index = torch.from_numpy(rows)
        same: dict[str, NDArray[Any]] = {
            "sequence": block.sequence[rows],
            "position": position[rows].astype(np.uint32),
            "phase": block.phase[rows],
            "forward": block.forward[rows],
        }
        if "token_id" in tensors and self.options.token_ids:
            same["token_id"] = tensors["token_id"].numpy()[rows].astype(np.int32)
        codes = [self._sources.setdefault(name, len(self._sources)) for name in block.sources]
        source = np.array([*codes, -1], dtype=np.int32)[block.source[rows]]
        nll = np.full(len(rows), np.nan, dtype=np.float32)
        if "nll" in tensors:
            nll = tensors["nll"].float().numpy()[rows]
        _append(self._buffer.tokens, {**same, "source": source, "nll": nll})
        nonfinite = 0
        for i, layer in enumerate(block.layers):
            logits = tensors["logits"][i][index].float().numpy()
            nonfinite += int((~np.isfinite(logits)).any(axis=1).sum())
            columns = {
                **same,
                "logits": logits,
                "experts": tensors["experts"][i][index].numpy(),
                "weights": tensors["weights"][i][index].float().numpy(),
            }
            for name in ("n_selected", "n_rejected"):
                if name in tensors:
                    columns[name] = tensors[name][i][index].numpy().astype(np.uint16)
            _append(self._buffer.routing.setdefault(layer, {}), columns)
        self._buffer.rows += len(rows) * len(block.layers)
        with self._wake:
            self._add(rows=len(rows) * len(block.layers), tokens=len(rows), nonfinite=nonfinite)

    def _seal(self) -> None:
        """Start writing the buffer as a shard; at most one is being written."""
        if self._sealing is not None:
            self._sealing.result()
        if self._buffer.rows:
            buffer, self._buffer = self._buffer, _Buffer()
            self._sealing = self._sealer.submit(self._write, buffer, tuple(self._sources))

    def _write(self, buffer: _Buffer, sources: tuple[str, ...]) -> None:
        name = shard_name(self.rank, self._number)
        tables = [
            self._routing_table(layer, buffer.routing[layer]) for layer in sorted(buffer.routing)
        ]
        tokens = self._tokens_table(buffer.tokens, sources)
        # tokens first: a routing shard without its tokens cannot exist
        size = write_shard(self.folder / "tokens" / name, [tokens])
        size += write_shard(self.folder / "routing" / name, tables)
        self._shards.append(ShardEntry(name, buffer.rows, tokens.num_rows, size))
        self._number += 1
        with self._wake:
            self._add(shards=1)

    def _routing_table(self, layer: int, parts: dict[str, list[NDArray[Any]]]) -> pa.Table:
        columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        T, K = columns["experts"].shape
        n_selected = columns.get("n_selected", np.full(T, K, dtype=np.uint16))
        chosen = np.arange(K) < n_selected[:, None]
        ends = np.cumsum(n_selected, dtype=np.int32)
        offsets = pa.array(np.concatenate([np.zeros(1, np.int32), ends]))
        arrays = {
            **self._identity(columns, T),
            "layer": np.full(T, layer, dtype=np.uint16),
            "logits": pa.FixedSizeListArray.from_arrays(
                pa.array(columns["logits"].ravel()), type=self._schema.field("logits").type
            ),
            "experts": pa.ListArray.from_arrays(
                offsets,
                pa.array(columns["experts"][chosen].astype(np.uint16)),
                type=self._schema.field("experts").type,
            ),
            "weights": pa.ListArray.from_arrays(
                offsets,
                pa.array(columns["weights"][chosen]),
                type=self._schema.field("weights").type,
            ),
            "n_selected": n_selected,
            "n_rejected": columns.get("n_rejected", pa.nulls(T, pa.uint16())),
        }
        return pa.table({n: arrays[n] for n in self._schema.names}, schema=self._schema)

    def _tokens_table(
        self, parts: dict[str, list[NDArray[Any]]], sources: tuple[str, ...]
    ) -> pa.Table:
        columns = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        T = len(columns["sequence"])
        schema = tokens_schema()
        codes = columns["source"]
        arrays = {
            **self._identity(columns, T),
            "nll": pa.array(columns["nll"], mask=np.isnan(columns["nll"])),
            "source": pa.DictionaryArray.from_arrays(
                pa.array(codes, mask=codes < 0), pa.array(sources, pa.string())
            ),
        }
        return pa.table({n: arrays[n] for n in schema.names}, schema=schema)

    def _identity(self, columns: dict[str, NDArray[Any]], T: int) -> dict[str, Any]:
        return {
            "rank": np.full(T, self.rank, dtype=np.uint16),
            "sequence": columns["sequence"],
            "position": columns["position"],
            "token_id": columns.get("token_id", pa.nulls(T, pa.int32())),
            "phase": pa.DictionaryArray.from_arrays(columns["phase"], pa.array(PHASES)),
            "forward": columns["forward"],
        }


def remove_run(folder: Path) -> None:
    """Delete a run's own files; anything else in the folder stays."""
    for name in ("routing", "tokens", "figures"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in [*folder.glob("run*.json"), folder / "kde.parquet"]:
        path.unlink(missing_ok=True)


def _append(columns: dict[str, list[NDArray[Any]]], arrays: dict[str, NDArray[Any]]) -> None:
    for name, array in arrays.items():
        columns.setdefault(name, []).append(array)


def _wait_for(path: Path) -> Manifest:
    """The manifest of rank 0, once it is there."""
    deadline = time.monotonic() + _RANK_WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise WriterFailed(f"{path}: rank 0 wrote no manifest in {_RANK_WAIT_SECONDS:.0f} s")
        time.sleep(0.05)
    return Manifest.from_json(path.read_bytes(), str(path))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _words(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
