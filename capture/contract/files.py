"""Files that are whole or not at all: any file, and the shards of a run."""

import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.store import uploaded
from bhlog.capture.contract.uris import shown

COMPRESSION_LEVEL = 1  # zstd; higher levels gain little on BYTE_STREAM_SPLIT logits


# floats of many different values: their bytes are split into streams, which zstd then packs; not
# integers, which readers such as DuckDB 1 do not know in this encoding
_SPLIT = {"logits": "logits.list.element", "weights": "weights.list.element"}
_NO_STATISTICS = (*_SPLIT, "experts", "token_id")


def write_shard(path: Path, groups: Iterable[pa.Table]) -> int:
    """Write one shard under a temporary name, sync it, rename it; return its bytes.

    Args:
        path: final path, inside `routing/` or `tokens/` of a run.
        groups: a table per row group, at least one, all of one schema. A row group of routing rows
            holds one layer, so that readers skip layers by statistics.
    """
    return seal(write_part(path, groups)).stat().st_size


def write_part(path: Path, groups: Iterable[pa.Table]) -> Path:
    """Write and sync the shard that is to become `path` under a temporary name; return that."""
    tables = iter(groups)
    first = next(tables)
    with open_part(path, first.schema) as part:
        for group in chain([first], tables):
            part.write(group)
    return part.path


@dataclass(frozen=True, eq=False)
class Part:
    """A shard that is being written.

    Attributes:
        path: its temporary name.
        write: writes the next row group.
    """

    path: Path
    write: Callable[[pa.Table], None]


@contextmanager
def open_part(path: Path, schema: pa.Schema) -> Iterator[Part]:
    """The shard that is to become `path`, to be sealed after the block.

    The file has a temporary name, is synced at the end, and removed if anything fails.
    """
    part = _part_of(path)
    split = [name for name in _SPLIT if name in schema.names]
    dictionary = [name for name in schema.names if name not in split and name != "experts"]
    if "experts" in schema.names:
        dictionary.append("experts.list.element")
    statistics = [name for name in schema.names if name not in _NO_STATISTICS]
    try:
        with part.open("xb") as file:
            with pq.ParquetWriter(
                file,
                schema,
                compression="zstd",
                compression_level=COMPRESSION_LEVEL,
                use_dictionary=dictionary,
                column_encoding={_SPLIT[name]: "BYTE_STREAM_SPLIT" for name in split},
                write_statistics=statistics,
                write_page_checksum=True,
            ) as writer:
                yield Part(
                    part,
                    lambda group: writer.write_table(group, row_group_size=max(1, group.num_rows)),
                )
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def seal(part: Path) -> Path:
    """Give a part its final name and return that: it is a shard now, and never touched again."""
    path = final_path(part)
    part.rename(path)
    sync_folder(path.parent)
    return path


def final_path(part: Path) -> Path:
    """What a part is to become."""
    return part.with_name(part.name.rsplit(".", 2)[0])


def _part_of(path: Path) -> Path:
    """A temporary name of this writer's own: two that write one file do not mix."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, and make them survive a power cut."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        with suppress(FileNotFoundError):  # removed meanwhile by another process
            sync_folder(path.parent)


def require_local(path: Path) -> None:
    """Raise InvalidOption for what was a URI: as a path it would be a folder called `s3:`."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path.as_posix()):
        raise InvalidOption(
            f"{shown(path.as_posix().replace(':/', '://', 1))}: is a URI; expected a path on "
            "this machine, or, where a URI will do, text and not a Path"
        )


@contextmanager
def whole_file(path: str | Path) -> Iterator[IO[bytes]]:
    """A file under a temporary name: synced and renamed after the block, gone if it fails.

    Of several that write one file at once, the last to finish wins, whole. A URI names an object of
    a store, which is uploaded after the block.

    Raises:
        InvalidOption: a URI came as a Path, or its store does not take it.
    """
    if "://" in str(path):
        with uploaded(str(path)) as object_file:
            yield object_file
        return
    path = Path(path)
    require_local(path)
    part = _part_of(path)
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
