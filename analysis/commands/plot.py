"""`bhlog plot`: draw a run's figures."""

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kinds import FIGURE, OUT_FOLDER, RUN
from bhlog.analysis.commands.options import Output, kde_option, open_run, output_options


@click.command(
    epilog="\b\nexamples:\n  bhlog plot runs/demo/bh-0.3\n"
    "  bhlog plot runs/demo/native sweep --kde runs/demo/null.parquet --out figures\n"
    "  bhlog plot --list"
)
@click.argument("run", required=False, type=RUN)
@click.argument("figures", nargs=-1, type=FIGURE, metavar="[FIGURE]...")
@click.option(
    "--out",
    type=OUT_FOLDER,
    metavar="DIR",
    help="Where the PNG files go (default: RUN/figures).",
)
@kde_option
@click.option(
    "--alpha",
    type=float,
    metavar="A",
    help="BH level that p-values are held against (default: the run's own; 0.05 if native).",
)
@click.option("--list", "listing", is_flag=True, help="List the figures.")
@output_options("--table")
def plot(
    run: str | None,
    figures: tuple[str, ...],
    out: str | None,
    kde: str | None,
    alpha: float | None,
    listing: bool,
    output: Output,
) -> None:
    """Draw figures of a run as PNG files; without FIGURE, all that the run can show.

    Counts are of all rows; p-values of a random sample of rows.
    """
    import polars as pl

    from bhlog.analysis.figures.drawing import FIGURES

    if listing:
        rows = [
            {"figure": name, "shows": kind.shows, "needs": kind.needs or None}
            for name, kind in FIGURES.items()
        ]
        output.write(pl.DataFrame(rows))
        return
    if run is None:
        raise click.UsageError("name the run to draw, or --list")
    log = open_run(run)
    left_out: dict[str, list[str]] = {}  # figures by reason
    with progress_bar("plot", len(figures) or len(FIGURES), unit="figures") as advance:
        paths = log.plot(
            figures or None,
            out,
            kde=kde,
            alpha=alpha,
            left_out=lambda name, why: left_out.setdefault(why, []).append(name),
            progress=advance,
        )
    for why, names in left_out.items():
        click.echo(f"bhlog: left out {', '.join(names)}: {why}", err=True)
    output.write(pl.DataFrame({"figure": [str(path) for path in paths]}))
