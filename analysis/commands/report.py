"""`bhlog report` and `bhlog explore`."""

import tempfile
import webbrowser
from pathlib import Path

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kinds import KDE, OUT_FILE, RUN
from bhlog.analysis.commands.options import make_room, memory_option, open_run
from bhlog.analysis.commands.scheduler import Cluster, scheduler_option
from bhlog.analysis.imports import needed

kdes_option = click.option(
    "--kde",
    "kdes",
    type=KDE,
    multiple=True,
    metavar="FILE",
    help="Null model, or a run that has one; repeatable: a curve each (default: each run's own).",
)

tokenizer_option = click.option(
    "--tokenizer",
    metavar="NAME",
    help="Folder, hub name or 'bytes': shows texts of tokens (default: the run's, if bytes).",
)


@click.command(
    epilog="\b\nexamples:\n  bhlog report runs/demo/native --kde runs/demo/null.parquet "
    "--out report.html\n  bhlog report runs/demo/native runs/demo/bh-0.3 "
    "--kde runs/demo/null.parquet --out r.html"
)
@click.argument("runs", nargs=-1, required=True, type=RUN, metavar="RUN...")
@kdes_option
@tokenizer_option
@click.option("--out", required=True, type=OUT_FILE, metavar="FILE", help="The page, one file.")
@scheduler_option
@memory_option
def report(
    runs: tuple[str, ...],
    kdes: tuple[str, ...],
    tokenizer: str | None,
    out: str,
    executor: Cluster | None,
) -> None:
    """One page about runs that opens from a disk: an explorer of alpha, plots, their numbers.

    The first RUN is what panels of one run are of; the others are compared with it.
    """
    make_room(out)
    page = _write(runs, kdes, tokenizer, out, executor)
    size = f"{page.stat().st_size / 1e6:.1f} MB" if isinstance(page, Path) else "written"
    click.echo(f"{page}: {size}")


@click.command(epilog="\b\nexample:\n  bhlog explore runs/demo/bh-0.3")
@click.argument("runs", nargs=-1, required=True, type=RUN, metavar="RUN...")
@kdes_option
@tokenizer_option
@scheduler_option
@memory_option
def explore(
    runs: tuple[str, ...],
    kdes: tuple[str, ...],
    tokenizer: str | None,
    executor: Cluster | None,
) -> None:
    """Write the report to a temporary file and open it in the browser."""
    path = Path(tempfile.mkdtemp(prefix="bhlog-")) / "report.html"
    _write(runs, kdes, tokenizer, str(path), executor)
    click.echo(str(path))
    if not webbrowser.open(path.as_uri()):
        click.echo("bhlog: no browser was found to open it in", err=True)


def _write(
    runs: tuple[str, ...],
    kdes: tuple[str, ...],
    tokenizer: str | None,
    out: str,
    executor: Cluster | None,
) -> "Path | str":
    """The page into a file; a bar moves while the logs are counted."""
    needed("bokeh", "report")
    from bhlog.analysis.report.document import MORE, write_report
    from bhlog.analysis.report.subject import Subject

    logs = [open_run(run) for run in runs]
    if executor is not None:
        executor.connect()  # what fails later is left out of the page
    for log in logs:
        log.executor = executor
    subject = Subject(logs, kdes, tokenizer=tokenizer)
    rows = sum(log.manifest.totals.rows for log in logs) * max(1, len(kdes))
    with progress_bar("report", rows or None) as advance:
        subject.count(advance)
    with progress_bar("panels", len(MORE), unit="panels") as advance:
        return write_report(subject, out, advance)
