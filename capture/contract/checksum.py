"""Parquet files of one table beside the log: null models and profiles, bounded and checked.

Such a file carries the sha256 of what its rows hold in its metadata, from version 2 on. Files of
version 1 have none, and are read as they are.
"""

import errno
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.opening import most_bytes, too_much
from bhlog.capture.contract.store import read_object

MOST_BYTES = 1 << 31  # of a file
MOST_ROWS = 1 << 20  # a small file can claim more than any memory holds
MOST_VALUES = 1 << 28  # in a column
FREE_BYTES = 1 << 28  # that any file may take in memory
MOST_RATIO = 1 << 10  # of bytes in memory to bytes in the file, beyond those: histograms are sparse
_CHECKSUM = b"bhlog.sha256"


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file, or of the object of a URI.

    Raises:
        OSError: it cannot be read, is no file, or is larger than MOST_BYTES.
    """
    if "://" in str(path):
        return read_object(str(path), MOST_BYTES)
    path = Path(path)
    size = path.stat().st_size
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file")
    if size > MOST_BYTES:
        raise OSError(errno.EFBIG, f"{size:,} bytes; expected at most {MOST_BYTES:,}")
    with path.open("rb") as file:
        return file.read(MOST_BYTES)


def with_checksum(table: pa.Table) -> pa.Table:
    """The table with the checksum of its rows in its metadata."""
    return table.replace_schema_metadata(
        {**(table.schema.metadata or {}), _CHECKSUM: checksum(table)}
    )


def read_table(file: pq.ParquetFile, size: int, rows: str = "rows") -> pa.Table:
    """The table of a file whose columns were looked at; its rows go by a name of their own.

    Args:
        size: bytes of the file.

    Raises:
        ValueError: it claims to hold more than fits, or other rows than were written.
        pa.ArrowException, OSError: it cannot be decoded.
    """
    file.scan_contents()  # raises where looking at the footer's columns would end the process
    footer = file.metadata
    if footer.num_rows > MOST_ROWS:
        raise ValueError(f"claims to hold {footer.num_rows:,} {rows}")
    claimed, most = 0, most_bytes(size, free=FREE_BYTES, ratio=MOST_RATIO)
    for group in range(footer.num_row_groups):
        for column in range(footer.num_columns):
            values = footer.row_group(group).column(column).num_values
            if not 0 <= values <= MOST_VALUES // footer.num_row_groups:
                raise ValueError(f"claims to hold {values:,} values in a column")
            claimed += 8 * values
    if claimed > most:
        raise too_much(claimed, size, most)
    # one of Arrow's threads would end the process if it let go of the bytes at exit
    return file.read(use_threads=False)


def check_checksum(table: pa.Table, *, required: bool) -> None:
    """Raise ValueError if the rows are not those that were written.

    Args:
        required: whether files of its version have a checksum.
    """
    expected = (table.schema.metadata or {}).get(_CHECKSUM)
    if expected is None and required:
        raise ValueError("it lacks its checksum: restore the file from a copy")
    if expected is not None and checksum(table).encode() != expected:
        raise ValueError("its rows are not those that were written: restore the file from a copy")


def has_checksum(path: str | Path) -> bool:
    """Whether a file that could be loaded carries the checksum of its rows."""
    file = pa.BufferReader(read_bytes(path))
    return _CHECKSUM in (pq.read_schema(file).metadata or {})


def checksum(table: pa.Table) -> str:
    """Sha256 of what the rows and the other metadata say, however the file is encoded."""
    metadata = {
        key.decode(): value.decode()
        for key, value in (table.schema.metadata or {}).items()
        if key.startswith(b"bhlog.") and key != _CHECKSUM
    }
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in table.column_names:
        column = table[name].combine_chunks()
        plain: list[object]
        if pa.types.is_list(column.type) and not pa.types.is_string(column.type.value_type):
            plain = column.value_lengths().to_pylist()
            digest.update(values_of(column.flatten()).data)
        else:
            plain = column.to_pylist()
        digest.update(json.dumps([name, plain]).encode())
    return digest.hexdigest()
