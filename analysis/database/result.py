"""Results of SQL on their way out; see bhlog.analysis.output."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from bhlog.analysis.output import write


def print_result(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], result_format: str, *, max_rows: int
) -> int:
    """Print a result on stdout; return how many rows were left out."""
    return write((schema, batches), result_format, max_rows=max_rows).left_out


def write_result(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], result_format: str, path: Path
) -> int:
    """Write a result to a file; return its rows."""
    return write((schema, batches), result_format, path).rows
