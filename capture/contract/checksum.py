"""Parquet files of one table beside the log: null models and profiles, bounded and checked.

Such a file carries the sha256 of what its rows hold in its metadata, from version 2 on. Files of
version 1 have none, and are read as they are.
"""

import errno
import hashlib
import json
from collections.abc import Iterator
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
        return file.read(size)  # reading up to a bound sets all of it aside


class Checksum:
    """Sha256 of what rows and their metadata say, however they are encoded and cut into groups.

    Args:
        schema: of the rows, with the metadata.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self._columns = {name: (hashlib.sha256(), hashlib.sha256()) for name in schema.names}

    def add(self, table: pa.Table) -> None:
        """Add the next rows."""
        for name, (numbers, rest) in self._columns.items():
            column = table[name].combine_chunks()
            plain: list[object]
            if pa.types.is_list(column.type) and not pa.types.is_string(column.type.value_type):
                plain = column.value_lengths().to_pylist()
                numbers.update(values_of(column.flatten()).data)
            else:
                plain = column.to_pylist()
            rest.update("".join(f"{json.dumps(value)}\n" for value in plain).encode())

    @property
    def hexdigest(self) -> str:
        metadata = {
            key.decode(): value.decode()
            for key, value in (self.schema.metadata or {}).items()
            if key.startswith(b"bhlog.") and key != _CHECKSUM
        }
        parts = {name: [d.hexdigest() for d in both] for name, both in self._columns.items()}
        return hashlib.sha256(json.dumps([metadata, parts], sort_keys=True).encode()).hexdigest()

    @property
    def signed(self) -> pa.Schema:
        """The schema with the checksum in its metadata."""
        return self.schema.with_metadata(
            {**(self.schema.metadata or {}), _CHECKSUM: self.hexdigest}
        )

    def check(self, *, required: bool) -> None:
        """Raise ValueError if the rows are not those that were written.

        Args:
            required: whether files of its version have a checksum.
        """
        expected = (self.schema.metadata or {}).get(_CHECKSUM)
        if expected is None and required:
            raise ValueError("it lacks its checksum: restore the file from a copy")
        if expected is not None and self.hexdigest.encode() != expected:
            raise ValueError(
                "its rows are not those that were written: restore the file from a copy"
            )


def read_tables(file: pq.ParquetFile, size: int, rows: str = "rows") -> Iterator[pa.Table]:
    """The row groups of a file whose columns were looked at; its rows go by a name of their own.

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
    for group in range(footer.num_row_groups):
        # one of Arrow's threads would end the process if it let go of the bytes at exit
        yield file.read_row_group(group, use_threads=False)


def with_checksum(table: pa.Table) -> pa.Table:
    """A table that is all of a file, with the checksum of its rows in its metadata."""
    checksum = Checksum(table.schema)
    checksum.add(table)
    return table.replace_schema_metadata(checksum.signed.metadata)


def has_checksum(data: bytes) -> bool:
    """Whether the bytes of a file that could be loaded carry the checksum of its rows."""
    return _CHECKSUM in (pq.read_schema(pa.BufferReader(data)).metadata or {})
