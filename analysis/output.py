"""Results on their way out: as a table, JSON, CSV, Markdown or Parquet, to stdout or to a file."""

import csv
import io
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.analysis.cells import as_json, cell, escaped_json, for_csv, spelled_out
from bhlog.analysis.table import table_lines
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.uris import suffix_of

FORMATS = ("table", "json", "csv", "markdown", "parquet")
SUFFIXES = {".json": "json", ".csv": "csv", ".md": "markdown", ".parquet": "parquet"}

Batches = tuple[pa.Schema, Iterable[pa.RecordBatch]]  # a result that is read as it is written

_ROWS = 1 << 14  # of a frame, written at a time
_STEERS = r"[\p{C}\p{Zl}\p{Zp}]"  # control characters, and what turns text around
_SUSPECT = rf"^[=+@\-\t\r]|{_STEERS}"


@dataclass(frozen=True)
class Written:
    """What became of a result.

    Attributes:
        rows: rows written.
        left_out: rows that a table or Markdown had no room for; see write.
    """

    rows: int
    left_out: int = 0


def write(
    result: pl.DataFrame | Batches,
    format: str | None = None,
    out: str | Path | None = None,
    *,
    title: str = "",
    max_rows: int | None = None,
) -> Written:
    """Write a result.

    On a terminal no number is ever cut: see bhlog.analysis.table. Control characters, which could
    steer a terminal, are spelled out; CSV has an apostrophe before text that a spreadsheet would
    take for a formula, and lists as JSON.

    Args:
        result: a frame, or a schema and record batches.
        format: one of FORMATS; None is what the suffix of `out` says, or a table.
        out: file to write, or the URI of an object, whole or not at all; None prints on stdout.
        title: printed above a table.
        max_rows: tables and Markdown on stdout stop here; JSON and CSV have all rows, in flat
            memory.

    Raises:
        InvalidOption: no such format, Parquet without a file, or the file cannot be written.
    """
    format = format_of(format, out)
    frames = _Frames(result)
    if out is not None:
        _to_file(frames, format, out, title)
        return Written(frames.rows)
    if format == "parquet":
        raise InvalidOption("parquet is not for a terminal: give --out FILE.parquet")
    width = _terminal_width() if sys.stdout.isatty() else None
    return _to_text(frames, format, sys.stdout, title=title, max_rows=max_rows, width=width)


def format_of(format: str | None, out: str | Path | None) -> str:
    """The format that is asked for, or that a file's name says, or a table.

    Raises:
        InvalidOption: no such format.
    """
    if format is None:
        return "table" if out is None else SUFFIXES.get(suffix_of(out), "table")
    if format not in FORMATS:
        raise InvalidOption(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return format


class _Frames:
    """A result as frames, or as batches, which counts their rows as they pass."""

    def __init__(self, result: pl.DataFrame | Batches) -> None:
        self.rows = 0
        self.schema: pa.Schema
        self._batches: Iterable[pa.RecordBatch]
        if isinstance(result, pl.DataFrame):
            table = result.to_arrow(compat_level=pl.CompatLevel.oldest())
            self.schema, self._batches = table.schema, table.to_batches(max_chunksize=_ROWS)
            self.empty = result.clear()
        else:
            self.schema, self._batches = result
            self.empty = frame_of(self.schema.empty_table())

    def batches(self) -> Iterator[pa.RecordBatch]:
        """As Parquet takes them."""
        for batch in self._batches:
            self.rows += batch.num_rows
            yield batch

    def __iter__(self) -> Iterator[pl.DataFrame]:
        return (frame_of(batch) for batch in self.batches())

    def first(self, max_rows: int | None) -> tuple[pl.DataFrame, int]:
        """The first rows, and how many are left out."""
        kept, rows = [self.empty], 0
        for frame in self:
            wanted = frame if max_rows is None else frame.head(max(0, max_rows - rows))
            rows += wanted.height
            kept.append(wanted)
        return pl.concat(kept), self.rows - rows


def frame_of(batch: pa.RecordBatch | pa.Table) -> pl.DataFrame:
    """A batch as polars; DuckDB's sums of integers, which come as decimals, as integers."""
    frame = pl.DataFrame(pl.from_arrow(batch))
    whole = [
        name
        for name, dtype in frame.schema.items()
        if isinstance(dtype, pl.Decimal) and dtype.scale == 0
    ]
    return frame.with_columns(pl.col(name).cast(pl.Int128) for name in whole)


def _terminal_width() -> int:
    """Columns of the terminal that stdout is; COLUMNS in the environment says otherwise."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):  # no terminal after all, or none that has a size
        return 80


def _to_file(frames: _Frames, format: str, path: str | Path, title: str) -> None:
    try:
        with whole_file(path) as part:
            if format == "parquet":
                with pq.ParquetWriter(part, frames.schema, compression="zstd") as writer:
                    for batch in frames.batches():
                        writer.write_batch(batch)
            else:
                text = io.TextIOWrapper(part, encoding="utf-8", newline="")
                _to_text(frames, format, text, title=title)
                text.detach()
    except OSError as error:
        raise InvalidOption(f"{path}: cannot be written ({error.strerror or error})") from error


def _to_text(
    frames: _Frames,
    format: str,
    file: IO[str],
    *,
    title: str = "",
    max_rows: int | None = None,
    width: int | None = None,
) -> Written:
    if format == "json":
        _write_json(frames, file)
        return Written(frames.rows)
    if format == "csv":
        csv.writer(file, lineterminator="\n").writerow(map(for_csv, frames.empty.columns))
        for frame in frames:
            file.write(_flat(frame).write_csv(include_header=False))
        return Written(frames.rows)
    shown, left_out = frames.first(max_rows)
    if format == "markdown":
        _write_markdown(shown, file)
    else:
        lines = [spelled_out(title)] if title else []
        file.writelines(f"{line}\n" for line in (*lines, *table_lines(shown, width)))
    return Written(shown.height, left_out)


def _write_json(frames: Iterable[pl.DataFrame], file: IO[str]) -> None:
    """One JSON array of objects, a line each; NaN and infinities become null."""
    file.write("[")
    separator = "\n"
    for frame in frames:
        for line in frame.write_ndjson().split("\n"):
            if line:
                file.write(separator + escaped_json(line))
                separator = ",\n"
    file.write("\n]\n")


def _write_markdown(frame: pl.DataFrame, file: IO[str]) -> None:
    def line(cells: Iterable[str]) -> str:
        texts = (text.replace("|", "\\|").replace("\n", "<br>") for text in cells)
        return "| " + " | ".join(texts) + " |\n"

    numeric = [dtype.is_numeric() for dtype in frame.dtypes]
    file.write(line(map(spelled_out, frame.columns)))
    file.write(line("--:" if right else ":--" for right in numeric))
    for row in frame.iter_rows():
        file.write(line(cell(value) for value in row))


def _flat(frame: pl.DataFrame) -> pl.DataFrame:
    """As a cell of CSV can hold it: lists and structs as JSON, harmless text."""
    nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
    frame = frame.with_columns(
        pl.Series(name, [None if v is None else as_json(v) for v in frame[name].to_list()],
                  pl.String)
        for name in nested
    )  # fmt: skip
    text = [name for name, dtype in frame.schema.items() if dtype == pl.String]
    suspect = [name for name in text if frame[name].str.contains(_SUSPECT).any()]
    return frame.with_columns(
        pl.Series(name, [None if v is None else for_csv(v) for v in frame[name].to_list()],
                  pl.String)
        for name in suspect
    )  # fmt: skip
