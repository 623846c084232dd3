"""Printing results: tables for people, JSON and CSV for programs."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
import polars as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

FORMATS = ("table", "json", "csv")

F = TypeVar("F", bound=Callable[..., Any])


def format_option(command: F) -> F:
    """Add `--format table|json|csv` to a command, as the argument output_format."""
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        help="How results print on stdout.",
    )(command)


def print_frame(frame: pl.DataFrame, output_format: str = "table", *, title: str = "") -> None:
    """Print a DataFrame on stdout: a table, one JSON array of objects, or CSV with a header.

    CSV has no lists: their items stand in one field, a space between them.
    """
    if output_format == "json":
        print(as_json(frame.to_dicts()))
    elif output_format == "csv":
        lists = pl.selectors.list().cast(pl.List(pl.String)).list.join(" ")
        sys.stdout.write(frame.with_columns(lists).write_csv())
    else:
        print_table(frame, title=title)


def print_table(frame: pl.DataFrame, *, title: str = "") -> None:
    """Print a DataFrame as a table; numbers to the right, floats to four significant digits."""
    table = Table(box=None, pad_edge=False)
    for name, dtype in frame.schema.items():
        table.add_column(name, justify="right" if dtype.is_numeric() else "left")
    for row in frame.iter_rows():
        table.add_row(*(cell(value) for value in row))
    # A pipe has no width: never fold or cut a table that a program or a file will read.
    console = Console() if sys.stdout.isatty() else Console(width=10_000)
    if title:
        console.print(spelled_out(title), markup=False, highlight=False, soft_wrap=True)
    console.print(table, markup=False, highlight=False)


def as_json(value: Any) -> str:
    """A value as JSON, which has no NaN or infinity: null stands for them."""
    try:
        return json.dumps(value, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cell(value: object) -> str:
    """One value as text for a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(cell(item) for item in value)
    return spelled_out(str(value))


def spelled_out(text: str) -> str:
    """Text with control characters spelled out: a log from a stranger must not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t\xa0" else c.encode("unicode_escape").decode()
        for c in text
    )


@contextmanager
def progress_bar(label: str, total: int | None, *, unit: str = "rows") -> Iterator[Any]:
    """A bar on stderr with rows/s; gives a thread-safe function that takes the rows just done.

    The function also takes a note to show beside the rate.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]} {task.fields[note]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total, rate="", note="")

        def advance(n: int, note: str = "") -> None:
            bar.update(task, advance=n, note=note)
            speed = bar.tasks[0].speed
            if speed:
                bar.update(task, rate=f"{speed:,.0f} {unit}/s")

        yield advance
