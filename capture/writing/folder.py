"""The folder of a run: made by rank 0, joined by the other ranks, or continued after a stop."""

import json
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.capture.contract.card import CARD_NAME, is_card, write_card
from bhlog.capture.contract.errors import (
    CorruptShard,
    InvalidOption,
    RouterLogError,
    RunExists,
)
from bhlog.capture.contract.files import require_local
from bhlog.capture.contract.manifest import Count, Manifest, ShardEntry, Totals, manifest_name
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.opening import refused, seal_of
from bhlog.capture.contract.schema import SCHEMA_VERSION, SHARD_NAME
from bhlog.capture.writing.meeting import Meeting

_MAY_CHANGE = (
    "batch_size",
    "experts_implementation",
)  # of the options noted in the manifest, when a run is resumed
PROGRESS = "bhlog.progress"  # key in the footer of a tokens shard: see Standing


@dataclass(frozen=True)
class Standing:
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
    def of(cls, metadata: dict[bytes, bytes] | None) -> "Standing":
        """From a footer.

        Raises:
            ValueError: it has none that can be read.
        """
        text = (metadata or {}).get(PROGRESS.encode(), b"")
        return msgspec.json.decode(text, type=cls)


def check_new(folder: Path) -> None:
    """Raise RunExists unless a run could begin in the folder: there is none, or it is empty.

    Raises:
        InvalidOption: it was a URI.
    """
    require_local(folder)
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
        RouterLogError: it cannot be written, or the ranks cannot find each other.
    """
    meeting = Meeting.of(folder, rank)
    manifest = replace(manifest, launch=meeting.launch)
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
            manifest = replace(manifest, run_id=meeting.join())
        try:
            manifest = _fill(folder, manifest, kde, rank)
        except OSError:
            if rank == 0:  # nothing of a run is there yet
                with suppress(OSError):
                    remove_run(folder)
                    folder.rmdir()
            raise
    except OSError as error:
        if rank == 0:
            meeting.refuse(str(error))
        if isinstance(error, RouterLogError):
            raise
        raise RouterLogError(
            f"{folder}: the run cannot be written there ({error.strerror or error}); choose "
            "another folder"
        ) from error
    if rank == 0:
        meeting.announce(manifest.run_id)
    return manifest


def _fill(folder: Path, manifest: Manifest, kde: KdeModel | None, rank: int) -> Manifest:
    for name in ("routing", "tokens"):
        (folder / name).mkdir(exist_ok=True)
    if rank == 0:
        write_card(folder)
    if kde is not None:
        if rank == 0:
            kde.save(folder / "kde.parquet")
        routing = replace(manifest.routing, kde_sha256=kde.sha256)
        manifest = replace(manifest, routing=routing)
    manifest.write(folder, rank)
    return manifest


def resume(
    folder: Path, manifest: Manifest, kde: KdeModel | None, rank: int
) -> tuple[Manifest, Standing]:
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
            return _fill(folder, mine, kde, rank), Standing()
        raise RouterLogError(f"{path}: no run to resume ({error.strerror})") from error
    _check_same(path, before, manifest, kde)
    for part in (*folder.glob(f"*/rank{rank:05d}-*.part"), *folder.glob(f"{path.name}*.part")):
        part.unlink(missing_ok=True)
    entries, progress = [], Standing()
    for routing in sorted((folder / "routing").glob(f"rank{rank:05d}-*.parquet")):
        tokens = folder / "tokens" / routing.name
        try:
            for path in (routing, tokens):
                why = refused(folder, path.relative_to(folder).as_posix())
                if why is not None:
                    raise ValueError(why)
            seals = seal_of(routing), seal_of(tokens)
            progress = Standing.of(pq.read_metadata(tokens).metadata)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptShard(
                f"{routing}: cannot resume after a broken shard; move it and {tokens} away, and "
                "what comes after them"
            ) from error
        size = sum(seal.bytes for seal in seals)
        entries.append(ShardEntry(routing.name, seals[0].rows, seals[1].rows, size, *seals))
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
    files += filter(is_card, folder.glob(CARD_NAME))
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
