"""Files that are whole or not at all: any file, and the shards of a run."""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.capture.contract.errors import InvalidOption

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
    part = write_part(path, groups)
    seal(part)
    return path.stat().st_size


def write_part(path: Path, groups: Iterable[pa.Table]) -> Path:
    """Write and sync the shard that is to become `path` under a temporary name; return that."""
    tables = iter(groups)
    first = next(tables)
    with open_part(path, first.schema) as write:
        for group in chain([first], tables):
            write(group)
    return path.with_name(path.name + ".part")


@contextmanager
def open_part(path: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """A function that writes the next row group of the shard that is to become `path`.

    The file has a temporary name, is synced at the end, and removed if anything fails.
    """
    part = path.with_name(path.name + ".part")
    split = [name for name in _SPLIT if name in schema.names]
    dictionary = [name for name in schema.names if name not in split and name != "experts"]
    if "experts" in schema.names:
        dictionary.append("experts.list.element")
    statistics = [name for name in schema.names if name not in _NO_STATISTICS]
    try:
        with part.open("wb") as file:
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
                yield lambda group: writer.write_table(group, row_group_size=max(1, group.num_rows))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def seal(part: Path) -> None:
    """Give a part its final name: from then on it is a shard, and never touched again."""
    part.rename(part.with_suffix(""))
    sync_folder(part.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_local(path: Path) -> None:
    """Raise InvalidOption for what was a URI: as a path it would be a folder called `s3:`."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", path.as_posix()):
        raise InvalidOption(
            f"{path.as_posix().replace(':/', '://', 1)}: is a URI; expected a path on this "
            "machine: write it here, then copy it there"
        )


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file under a temporary name: synced and renamed after the block, gone if it fails.

    Raises:
        InvalidOption: the path was a URI.
    """
    require_local(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
