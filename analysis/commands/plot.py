"""`bhlog plot`: draw a run's figures."""

import click

from bhlog.analysis.commands.options import load, open_run
from bhlog.analysis.output import format_option, print_frame, progress_bar


@click.command(
    epilog="\b\nexamples:\n  bhlog plot runs/demo/bh-0.3\n"
    "  bhlog plot runs/demo/native sweep --kde runs/demo/null.parquet --out figures\n"
    "  bhlog plot --list"
)
@click.argument("run", required=False)
@click.argument("figures", nargs=-1, metavar="[FIGURE]...")
@click.option("--out", metavar="DIR", help="Where the PNG files go (default: RUN/figures).")
@click.option(
    "--kde",
    metavar="FILE",
    help="Null model for p-values, or a run that has one (default: the run's own, or its "
    "empirical p-values).",
)
@click.option(
    "--alpha",
    type=float,
    metavar="A",
    help="BH level that p-values are held against (default: the run's own; 0.05 if native).",
)
@click.option("--list", "listing", is_flag=True, help="List the figures.")
@format_option
def plot(
    run: str | None,
    figures: tuple[str, ...],
    out: str | None,
    kde: str | None,
    alpha: float | None,
    listing: bool,
    output_format: str,
) -> None:
    """Draw figures of a run as PNG files; without FIGURE, all that the run can show.

    Counts are of all rows; p-values of a random sample of rows.
    """
    import polars as pl

    from bhlog.analysis.figures.drawing import FIGURES, draw_figures

    if listing:
        rows = [
            {"figure": name, "shows": kind.shows, "needs": kind.needs or None}
            for name, kind in FIGURES.items()
        ]
        print_frame(pl.DataFrame(rows), output_format)
        return
    if run is None:
        raise click.UsageError("name the run to draw, or --list")
    log = open_run(run)
    null = None if kde is None else load(kde)
    left_out: dict[str, list[str]] = {}  # figures by reason
    with progress_bar("plot", len(figures) or len(FIGURES), unit="figures") as advance:
        paths = draw_figures(
            log,
            figures or None,
            out,
            kde=null,
            alpha=alpha,
            left_out=lambda name, why: left_out.setdefault(why, []).append(name),
            progress=advance,
        )
    for why, names in left_out.items():
        click.echo(f"bhlog: left out {', '.join(names)}: {why}", err=True)
    print_frame(pl.DataFrame({"figure": [str(path) for path in paths]}), output_format)
