"""Tables as text: whole where there is room, else wrapped, turned or in blocks; never cut.

A table that is too wide for a terminal is laid out in the first way that fits:

1. long text wraps inside its column;
2. few rows: the table turns, and each row becomes a column;
3. its columns come in blocks one below the other, each beginning with the columns that say which
   row it is;
4. row by row, a line for each column.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl
from rich.cells import cell_len

from bhlog.analysis.cells import cell, spelled_out

_GAP = "  "
_LEAST_TEXT = 24  # columns of a terminal that text is wrapped to at least
_MOST_KEYS = 1 / 3  # share of a line that repeated columns may take


@dataclass(frozen=True)
class _Column:
    """A column of a table.

    Attributes:
        name: spelled out.
        cells: a text for each row.
        right: whether it stands on the right, as numbers do.
        wraps: whether it is text that may go on in the next line.
        is_float: whether it holds measures rather than names and counts.
    """

    name: str
    cells: tuple[str, ...]
    right: bool
    wraps: bool = False
    is_float: bool = False

    @property
    def width(self) -> int:
        """Columns of a terminal that it takes."""
        return max([cell_len(self.name), *(_width(text) for text in self.cells)])


def table_lines(frame: pl.DataFrame, width: int | None = None) -> Iterator[str]:
    """Lines of a table with a header; numbers to the right.

    Args:
        width: columns of the terminal; None leaves the table whole, for a pipe or a file.
    """
    columns = [_column(series) for series in frame]
    if width is None or _total(columns) <= width:
        yield from _lines(columns)
    elif (wrapped := _wrapped(columns, width)) is not None:
        yield from _lines(wrapped)
    elif frame.height and (turned := _turned(columns, width)) is not None:
        yield from _lines(turned)
    elif (blocks := _blocks(columns, width)) is not None:
        for number, block in enumerate(blocks):
            yield from ("",) if number else ()
            yield from _lines(block)
    else:
        yield from _records(columns, frame.height, width)


def _column(series: pl.Series) -> _Column:
    return _Column(
        spelled_out(series.name).replace("\n", " "),
        tuple(cell(value).expandtabs(4) for value in series.to_list()),
        right=series.dtype.is_numeric(),
        wraps=series.dtype == pl.String,
        is_float=series.dtype.is_float(),
    )


def _width(text: str) -> int:
    return max(map(cell_len, text.split("\n")))


def _total(columns: Sequence[_Column]) -> int:
    return sum(column.width + len(_GAP) for column in columns) - len(_GAP)


def _lines(columns: Sequence[_Column]) -> Iterator[str]:
    widths = [column.width for column in columns]
    yield _line([column.name for column in columns], columns, widths)
    for row in zip(*(column.cells for column in columns), strict=True):
        parts = [text.split("\n") for text in row]
        for n in range(max(map(len, parts))):
            yield _line([part[n] if n < len(part) else "" for part in parts], columns, widths)


def _line(texts: Sequence[str], columns: Sequence[_Column], widths: Sequence[int]) -> str:
    padded = []
    for text, column, width in zip(texts, columns, widths, strict=True):
        blank = " " * (width - cell_len(text))
        padded.append(blank + text if column.right else text + blank)
    return _GAP.join(padded).rstrip()


def _wrapped(columns: list[_Column], width: int) -> list[_Column] | None:
    """The columns with long texts wrapped, all to one width; None if that leaves too little.

    Columns of single words, as names are, stay whole where the others leave them room.
    """
    long = [i for i, c in enumerate(columns) if c.wraps and c.width > _LEAST_TEXT]
    of_words = [i for i in long if any(" " in text for text in columns[i].cells)]
    return _wrapped_ones(columns, of_words, width) or _wrapped_ones(columns, long, width)


def _wrapped_ones(columns: list[_Column], long: list[int], width: int) -> list[_Column] | None:
    room = width - _total([c for i, c in enumerate(columns) if i not in long])
    # what is shorter than its share leaves room to the others
    for done, i in enumerate(sorted(long, key=lambda i: columns[i].width)):
        share = room // (len(long) - done) - len(_GAP)
        if share < _LEAST_TEXT:
            return None
        columns = [*columns[:i], _to_width(columns[i], share), *columns[i + 1 :]]
        room -= columns[i].width + len(_GAP)
    return columns if long and _total(columns) <= width else None


def _to_width(column: _Column, width: int) -> _Column:
    wrapped = (
        "\n".join(
            piece
            for line in text.split("\n")
            for piece in textwrap.wrap(line, width, break_on_hyphens=False) or [""]
        )
        for text in column.cells
    )
    return _Column(column.name, tuple(wrapped), column.right)


def _turned(columns: Sequence[_Column], width: int) -> list[_Column] | None:
    """A column for each row, beside the names; None if there are too many."""
    first, *others = columns
    rows = len(first.cells)
    if rows >= len(columns) or not others or any("\n" in text for c in columns for text in c.cells):
        return None
    turned = [_Column(first.name, tuple(column.name for column in others), right=False)]
    turned += [
        _Column(first.cells[i], tuple(column.cells[i] for column in others), right=True)
        for i in range(rows)
    ]
    return turned if _total(turned) <= width else None


def _blocks(columns: Sequence[_Column], width: int) -> list[list[_Column]] | None:
    """As many columns as fit, after the ones that say which row it is; None if one does not fit."""
    keys = [columns[0]]
    for column in columns[1:]:
        if column.is_float or _total([*keys, column]) > width * _MOST_KEYS:
            break
        keys.append(column)
    blocks: list[list[_Column]] = [[*keys]]
    for column in columns[len(keys) :]:
        if _total([*keys, column]) > width:
            return None
        if _total([*blocks[-1], column]) > width:
            blocks.append([*keys])
        blocks[-1].append(column)
    return blocks if _total(keys) <= width else None


def _records(columns: Sequence[_Column], rows: int, width: int) -> Iterator[str]:
    names = max(cell_len(column.name) for column in columns)
    beside = width >= names + 4 + _LEAST_TEXT
    indent = " " * (names + 4 if beside else 4)
    if not rows:
        yield from (column.name for column in columns)
    for row in range(rows):
        yield f"row {row + 1:,}"
        for column in columns:
            head = f"  {column.name:<{names}}  " if beside else indent
            if not beside:
                yield f"  {column.name}"
            yield from textwrap.wrap(
                column.cells[row],
                width,
                initial_indent=head,
                subsequent_indent=indent,
                break_on_hyphens=False,
            ) or [head.rstrip()]
