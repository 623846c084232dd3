"""The folder of a run: made by rank 0, joined by the other ranks, or continued after a stop."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.capture.contract.errors import (
    CorruptManifest,
    CorruptShard,
    InvalidOption,
    RouterLogError,
    RunExists,
    WriterFailed,
)
from bhlog.capture.contract.files import sync_folder
from bhlog.capture.contract.manifest import Count, Manifest, ShardEntry, Totals, manifest_name
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.schema import SCHEMA_VERSION, SHARD_NAME
from bhlog.capture.writing.launch import process_group

RANK_WAIT_SECONDS = 60.0
_MAY_CHANGE = ("batch_size",)  # of the options noted in the manifest, when a run is resumed
PROGRESS = "bhlog.progress"  # key in the footer of a tokens shard: see Progress
_STARTED = datetime.now(UTC)  # of this process, about
_SKEW = timedelta(seconds=30)  # by which ranks of one launch may start after rank 0 made the run


@dataclass(frozen=True)
class Progress:
    """How far a rank's log has come; kept in every tokens shard, so that a stop loses no count.

    Attributes:
        totals: counts up to the shard.
        next_sequence, next_forward: numbers not used up to the shard.
        windows: windows of text that are done, as the checkpoints up to the shard say.
    """

    totals: Totals = field(default_factory=Totals)
    next_sequence: Count = 0
    next_forward: Count = 0
    windows: Count = 0

    def metadata(self) -> dict[str, str]:
        """For the footer of a tokens shard."""
        return {PROGRESS: json.dumps(asdict(self))}

    @classmethod
    def of(cls, metadata: dict[bytes, bytes] | None) -> "Progress":
        """From a footer.

        Raises:
            ValueError: it has none that can be read.
        """
        text = (metadata or {}).get(PROGRESS.encode(), b"")
        return msgspec.json.decode(text, type=cls)


def check_new(folder: Path) -> None:
    """Raise RunExists unless a run could begin in the folder: there is none, or it is empty."""
    if folder.exists() and not folder.is_dir():
        raise RunExists(f"{folder}: a file; choose another name for the run's folder")
    if folder.exists() and any(folder.iterdir()):
        raise RunExists(
            f"{folder}: the folder is not empty; choose another, remove it, or continue a broken "
            "capture with --resume"
        )


def create(folder: Path, manifest: Manifest, kde: KdeModel | None, rank: int) -> Manifest:
    """Make the run's folder, or join the one that rank 0 makes; return the manifest in force.

    Raises:
        RunExists: the folder is there and not empty, or holds a run of another launch.
        RouterLogError: it cannot be written.
    """
    store = _Store.of(folder, rank)
    try:
        if rank == 0:
            check_new(folder)
            folder.mkdir(parents=True, exist_ok=True)
        else:
            if (folder / manifest_name(rank)).exists():
                raise RunExists(
                    f"{folder}: rank {rank} has written here before; choose another folder, "
                    "remove it, or continue a broken capture with --resume"
                )
            run_id = store.wait() if store is not None else _wait_for_leader(folder)
            manifest = replace(manifest, run_id=run_id)
        try:
            manifest = _fill(folder, manifest, kde, rank)
        except OSError:
            if rank == 0:  # nothing of a run is there yet
                with suppress(OSError):
                    remove_run(folder)
                    folder.rmdir()
            raise
    except OSError as error:
        if store is not None and rank == 0:
            store.refuse(str(error))
        if isinstance(error, RouterLogError):
            raise
        raise RouterLogError(
            f"{folder}: the run cannot be written there ({error.strerror or error}); choose "
            "another folder"
        ) from error
    if store is not None and rank == 0:
        store.announce(manifest.run_id)
    return manifest


def _fill(folder: Path, manifest: Manifest, kde: KdeModel | None, rank: int) -> Manifest:
    for name in ("routing", "tokens"):
        (folder / name).mkdir(exist_ok=True)
    if kde is not None:
        if rank == 0:
            kde.save(folder / "kde.parquet")
        routing = replace(manifest.routing, kde_sha256=kde.sha256)
        manifest = replace(manifest, routing=routing)
    manifest.write(folder, rank)
    sync_folder(folder)
    return manifest


def resume(
    folder: Path, manifest: Manifest, kde: KdeModel | None, rank: int
) -> tuple[Manifest, Progress]:
    """Open a run to continue it after its last sealed shard.

    Returns:
        The manifest, with the sealed shards, and where the run stands.

    Raises:
        RouterLogError: there is no run.
        InvalidOption: it was made with other options, another model or null model.
        CorruptShard: a sealed shard cannot be read.
    """
    path = folder / manifest_name(rank)
    try:
        before = Manifest.from_json(path.read_bytes(), str(path))
    except OSError as error:
        leader = folder / manifest_name(0)
        if rank and leader.exists():  # this rank had not come to write
            first = Manifest.from_json(leader.read_bytes(), str(leader))
            _check_same(leader, first, manifest, kde)
            mine = replace(manifest, run_id=first.run_id, schema_version=first.schema_version)
            return _fill(folder, mine, kde, rank), Progress()
        raise RouterLogError(f"{path}: no run to resume ({error.strerror})") from error
    _check_same(path, before, manifest, kde)
    for part in (*folder.glob(f"*/rank{rank:05d}-*.part"), path.with_name(path.name + ".part")):
        part.unlink(missing_ok=True)
    entries, progress = [], Progress()
    for routing in sorted((folder / "routing").glob(f"rank{rank:05d}-*.parquet")):
        tokens = folder / "tokens" / routing.name
        try:
            n_rows = pq.read_metadata(routing).num_rows
            footer = pq.read_metadata(tokens)
            progress = Progress.of(footer.metadata)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptShard(
                f"{routing}: cannot resume after a broken shard; move it and {tokens} away, and "
                "what comes after them"
            ) from error
        size = routing.stat().st_size + tokens.stat().st_size
        entries.append(ShardEntry(routing.name, n_rows, footer.num_rows, size))
    totals = progress.totals
    lost = before.error is not None and before.totals.dropped > totals.dropped
    if before.closed is not None and before.totals.shards == totals.shards and not lost:
        totals = before.totals  # it counts what came after the last shard, too
    progress = replace(progress, totals=totals)
    manifest = replace(before, totals=totals, shards=tuple(entries), closed=None, error=None)
    manifest.write(folder, rank)
    return manifest, progress


def next_number(shards: tuple[ShardEntry, ...]) -> int:
    """The number of the shard that comes next."""
    matches = [SHARD_NAME.fullmatch(shard.name) for shard in shards]
    return max((int(m["number"]) + 1 for m in matches if m), default=0)


def remove_run(folder: Path) -> None:
    """Delete a run's own files, its figures and its replays.

    Raises:
        RunExists: the folder holds something else, too; nothing was deleted.
    """
    folders = [folder / name for name in ("routing", "tokens", "figures", "replay")]
    names = ("run.json*", "run.rank*.json*", "kde.parquet*")
    files = [path for name in names for path in folder.glob(name)]
    foreign = set(folder.iterdir()) - {*folders, *files}
    if foreign:
        raise RunExists(
            f"{min(foreign)}: not part of a run, so the run beside it was not removed; move it "
            "away, or choose another name"
        )
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
    for path in files:
        path.unlink(missing_ok=True)


def _check_same(path: Path, before: Manifest, now: Manifest, kde: KdeModel | None) -> None:
    if before.schema_version > SCHEMA_VERSION:
        raise InvalidOption(
            f"{path}: of schema version {before.schema_version}, cannot resume with "
            f"{SCHEMA_VERSION}: resume it with the bhlog that wrote it"
        )
    for name in ("model", "sample_every", "token_ids", "logits"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            raise InvalidOption(f"{path}: {name} is {old}, cannot resume with {new}")
    for name, new in now.options.items():
        old = before.options.get(name, new)
        if old != new and name not in _MAY_CHANGE:
            raise InvalidOption(
                f"{path}: {name} is {old}, cannot resume with {new}: give the texts and the "
                "options of the run again"
            )
    old, new = before.routing, now.routing
    if (old.kind, old.options) != (new.kind, new.options):
        raise InvalidOption(f"{path}: routed by {old}, cannot resume with {new}")
    if kde is not None and old.kde_sha256 != kde.sha256:
        raise InvalidOption(
            f"{path}: routed with another null model; resume with the run's own, "
            f"{path.with_name('kde.parquet')}"
        )


def _wait_for_leader(folder: Path) -> str:
    """The id of the run that rank 0 makes, once its manifest is there."""
    path = folder / manifest_name(0)
    deadline = time.monotonic() + RANK_WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise WriterFailed(f"{path}: rank 0 wrote no manifest in {RANK_WAIT_SECONDS:.0f} s")
        time.sleep(0.05)
    leader = Manifest.from_json(path.read_bytes(), str(path))
    # what is complete already may be rank 0's if it was made since this process started
    slack = _SKEW if leader.closed is None else timedelta(seconds=1)
    if _time(leader, path) < _STARTED - slack:
        raise RunExists(
            f"{path}: a run of an earlier launch, made {leader.created}; choose another folder, "
            "remove it, or continue a broken capture with --resume"
        )
    return leader.run_id


def _time(manifest: Manifest, path: Path) -> datetime:
    try:
        return datetime.fromisoformat(manifest.created)
    except ValueError as error:
        raise CorruptManifest(f"{path}: created is {manifest.created!r}, no time") from error


@dataclass(frozen=True)
class _Store:
    """The process group's key-value store, through which rank 0 tells whether it made the run."""

    key: str
    set: Callable[[str, str], Any]
    get: Callable[[str], Any]

    @classmethod
    def of(cls, folder: Path, rank: int) -> "_Store | None":
        """None outside a process group."""
        if process_group() is None:
            return None
        from torch.distributed.distributed_c10d import _get_default_store

        store: Any = _get_default_store()
        name = f"bhlog/{folder.resolve()}"
        turn = store.add(f"{name}/{rank}", 1)  # a folder may be used again after it was removed
        return cls(f"{name}/run{turn}", store.set, lambda key: _wait_and_get(store, key))

    def announce(self, run_id: str) -> None:
        self.set(self.key, f"made {run_id}")

    def refuse(self, why: str) -> None:
        self.set(self.key, f"refused {why}")

    def wait(self) -> str:
        """The id of the run that rank 0 made."""
        word, _, rest = self.get(self.key).partition(" ")
        if word == "refused":
            raise RunExists(f"rank 0 made no run: {rest}")
        return str(rest)


def _wait_and_get(store: Any, key: str) -> str:
    try:
        store.wait([key], timedelta(seconds=RANK_WAIT_SECONDS))
    except RuntimeError as error:
        raise WriterFailed(
            f"rank 0 started no run in {RANK_WAIT_SECONDS:.0f} s: {key.removeprefix('bhlog/')}"
        ) from error
    text: str = store.get(key).decode()
    return text
