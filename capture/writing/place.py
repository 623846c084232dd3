"""Where a run is written: a folder on disk, or an object store behind a staging folder on disk."""

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from bhlog.capture.contract.card import CARD_NAME
from bhlog.capture.contract.checksum import MOST_BYTES
from bhlog.capture.contract.errors import CorruptManifest, RouterLogError
from bhlog.capture.contract.files import require_local
from bhlog.capture.contract.manifest import (
    MANIFEST_NAME,
    MOST_MANIFEST_BYTES,
    Manifest,
    Seal,
    manifest_name,
)
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.opening import read_seal, seal_of
from bhlog.capture.contract.store import Store, reached

FOLDERS = "tokens", "routing"  # in the order in which a pair is sealed


@dataclass(frozen=True)
class Place:
    """Where the files of a run are sealed, and where they go from there.

    Attributes:
        folder: on this machine: the run's, or the staging folder before a store.
        store: the run's folder in an object store; None where `folder` is the run's.
    """

    folder: Path
    store: Store | None = None

    @classmethod
    def of(cls, run: str | Path, staging: str | None = None, rank: int = 0) -> "Place":
        """The place of a path or URI.

        Args:
            staging: folder for the staging folders; None is `staging_folder()`.
            rank: which writes; each has a staging folder of its own.

        Raises:
            InvalidOption: a URI came as a Path, which mangles it.
            MissingRun: the URI cannot be read.
        """
        if "://" not in str(run):
            require_local(Path(run))
            return cls(Path(run))
        store = Store(str(run))
        if store.is_local:
            return cls(Path(store.root))
        digest = hashlib.sha256(str(cls(Path(), store)).encode()).hexdigest()[:8]
        name = f"{store.root.rpartition('/')[2]}-{digest}" + (f"-rank{rank:05d}" if rank else "")
        return cls((Path(staging) if staging else staging_folder()).absolute() / name, store)

    def __str__(self) -> str:
        if self.store is None:
            return str(self.folder)
        return self.store.name.partition("?")[0].rstrip("/")

    @property
    def name(self) -> str:
        """Last part of its path."""
        return self.folder.name if self.store is None else self.store.root.rpartition("/")[2]

    def publish(self, inside: str) -> None:
        """Upload a file that is whole here, if there is a store; it stays here, too.

        Raises:
            OSError: the store did not take it.
        """
        if self.store is not None:
            self.store.put(self.folder / inside, inside)

    def names(self, inside: str = "") -> list[str]:
        """Names of what is in the run's folder or in one of its folders, sorted.

        Raises:
            OSError: the store does not answer.
        """
        if self.store is not None:
            return self.store.names(inside)
        folder = self.folder / inside
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []

    def open(self, inside: str) -> pa.NativeFile:
        """A file of the run for reading."""
        if self.store is not None:
            return self.store.open(inside)
        return pa.OSFile(str(self.folder / inside))

    def manifest(self, rank: int) -> Manifest | None:
        """The manifest of a rank; None if it is not there.

        Raises:
            OSError: it cannot be read, or the store does not answer.
            CorruptManifest: it is none.
        """
        name = manifest_name(rank)
        if self.store is not None:
            text = self.store.read(name, MOST_MANIFEST_BYTES + 1)
        else:
            path = self.folder / name
            text = path.read_bytes() if path.exists() else None
        return None if text is None else Manifest.from_json(text, f"{self}/{name}")

    def begun(self) -> bool:
        """Whether a run's manifest is there, as far as can be told."""
        try:
            return MANIFEST_NAME in self.names()
        except OSError:
            return False

    def null(self) -> KdeModel | None:
        """The null model of the run, if it has one.

        Raises:
            MissingRun: its storage does not answer.
            CorruptKde: it is none.
        """
        with reached(str(self)):
            if "kde.parquet" not in self.names():
                return None
            with self.open("kde.parquet") as file:
                data = file.read_at(min(MOST_BYTES, file.size()), 0)
        return KdeModel.from_bytes(data, f"{self}/kde.parquet")

    def staged(self) -> list[str]:
        """Names of the shard pairs that lie in the staging folder."""
        if self.store is None:
            return []
        return sorted(path.name for path in (self.folder / "routing").glob("rank*.parquet"))

    def remains(self, n_sealed: int) -> str:
        """What is where once writing has failed, and what to do, in words."""
        if self.store is None:
            return f"the {n_sealed} sealed shards are whole, later rows are not logged"
        waiting = self.staged()
        more = f"; {len(waiting)} more wait in {self.folder}" if waiting else ""
        first = " on this machine uploads those first and" if waiting else ""
        return (
            f"{n_sealed} shards are there and whole{more}; later rows are not logged; --resume "
            f"(resume=True){first} goes on"
        )

    def unstage(self, names: Iterable[str]) -> None:
        """Remove what is in the store from the staging folder, and the folder when it is empty."""
        if self.store is not None:
            self.clear(names)

    def clear(self, names: Iterable[str]) -> None:
        """Remove files from the folder on this machine, and the folder when it is empty."""
        for path in (self.folder / name for name in names):
            with suppress(OSError):
                path.unlink(missing_ok=True)
        for folder in (*(self.folder / name for name in FOLDERS), self.folder):
            with suppress(OSError):  # not empty: what could not be uploaded
                folder.rmdir()


def staging_folder() -> Path:
    """Where files wait for an object store unless somebody says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "bhlog" / "staging"


def pair(shard: str) -> tuple[str, str]:
    """Paths of a shard pair inside a run: tokens first, as no routing shard is without them."""
    tokens, routing = (f"{folder}/{shard}" for folder in FOLDERS)
    return tokens, routing


def head_files(rank: int) -> tuple[str, ...]:
    """Files of a run beside its shards that a rank writes, the manifest last."""
    return (*((CARD_NAME, "kde.parquet") if rank == 0 else ()), manifest_name(rank))


def last_manifest(place: Place, rank: int) -> Manifest | None:
    """The manifest of a rank; the one in the staging folder where the store has none that reads.

    Raises:
        OSError: it cannot be read, or the store does not answer.
        CorruptManifest: there is none that reads.
    """
    staged = None if place.store is None else Place(place.folder).manifest(rank)
    try:
        return place.manifest(rank) or staged
    except CorruptManifest:
        if staged is None:
            raise
        return staged


def send_staged(place: Place, stored: Manifest, rank: int) -> Manifest:
    """Upload the shards of a rank that an earlier capture could not, before a run goes on.

    Returns:
        The later of the manifests in the store and in the staging folder.

    Raises:
        RouterLogError: they are of another run, or it went on without them.
        OSError: the store does not answer.
    """
    names = place.staged()
    local = Place(place.folder).manifest(rank)
    remove = f"move {place.folder} away to go on without them"
    if local is not None and local.run_id != stored.run_id:
        raise RouterLogError(
            f"{place.folder}: holds shards of another run that were to go to {place}; {remove}"
        )
    there = set(place.names("routing"))
    for name in names:
        paths = pair(name)
        if not all((place.folder / path).exists() for path in paths):
            raise CorruptManifest(f"{place.folder}: {name} is half a pair of shards; {remove}")
        if name not in there:
            for path in paths:
                place.publish(path)
        elif any(_seal(place, p) != seal_of(place.folder / p) for p in paths):
            raise RouterLogError(
                f"{place.folder}: holds shards that never came to {place}, which went on from "
                f"another machine; {remove}"
            )
        place.unstage(paths)
    return stored if local is None or local.closed is None else local


def _seal(place: Place, path: str) -> Seal:
    with place.open(path) as file:
        return read_seal(file)[0]
