"""What is checked before a file of a run is read: what it is, its seal, and what it claims to hold.

A run may come from a stranger. Its files are regular files inside its folder; a Parquet file whose
footer was sealed has that footer; none claims to hold far more than its bytes can.
"""

import hashlib
import os
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.manifest import Seal
from bhlog.capture.contract.sizes import bytes_of

MOST_FOOTER_BYTES = 1 << 26
FREE_BYTES = 1 << 26  # that any file may take in memory
MOST_RATIO = 64  # of bytes in memory to bytes in the file, beyond those; logs have 2 to 20
MEMORY_LIMIT = "BHLOG_MEMORY_LIMIT"  # in the environment: what a file may claim in any case
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}
_END = 8  # bytes after a footer: its length, and PAR1


def refused(root: Path, inside: str) -> str | None:
    """Why a path inside a run's folder is not opened, in words; None if it may be, or is not there.

    A FIFO would wait for ever, a device never end, a link lead anywhere.
    """
    path = root / inside
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(root)):
        return f"is a link to {real}, outside of the run, which is not followed"
    try:
        mode = real.stat().st_mode
    except OSError:
        return None
    return None if stat.S_ISREG(mode) else "is not a file"


def most_bytes(size: int, *, free: int, ratio: int) -> int:
    """Bytes of memory that a file of this size may claim: in proportion, or what is allowed.

    Raises:
        InvalidOption: MEMORY_LIMIT is no size.
    """
    allowed = os.environ.get(MEMORY_LIMIT)
    try:
        return max(free + ratio * size, bytes_of(allowed) if allowed else 0)
    except InvalidOption as error:
        raise InvalidOption(f"{MEMORY_LIMIT}: {error}") from error


def too_much(claimed: int, size: int, most: int) -> ValueError:
    """The error of a file that claims more than it may."""
    return ValueError(
        f"claims to hold {claimed >> 20:,} MiB in {size:,} bytes; expected at most "
        f"{most >> 20:,} MiB; if you trust it, --memory-limit raises that"
    )


def footer_of(file: pa.NativeFile) -> bytes:
    """The footer of a Parquet file, with its length and magic.

    Raises:
        ValueError: it has none.
    """
    size = file.size()
    end = file.read_at(_END, size - _END) if size > _END else b""
    length = int.from_bytes(end[:4], "little")
    if end[4:] != b"PAR1" or not 0 < length <= min(size - _END - 4, MOST_FOOTER_BYTES):
        raise ValueError("no Parquet footer")
    footer: bytes = file.read_at(length + _END, size - length - _END)
    return footer


def seal_of(path: Path) -> Seal:
    """The seal of a Parquet file on this machine."""
    with pa.OSFile(str(path)) as file:
        return read_seal(file)[0]


def read_seal(file: pa.NativeFile) -> tuple[Seal, pq.FileMetaData]:
    """The seal of an open Parquet file, and its footer."""
    footer = footer_of(file)
    metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    seal = Seal(file.size(), metadata.num_rows, hashlib.sha256(footer).hexdigest())
    return seal, metadata


def open_sealed(file: pa.NativeFile, seal: Seal | None, *, bounded: bool = True) -> pq.ParquetFile:
    """A Parquet file whose pages are checked as they are read.

    Args:
        seal: what its size, rows and footer were; None where nobody noted them.
        bounded: whether it is of a log, whose values pack as MOST_RATIO says.

    Raises:
        ValueError: it is not what was sealed, or claims to hold more than it can; a line.
        pa.ArrowException, OSError: it has no readable footer.
    """
    footer = footer_of(file)
    if seal is not None and file.size() != seal.bytes:
        raise ValueError(f"{file.size():,} bytes, {seal.bytes:,} were sealed")
    if seal is not None and hashlib.sha256(footer).hexdigest() != seal.footer:
        raise ValueError("its footer is not the one that was sealed")
    metadata = pq.read_metadata(pa.BufferReader(b"PAR1" + footer))
    if seal is not None and metadata.num_rows != seal.rows:
        raise ValueError(f"{metadata.num_rows:,} rows, {seal.rows:,} were sealed")
    claimed = _claimed(metadata) if bounded else 0
    most = most_bytes(file.size(), free=FREE_BYTES, ratio=MOST_RATIO)
    if claimed > most:
        raise too_much(claimed, file.size(), most)
    return pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)


def _claimed(metadata: pq.FileMetaData) -> int:
    """Bytes that the columns would take in memory, as a footer says.

    Raises:
        ValueError: it counts fewer than none, or names columns as its schema does not.
    """
    total = 0
    paths = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        for number in range(group.num_columns):
            chunk = group.column(number)
            if chunk.path_in_schema != paths[number]:  # or it is no text, a ValueError too
                raise ValueError(f"its footer does not know column {number} by its name")
            values = max(chunk.num_values, group.num_rows)
            if min(values, chunk.total_uncompressed_size, group.num_rows) < 0:
                raise ValueError("its footer counts fewer than none")
            total += values * _WIDTHS.get(chunk.physical_type, 8)
            total += chunk.total_uncompressed_size
    return total
