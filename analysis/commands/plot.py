"""`bhlog plot`: draw a run's figures."""

from typing import TYPE_CHECKING

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kinds import FIGURE, OUT_FOLDER, RUN
from bhlog.analysis.commands.options import (
    Output,
    bounds_options,
    kde_option,
    memory_option,
    open_run,
    output_options,
)
from bhlog.analysis.commands.scheduler import scheduler_option

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from bhlog.analysis.figures.drawing import Image
    from bhlog.capture.contract.rule import Bounds


@click.command(
    epilog="\b\nexamples:\n  bhlog plot runs/demo/bh-0.3\n"
    "  bhlog plot runs/demo/native sweep --kde runs/demo/null.parquet --out figures\n"
    "  bhlog plot runs/demo/bh-0.3 --image pdf --data\n"
    "  bhlog plot --list"
)
@click.argument("run", required=False, type=RUN)
@click.argument("figures", nargs=-1, type=FIGURE, metavar="[FIGURE]...")
@click.option(
    "--out",
    type=OUT_FOLDER,
    metavar="DIR",
    help="Where the files go (default: RUN/figures).",
)
@click.option(
    "--image",
    type=click.Choice(("png", "svg", "pdf")),
    default="png",
    show_default=True,
    help="Format of the files.",
)
@click.option("--data", is_flag=True, help="Also write the numbers behind each figure, as CSV.")
@kde_option
@click.option(
    "--alpha",
    type=float,
    metavar="A",
    help="BH level that p-values are held against (default: the run's own; 0.05 if native).",
)
@bounds_options()
@scheduler_option
@click.option("--list", "listing", is_flag=True, help="List the figures.")
@output_options("--table")
@memory_option
def plot(
    run: str | None,
    figures: tuple[str, ...],
    out: str | None,
    image: "Image",
    data: bool,
    kde: str | None,
    alpha: float | None,
    bounds: "Bounds",
    executor: "Executor | None",
    listing: bool,
    output: Output,
) -> None:
    """Draw figures of a run; without FIGURE, all that it can show.

    Counts are of all rows, as logged; p-values of a random sample of rows.
    """
    import polars as pl

    from bhlog.analysis.figures import registry

    known = registry.figures()
    if listing:
        rows = [
            {"figure": name, "shows": kind.shows, "needs": kind.needs or None}
            for name, kind in known.items()
        ]
        output.write(pl.DataFrame(rows))
        return
    if run is None:
        raise click.UsageError("name the run to draw, or --list")
    log = open_run(run)
    log.executor = executor
    left_out: dict[str, list[str]] = {}  # figures by reason
    with progress_bar("plot", len(figures) or len(known), unit="figures") as advance:
        paths = log.plot(
            figures or None,
            out,
            kde=kde,
            alpha=alpha,
            **vars(bounds),
            image=image,
            data=data,
            left_out=lambda name, why: left_out.setdefault(why, []).append(name),
            progress=advance,
        )
    for why, names in left_out.items():
        click.echo(f"bhlog: left out {', '.join(names)}: {why}", err=True)
    output.write(pl.DataFrame({"figure": [str(path) for path in paths]}))
