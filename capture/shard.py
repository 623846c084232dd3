"""Shards: Parquet files that are whole once they have their final name."""

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

COMPRESSION_LEVEL = 1  # zstd; higher levels gain little on BYTE_STREAM_SPLIT logits


def write_shard(path: Path, groups: Sequence[pa.Table]) -> int:
    """Write one shard under a temporary name, sync it, rename it; return its bytes.

    Args:
        path: final path, inside `routing/` or `tokens/` of a run.
        groups: a table per row group, at least one, all of one schema. A row group of routing rows
            holds one layer, so that readers skip layers by statistics.
    """
    schema = groups[0].schema
    part = path.with_name(path.name + ".part")
    plain = [name for name in ("logits", "weights") if name in schema.names]
    dictionary = [name for name in schema.names if name not in plain]
    try:
        with part.open("wb") as file:
            with pq.ParquetWriter(
                file,
                schema,
                compression="zstd",
                compression_level=COMPRESSION_LEVEL,
                use_dictionary=dictionary,
                column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in plain},
                write_statistics=dictionary,
                write_page_checksum=True,
            ) as writer:
                for group in groups:
                    writer.write_table(group, row_group_size=max(1, group.num_rows))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    part.rename(path)
    sync_folder(path.parent)
    return path.stat().st_size


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
