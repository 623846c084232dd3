"""A bar on stderr that moves while a job reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(label: str, total: int | None, *, unit: str = "rows") -> Iterator[Any]:
    """A bar on stderr with rows/s; gives a thread-safe function that takes the rows just done.

    The function also takes a note to show beside the rate.
    """
    import rich.progress as bars  # slow to import
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn(unit),
        bars.TextColumn("{task.fields[rate]} {task.fields[note]}"),
        bars.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with bars.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total, rate="", note="")

        def advance(n: int, note: str = "") -> None:
            bar.update(task, advance=n, note=note)
            speed = bar.tasks[0].speed
            if speed:
                bar.update(task, rate=f"{speed:,.0f} {unit}/s")

        yield advance
