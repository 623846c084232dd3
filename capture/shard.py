"""Shards: Parquet files that are whole once they have their final name."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

COMPRESSION_LEVEL = 1  # zstd; higher levels gain little on BYTE_STREAM_SPLIT logits


def write_shard(path: Path, table: pa.Table) -> int:
    """Write one shard under a temporary name, sync it, rename it; return its bytes.

    Args:
        path: final path, inside `routing/` or `tokens/` of a run.
        table: rows of routing_schema or tokens_schema; routing rows get a row group per layer, so
            that readers skip layers by statistics.
    """
    part = path.with_name(path.name + ".part")
    plain = [name for name in ("logits", "weights") if name in table.column_names]
    encodings = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in plain}
    dictionary = [name for name in table.column_names if name not in plain]
    with (
        part.open("wb") as file,
        pq.ParquetWriter(
            file,
            table.schema,
            compression="zstd",
            compression_level=COMPRESSION_LEVEL,
            use_dictionary=dictionary,
            column_encoding=encodings,
            write_statistics=dictionary,
            write_page_checksum=True,
        ) as writer,
    ):
        for group in _row_groups(table):
            writer.write_table(group, row_group_size=max(1, group.num_rows))
    with part.open("rb") as written:
        os.fsync(written.fileno())
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


def _row_groups(table: pa.Table) -> list[pa.Table]:
    if "layer" not in table.column_names:
        return [table]
    layers = sorted(pc.unique(table["layer"]).to_pylist())
    return [table.filter(pc.equal(table["layer"], layer)) for layer in layers]
