"""`bhlog kde`: fit, refit, merge, show, compare, check, import and export null models."""

from pathlib import Path
from typing import Any

import click

from bhlog.analysis.commands.kde_calibration import check, compare
from bhlog.analysis.commands.options import (
    check_figure,
    check_writable,
    load,
    open_run,
    out_option,
    read_trim,
    save_model,
    with_fit_options,
    with_rows_options,
    write_figure,
)
from bhlog.analysis.output import format_option, print_frame, progress_bar
from bhlog.capture.contract.errors import InvalidOption


@click.group(
    epilog="\b\nexample:\n"
    "  bhlog kde fit runs/native --trim-high 8 --out null.parquet\n"
    "  bhlog kde check null.parquet runs/native"
)
def kde() -> None:
    """Fit, inspect and check null models.

    A null model says how router logits of each layer are distributed; p-values come from its tail.
    KDE is a file that `kde fit` wrote, a run with a null model of its own, or a folder of pickles
    of an older project.
    """


@kde.command(
    epilog="\b\nexample:\n"
    "  bhlog kde fit runs/native --trim-high 8 --out null.parquet\n"
    "  bhlog kde fit runs/a runs/b --trim-high 8 --keep-trim 0:0 --out null.parquet"
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@out_option
@with_fit_options(as_fitted=False)
@click.option(
    "--null",
    type=click.Choice(("pooled", "expert")),
    default="pooled",
    show_default=True,
    help="One curve a layer, or one a layer and expert.",
)
@click.option(
    "--keep-trim",
    type=read_trim,
    multiple=True,
    metavar="LOW:HIGH",
    help="Also keep the histogram at this trimming level, for refits; repeatable.",
)
@with_rows_options
@format_option
def fit(
    runs: tuple[str, ...],
    out: str,
    kernel: str,
    bandwidth: str | float,
    trim_high: int,
    trim_low: int,
    null: Any,
    keep_trim: tuple[tuple[int, int], ...],
    layers: tuple[int, ...] | None,
    where: str | None,
    sample: float,
    threads: int | None,
    output_format: str,
) -> None:
    """Fit a null model from the logits of one run or several, in one pass."""
    from bhlog.analysis.fold import Scope
    from bhlog.analysis.null.estimate import FitOptions, fit_kde

    check_writable(out)
    options = FitOptions(kernel, bandwidth, trim_low, trim_high, null, keep_trim)
    logs = [open_run(run) for run in runs]
    total = sum(group.rows for log in logs for group in log.row_groups(layers))
    with progress_bar("fitting", total) as progress:
        scope = Scope(layers, where, sample, threads, progress)
        model = fit_kde(logs, options, scope=scope)
    save_model(model, out, output_format)
    top_k = logs[0].manifest.model.top_k
    if trim_high < top_k:
        click.echo(
            f"bhlog: --trim-high {trim_high} leaves experts that the model chose in their own "
            f"null, so that BH finds few; --trim-high {top_k} leaves them out",
            err=True,
        )


@kde.command(
    epilog="\b\nexample:\n  bhlog kde refit null.parquet --bandwidth isj --out isj.parquet"
)
@click.argument("file", metavar="KDE")
@out_option
@with_fit_options(as_fitted=True)
@format_option
def refit(file: str, out: str, output_format: str, **changes: Any) -> None:
    """Fit again from the histograms in a null model file, without reading a log."""
    check_writable(out)
    save_model(load(file).refit(**changes), out, output_format)


@kde.command(epilog="\b\nexample:\n  bhlog kde merge a.parquet b.parquet --out both.parquet")
@click.argument("files", nargs=-1, required=True, metavar="KDE...")
@out_option
@format_option
def merge(files: tuple[str, ...], out: str, output_format: str) -> None:
    """Fit one null model from the histograms of several: of shards, ranks or runs."""
    check_writable(out)
    first, *others = [load(file) for file in files]
    save_model(first.merge(*others), out, output_format)


@kde.command(
    epilog="\b\nexample:\n"
    "  bhlog kde show null.parquet\n"
    "  bhlog kde show null.parquet --alpha 0.05 --figure tails.png"
)
@click.argument("file", metavar="KDE")
@click.option("--alpha", type=float, metavar="A", help="Also show thresholds at this BH level.")
@click.option(
    "--experts",
    type=click.IntRange(min=1),
    metavar="E",
    help="Experts per router, for thresholds (default: those it was fitted for).",
)
@click.option("--figure", metavar="FILE", help="Draw the tails, a panel a layer.")
@format_option
def show(
    file: str, alpha: float | None, experts: int | None, figure: str | None, output_format: str
) -> None:
    """Show what a null model was fitted from, layer by layer."""
    from bhlog.analysis.null.tables import curves_frame

    check_figure(figure)
    model = load(file)
    print_frame(curves_frame(model, alpha, experts), output_format, title=file)
    if figure:
        from bhlog.analysis.null.figures import tail_page

        write_figure(tail_page({file: model}), figure)


@kde.command("import", epilog="\b\nexample:\n  bhlog kde import old/kde_models --out null.parquet")
@click.argument("folder", metavar="DIR")
@out_option
@click.option(
    "--variant",
    metavar="NAME",
    help="What follows the layer in the files' names, such as trimmed_4 (default: nothing).",
)
@format_option
def import_(folder: str, out: str, variant: str | None, output_format: str) -> None:
    """Read distribution_model_layer_{i}.pkl files of an older project.

    The reader admits numpy arrays and nothing else: a pickle that names anything else is refused.
    """
    from bhlog.capture.contract.null.pickles import load_kde_models

    check_writable(out)
    if not Path(folder).is_dir():
        raise InvalidOption(f"{folder}: no such folder; expected one with pickles of null models")
    save_model(load_kde_models(folder, variant=variant), out, output_format)


@kde.command(epilog="\b\nexample:\n  bhlog kde export null.parquet --out null.npz")
@click.argument("file", metavar="KDE")
@click.option("--out", required=True, metavar="FILE", help="Where the arrays are written (.npz).")
def export(file: str, out: str) -> None:
    """Write the grids and tails as numpy arrays.

    \b
    layers            (L,) the layers
    x_{layer}         (G,) grid, in logits
    tail_{layer}      (G,) P(logit > x)
    With a curve per expert: x_{layer}_{expert}, tail_{layer}_{expert}.
    """
    from bhlog.analysis.null.export import export_npz

    check_writable(out)
    model = load(file)
    export_npz(model, out)
    click.echo(f"wrote {out}: {len(model)} layers", err=True)


kde.add_command(compare)
kde.add_command(check)
