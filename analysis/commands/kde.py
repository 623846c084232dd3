"""`bhlog kde`: fit, refit, merge, show, compare, check, import and export null models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kde_calibration import check, compare
from bhlog.analysis.commands.kinds import KDE, OUT_FILE, RUN, PathKind
from bhlog.analysis.commands.options import (
    Output,
    centre_option,
    check_figure,
    figure_option,
    fit_options,
    load_null,
    make_room,
    memory_option,
    model_out,
    open_run,
    output_options,
    read_trim,
    save_model,
    scope_options,
    write_figure,
)
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.uris import shown

if TYPE_CHECKING:
    from bhlog.analysis.fold import Scope


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
    "fit",
    epilog="\b\nexample:\n"
    "  bhlog kde fit runs/native --trim-high 8 --out null.parquet\n"
    "  bhlog kde fit runs/a runs/b --trim-high 8 --keep-trim 0:0 --out null.parquet",
)
@click.argument("runs", nargs=-1, required=True, type=RUN, metavar="RUN...")
@model_out
@fit_options(as_fitted=False)
@click.option(
    "--null",
    type=click.Choice(("pooled", "expert")),
    default="pooled",
    show_default=True,
    help="One curve a layer, or one a layer and expert.",
)
@centre_option(
    "Of logits less their row's median, which a shift of the row leaves alone.", default="none"
)
@click.option(
    "--keep-trim",
    type=read_trim,
    multiple=True,
    metavar="LOW:HIGH",
    help="Also keep the histogram at this trimming level, for refits; repeatable.",
)
@scope_options
@output_options("--table")
@memory_option
def fit_(
    runs: tuple[str, ...],
    out: str,
    fit: dict[str, Any],
    null: Any,
    centre: Any,
    keep_trim: tuple[tuple[int, int], ...],
    scope: "Scope",
    output: Output,
) -> None:
    """Fit a null model from the logits of one run or several, in one pass."""
    from bhlog.capture.contract.null.fit import FitOptions

    options = FitOptions(**fit, null=null, keep=keep_trim, centre=centre)
    first, *others = (open_run(run) for run in runs)
    listed = [log.rows_listed(scope.layers) for log in (first, *others)]
    total = sum(rows for rows in listed if rows) if all(listed) else None
    with progress_bar("fitting", total) as advance:
        model = first.fit(options, also=others, **vars(scope.but(progress=advance)))
    save_model(model, out, output)
    top_k, trim_high = first.manifest.model.top_k, options.trim_high
    if trim_high < top_k and options.null_from == "kept":
        click.echo(
            f"bhlog: --trim-high {trim_high} leaves experts that the model chose in their own "
            f"null, so that BH finds few; --trim-high {top_k} leaves them out",
            err=True,
        )


@kde.command(
    epilog="\b\nexample:\n  bhlog kde refit null.parquet --bandwidth isj --out isj.parquet"
)
@click.argument("file", type=KDE, metavar="KDE")
@model_out
@fit_options(as_fitted=True)
@output_options("--table")
@memory_option
def refit(file: str, out: str, fit: dict[str, Any], output: Output) -> None:
    """Fit again from the histograms in a null model file, without reading a log."""
    save_model(load_null(file).refit(**fit), out, output)


@kde.command(epilog="\b\nexample:\n  bhlog kde merge a.parquet b.parquet --out both.parquet")
@click.argument("files", nargs=-1, required=True, type=KDE, metavar="KDE...")
@model_out
@output_options("--table")
@memory_option
def merge(files: tuple[str, ...], out: str, output: Output) -> None:
    """Fit one null model from the histograms of several: of shards, ranks or runs."""
    first, *others = (load_null(file) for file in files)
    save_model(first.merge(*others), out, output)


@kde.command(
    epilog="\b\nexample:\n"
    "  bhlog kde show null.parquet\n"
    "  bhlog kde show null.parquet --alpha 0.05 --figure tails.png"
)
@click.argument("file", type=KDE, metavar="KDE")
@click.option("--alpha", type=float, metavar="A", help="Also show thresholds at this BH level.")
@click.option(
    "--n-experts",
    type=click.IntRange(min=1),
    metavar="E",
    help="Experts per router, for thresholds (default: those it was fitted for).",
)
@figure_option
@output_options()
@memory_option
def show(
    file: str, alpha: float | None, n_experts: int | None, figure: str | None, output: Output
) -> None:
    """Show what a null model was fitted from, layer by layer.

    --figure draws the tails, a panel a layer.
    """
    from bhlog.analysis.null.tables import curves_frame

    check_figure(figure)
    model = load_null(file)
    output.write(curves_frame(model, alpha, n_experts), title=shown(file))
    if figure:
        from bhlog.analysis.figures.gallery.tails import Tails

        subject = Tails(((shown(file), model),), alpha=alpha, n_experts=n_experts)
        write_figure("tails", "tails", subject, figure)


@kde.command("import", epilog="\b\nexample:\n  bhlog kde import old/kde_models --out null.parquet")
@click.argument("folder", type=PathKind("dir"), metavar="DIR")
@model_out
@click.option(
    "--variant",
    metavar="NAME",
    help="What follows the layer in the files' names, such as trimmed_4 (default: nothing).",
)
@output_options("--table")
def import_(folder: str, out: str, variant: str | None, output: Output) -> None:
    """Read distribution_model_layer_{i}.pkl files of an older project.

    The reader admits numpy arrays and nothing else: a pickle that names anything else is refused.
    """
    from bhlog.capture.contract.null.pickles import load_kde_models

    if not Path(folder).is_dir():
        raise InvalidOption(f"{folder}: no such folder; expected one with pickles of null models")
    save_model(load_kde_models(folder, variant=variant), out, output)


@kde.command(epilog="\b\nexample:\n  bhlog kde export null.parquet --out null.npz")
@click.argument("file", type=KDE, metavar="KDE")
@click.option(
    "--out",
    required=True,
    type=OUT_FILE,
    metavar="FILE",
    callback=lambda _, __, out: make_room(out),
    help="Where the arrays are written (.npz).",
)
@memory_option
def export(file: str, out: str) -> None:
    """Write the grids and tails as numpy arrays.

    \b
    layers            (L,) the layers
    x_{layer}         (G,) grid, in logits
    tail_{layer}      (G,) P(logit > x)
    With a curve per expert: x_{layer}_{expert}, tail_{layer}_{expert}.
    """
    from bhlog.analysis.null.export import export_npz

    model = load_null(file)
    export_npz(model, out)
    click.echo(f"wrote {shown(out)}: {len(model)} layers", err=True)


kde.add_command(compare)
kde.add_command(check)
