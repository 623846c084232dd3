"""The folder of a run: made by rank 0, joined by the other ranks, or continued after a stop."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from errno import ENOENT
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
from bhlog.capture.contract.files import make_folder
from bhlog.capture.contract.manifest import (
    Count,
    Manifest,
    Seal,
    ShardEntry,
    Totals,
    manifest_name,
)
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.opening import read_seal, refused
from bhlog.capture.contract.schema import SCHEMA_VERSION, SHARD_NAME
from bhlog.capture.contract.store import reached
from bhlog.capture.writing.meeting import Meeting
from bhlog.capture.writing.place import FOLDERS, Place, head_files, last_manifest, pair, send_staged

_MAY_CHANGE = (
    "batch_size",
    "experts_implementation",
)  # of the options noted in the manifest, when a run is resumed
_READS = 8  # footers read at once: a store takes its time for each
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


def check_new(place: Place) -> None:
    """Raise RunExists unless a run could begin there: there is no folder, or it is empty.

    Raises:
        MissingRun: its object store does not answer.
    """
    with reached(str(place)):
        if place.store is None and place.folder.exists() and not place.folder.is_dir():
            raise RunExists(f"{place}: a file; choose another name for the run's folder")
        names = place.names()
    if names:
        raise RunExists(
            f"{place}: the folder is not empty; choose another, remove it, or continue a broken "
            "capture with --resume"
        )
    if place.staged():
        raise RunExists(
            f"{place.folder}: holds shards of an earlier capture that were to go to {place}; "
            "remove it, or choose another --out"
        )


def open_run(
    place: Place, manifest: Manifest, kde: KdeModel | None, rank: int, *, resumed: bool
) -> tuple[Manifest, Standing]:
    """Make a run, or open one to continue it: the manifest in force, and where it stands."""
    if resumed:
        return resume(place, manifest, kde, rank)
    return create(place, manifest, kde, rank), Standing()


def create(place: Place, manifest: Manifest, kde: KdeModel | None, rank: int) -> Manifest:
    """Make the run's folder, or join the one that rank 0 makes; return the manifest in force.

    Raises:
        RunExists: the folder is there and not empty, or holds a run of another launch.
        RouterLogError: it cannot be written, or the ranks cannot find each other.
    """
    meeting = Meeting.of(place, rank)
    manifest = replace(manifest, launch=meeting.launch)
    try:
        if rank == 0:
            check_new(place)
        else:
            if manifest_name(rank) in place.names():
                raise RunExists(
                    f"{place}: rank {rank} has written here before; choose another folder, "
                    "remove it, or continue a broken capture with --resume"
                )
            manifest = replace(manifest, run_id=meeting.join())
        try:
            manifest = _fill(place, manifest, kde, rank)
        except BaseException as error:
            if rank == 0:  # nothing of a run is there yet
                meeting.refuse(str(error))
                place.clear(head_files(0))
                if place.store is not None:
                    for name in head_files(0):
                        with suppress(OSError):
                            place.store.remove(name)
            raise
    except OSError as error:
        if rank == 0:
            meeting.refuse(str(error))
        if isinstance(error, RouterLogError):
            raise
        where, do = str(place), "choose another folder"
        if place.store is not None and error.filename:
            where, do = error.filename, "choose another --staging"
        elif place.store is not None:
            do = "check the bucket, its endpoint and your credentials"
        raise RouterLogError(
            f"{where}: the run cannot be written there ({error.strerror or error}); {do}"
        ) from error
    if rank == 0:
        meeting.announce(manifest.run_id)
    return manifest


def _fill(place: Place, manifest: Manifest, kde: KdeModel | None, rank: int) -> Manifest:
    for name in FOLDERS:
        make_folder(place.folder / name)
    if rank == 0:
        write_card(place.folder)
    if kde is not None:
        if rank == 0:
            kde.save(place.folder / "kde.parquet")
        routing = replace(manifest.routing, kde_sha256=kde.sha256)
        manifest = replace(manifest, routing=routing)
    manifest.write(place.folder, rank)
    for name in head_files(rank):
        if (place.folder / name).exists():
            place.publish(name)
    return manifest


def resume(
    place: Place, manifest: Manifest, kde: KdeModel | None, rank: int
) -> tuple[Manifest, Standing]:
    """Open a run to continue it after its last sealed shard.

    What an earlier capture could not upload to an object store goes there first.

    Returns:
        The manifest, with the sealed shards, and where the run stands.

    Raises:
        RouterLogError: there is no run, or its store does not answer.
        InvalidOption: it was made with other options, another model or null model.
        CorruptShard: a sealed shard cannot be read.
    """
    name = f"{place}/{manifest_name(rank)}"
    try:
        before = last_manifest(place, rank)
        if before is None:
            first = place.manifest(0) if rank else None
            if first is not None:  # this rank had not come to write
                _check_same(place, f"{place}/{manifest_name(0)}", first, manifest, kde)
                mine = replace(manifest, run_id=first.run_id, schema_version=first.schema_version)
                return _fill(place, mine, kde, rank), Standing()
            raise FileNotFoundError(ENOENT, os.strerror(ENOENT))
        _check_same(place, name, before, manifest, kde)
        if place.store is not None:
            before = send_staged(place, before, rank)
            for folder in FOLDERS:
                make_folder(place.folder / folder)
        shards = [n for n in place.names("routing") if _is_of(n, rank)]
    except RouterLogError:
        raise
    except OSError as error:
        what = "no run to resume" if error.errno == ENOENT else "cannot be resumed"
        raise RouterLogError(f"{name}: {what} ({error.strerror or error})") from error
    entries, progress = _standing(place, shards)
    totals = progress.totals
    lost = before.error is not None and before.totals.dropped > totals.dropped
    if before.closed is not None and before.totals.shards == totals.shards and not lost:
        totals = before.totals  # it counts what came after the last shard, too
    progress = replace(progress, totals=totals)
    manifest = replace(before, totals=totals, shards=tuple(entries), closed=None, error=None)
    try:
        for part in (
            *place.folder.glob(f"*/rank{rank:05d}-*.part"),
            *place.folder.glob(f"{manifest_name(rank)}*.part"),
        ):
            part.unlink(missing_ok=True)
        manifest.write(place.folder, rank)
        place.publish(manifest_name(rank))
    except OSError as error:
        raise RouterLogError(f"{name}: cannot be written ({error.strerror or error})") from error
    return manifest, progress


def _is_of(shard: str, rank: int) -> bool:
    match = SHARD_NAME.fullmatch(shard)
    return match is not None and int(match["rank"]) == rank


def _standing(place: Place, shards: list[str]) -> tuple[list[ShardEntry], Standing]:
    """The sealed pairs of these names, and where the run stands after them.

    Raises:
        CorruptShard: one cannot be read.
    """

    def read(path: str) -> tuple[Seal, pq.FileMetaData]:
        why = None if place.store is not None else refused(place.folder, path)
        if why is not None:
            raise ValueError(why)
        with place.open(path) as file:
            return read_seal(file)

    entries, progress = [], Standing()
    with ThreadPoolExecutor(_READS) as pool:
        pairs = [[pool.submit(read, path) for path in pair(name)] for name in shards]
        for name, (of_tokens, of_routing) in zip(shards, pairs, strict=True):
            try:
                tokens, footer = of_tokens.result()
                routing, _ = of_routing.result()
                progress = Standing.of(footer.metadata)
            except (pa.ArrowException, OSError, ValueError) as error:
                pool.shutdown(cancel_futures=True)
                tokens_path, routing_path = pair(name)
                raise CorruptShard(
                    f"{place}/{routing_path}: cannot resume after a broken shard; move it and "
                    f"{place}/{tokens_path} away, and what comes after them"
                ) from error
            size = tokens.bytes + routing.bytes
            entries.append(ShardEntry(name, routing.rows, tokens.rows, size, routing, tokens))
    return entries, progress


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


def _check_same(
    place: Place, path: str, before: Manifest, now: Manifest, kde: KdeModel | None
) -> None:
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
            f"{place}/kde.parquet"
        )
