"""Rows on their way out: batches of a result as a table, JSON, CSV, Markdown or Parquet."""

import io
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from shutil import get_terminal_size
from typing import IO, Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.cells import cell_len

from bhlog.analysis.output import as_json, cell, print_table
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.files import whole_file

SUFFIXES = {".json": "json", ".csv": "csv", ".md": "markdown", ".parquet": "parquet"}


def print_result(
    schema: pa.Schema, batches: Iterator[pa.RecordBatch], result_format: str, *, max_rows: int
) -> int:
    """Print a result on stdout; return how many rows were left out.

    Args:
        max_rows: tables and Markdown stop here; JSON and CSV print all rows, in flat memory.

    A table wider than the terminal is printed row by row, a line for each column.

    Raises:
        InvalidOption: Parquet, which is for files.
    """
    if result_format == "parquet":
        raise InvalidOption("parquet is not for a terminal: give --out FILE.parquet")
    if result_format in ("json", "csv"):
        _write_text(schema, batches, result_format, sys.stdout)
        return 0
    shown, left_out = _first(schema, batches, max_rows)
    if result_format == "markdown":
        _write_markdown(shown, sys.stdout)
    elif sys.stdout.isatty() and _width(shown) > get_terminal_size().columns:
        _print_records(shown, get_terminal_size().columns)
    else:
        print_table(shown)
    return left_out


def write_result(
    schema: pa.Schema, batches: Iterator[pa.RecordBatch], result_format: str, path: Path
) -> int:
    """Write a result to a file, under a temporary name first; return its rows.

    Raises:
        InvalidOption: the file cannot be written.
    """
    counted = _Counted(batches)
    try:
        with whole_file(path) as part:
            if result_format == "parquet":
                with pq.ParquetWriter(part, schema, compression="zstd") as writer:
                    for batch in counted:
                        writer.write_batch(batch)
            else:
                text = io.TextIOWrapper(part, encoding="utf-8", newline="")
                _write_text(schema, counted, result_format, text)
                text.detach()
    except OSError as error:
        raise InvalidOption(f"{path}: cannot be written ({error.strerror})") from error
    return counted.rows


def frame_of(batch: pa.RecordBatch | pa.Table) -> pl.DataFrame:
    """A batch as polars; DuckDB's sums of integers, which come as decimals, as integers."""
    frame = pl.DataFrame(pl.from_arrow(batch))
    whole = [
        name
        for name, dtype in frame.schema.items()
        if isinstance(dtype, pl.Decimal) and dtype.scale == 0
    ]
    return frame.with_columns(pl.col(name).cast(pl.Int128) for name in whole)


class _Counted:
    """Batches, counting their rows as they pass."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self.rows = 0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self._batches:
            self.rows += batch.num_rows
            yield batch


def _first(
    schema: pa.Schema, batches: Iterator[pa.RecordBatch], max_rows: int
) -> tuple[pl.DataFrame, int]:
    kept, rows, total = [], 0, 0
    for batch in batches:
        if rows < max_rows:
            kept.append(batch.slice(0, max_rows - rows))
            rows += kept[-1].num_rows
        total += batch.num_rows
    return frame_of(pa.Table.from_batches(kept, schema)), total - rows


def _write_text(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], result_format: str, file: IO[str]
) -> None:
    if result_format == "json":
        _write_json(batches, file)
    elif result_format == "csv":
        file.write(_flat(frame_of(schema.empty_table())).write_csv())
        for batch in batches:
            file.write(_flat(frame_of(batch)).write_csv(include_header=False))
    else:
        table = pa.Table.from_batches(list(batches), schema)
        if result_format == "markdown":
            _write_markdown(frame_of(table), file)
        else:
            with redirect_stdout(file):
                print_table(frame_of(table))


def _write_json(batches: Iterable[pa.RecordBatch], file: IO[str]) -> None:
    """One JSON array of objects, a line each; NaN and infinities become null."""
    file.write("[")
    separator = "\n"
    for batch in batches:
        for line in frame_of(batch).write_ndjson().splitlines():
            file.write(separator + line)
            separator = ",\n"
    file.write("\n]\n")


def _width(frame: pl.DataFrame) -> int:
    """Columns of a terminal that print_table needs."""
    widths = [
        max([cell_len(name), *(cell_len(cell(value)) for value in frame[name])])
        for name in frame.columns
    ]
    return sum(widths) + 2 * (len(widths) - 1)


def _print_records(frame: pl.DataFrame, width: int) -> None:
    names = max(map(cell_len, frame.columns))
    for number, row in enumerate(frame.iter_rows(), start=1):
        print(f"row {number:,}")
        for name, value in zip(frame.columns, row, strict=True):
            line = f"  {name:<{names}}  {cell(value)}"
            print(textwrap.fill(line, max(width, names + 24), subsequent_indent=" " * (names + 4)))


def _write_markdown(frame: pl.DataFrame, file: IO[str]) -> None:
    def line(cells: list[str]) -> str:
        texts = (text.replace("|", "\\|").replace("\n", "<br>") for text in cells)
        return "| " + " | ".join(texts) + " |\n"

    numeric = [dtype.is_numeric() for dtype in frame.dtypes]
    file.write(line(frame.columns))
    file.write(line(["--:" if right else ":--" for right in numeric]))
    for row in frame.iter_rows():
        file.write(line([cell(value) for value in row]))


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """Lists and structs as JSON text, which a cell of CSV can hold."""
    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
    return frame.with_columns(
        pl.Series(name, [_json(value) for value in frame[name].to_list()], pl.String)
        for name in nested
    )


def _json(value: Any) -> str | None:
    """A value as JSON, None for NULL; NaN and infinities become null, as in _write_json."""
    return None if value is None else as_json(value)
