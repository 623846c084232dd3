"""`bhlog plot`: draw a run's figures."""

import click

from analysis.table import format_option, print_frame, progress_bar


@click.command(
    epilog="\b\nexamples:\n  bhlog plot runs/demo/bh-0.3\n"
    "  bhlog plot runs/demo/native sweep --kde runs/demo/null.parquet --out figures"
)
@click.argument("run", required=False)
@click.argument("figures", nargs=-1, metavar="[FIGURE]...")
@click.option("--out", metavar="DIR", help="Where the PNG files go (default: RUN/figures).")
@click.option("--kde", metavar="FILE", help="Null model for p-values (default: the run's own).")
@click.option("--alpha", type=float, help="BH level to show (default: the run's own).")
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
    """Draw figures of a run as PNG files; without FIGURE, all that the run can show."""
    import polars as pl

    from analysis.drawing import FIGURES, draw_figures
    from analysis.log import open_log
    from capture.kde import KdeModel

    if listing:
        rows = [
            {"figure": name, "shows": kind.title, "needs": ", ".join(kind.needs)}
            for name, kind in FIGURES.items()
        ]
        print_frame(pl.DataFrame(rows), output_format)
        return
    if run is None:
        raise click.UsageError("name the run to draw, or --list")
    log = open_log(run)
    null = None if kde is None else KdeModel.load(kde)
    with progress_bar("plot", log.manifest.totals.rows or None) as advance:
        paths = draw_figures(log, figures or None, out, kde=null, alpha=alpha, progress=advance)
    print_frame(pl.DataFrame({"figure": [str(path) for path in paths]}), output_format)
