"""`bhlog kde compare` and `bhlog kde check`."""

from typing import Any

import click

from analysis.commands.kde_options import check_figure, load, with_rows_options, write_figure
from analysis.table import format_option, print_frame, progress_bar

# What `check` can draw: function of analysis.kde.figures, axes, title.
CHECK_FIGURES = {
    "qq": ("plot_qq", "expected -log10 p", "observed -log10 p", "p-values against uniform"),
    "histogram": ("plot_histogram", "p", "density", "p-values against uniform"),
    "experts": (
        "plot_experts",
        "share of rows with the expert in the top k",
        "share of p at most 0.05",
        "bias of the null by popularity of experts",
    ),
    "ranks": (
        "plot_ranks",
        "expected -log10 of the k-th smallest of uniform p-values",
        "observed -log10 p",
        "k-th smallest p-value of a row",
    ),
}


@click.command(
    epilog="\b\nexample:\n"
    "  bhlog kde compare a.parquet b.parquet\n"
    "  bhlog kde compare a.parquet b.parquet --alpha 0.05 --run runs/native --figure tails.png"
)
@click.argument("a", metavar="KDE")
@click.argument("b", metavar="KDE")
@click.option("--alpha", type=float, default=0.05, show_default=True, metavar="A", help="BH level.")
@click.option("--run", metavar="RUN", help="Decide on the rows of this run.")
@click.option(
    "--experts",
    type=click.IntRange(min=1),
    metavar="E",
    help="Without a run, decide on rows of E logits drawn independently from what the first null "
    "model was fitted from.",
)
@click.option("--min-k", type=int, default=0, show_default=True, help="Fewest experts a row gets.")
@click.option("--max-k", type=int, help="Most experts a row gets (default: all).")
@click.option("--figure", metavar="FILE", help="Draw both tails, a panel a layer.")
@format_option
def compare(
    a: str,
    b: str,
    alpha: float,
    run: str | None,
    experts: int | None,
    min_k: int,
    max_k: int | None,
    figure: str | None,
    output_format: str,
) -> None:
    """Show how two null models differ, layer by layer.

    \b
    ks           largest difference of the tails
    wasserstein  area between the tails, in logits
    experts_a/b  mean experts per row that BH selects at alpha; needs --run or --experts
    """
    from analysis.kde.comparison import compare as compare_models
    from analysis.log import open_log

    check_figure(figure)
    first, second = load(a), load(b)
    log = open_log(run) if run is not None else None
    counted = log is not None or experts is not None or not (first.pooled and second.pooled)
    if not counted:
        click.echo("mean experts need --run RUN or --experts E: left out", err=True)
    with progress_bar("deciding", None) as progress:
        frame = compare_models(
            first,
            second,
            alpha=alpha if counted else None,
            n_experts=experts,
            log=log,
            min_k=min_k,
            max_k=max_k,
            progress=progress,
        )
    print_frame(frame, output_format, title=f"a: {a}   b: {b}   alpha {alpha}")
    if figure:
        from analysis.kde.figures import OTHER, layer_page, plot_tail

        def both(layer: int, axes: Any) -> Any:
            plot_tail(first[layer], axes, label=a)
            return plot_tail(second[layer], axes, color=OTHER, label=b)

        layers = sorted(set(first) & set(second))
        page = layer_page(layers, both, x="logit", y="S(x)", title="tails of two null models")
        write_figure(page, figure)


@click.command(
    epilog="\b\nexample:\n"
    "  bhlog kde check null.parquet runs/native\n"
    "  bhlog kde check null.parquet runs/native --draw ranks --figure ranks.png"
)
@click.argument("file", metavar="KDE")
@click.argument("run", metavar="RUN")
@click.option("--by-expert", is_flag=True, help="A line per layer and expert.")
@click.option("--figure", metavar="FILE", help="Draw a panel a layer.")
@click.option(
    "--draw",
    type=click.Choice(tuple(CHECK_FIGURES)),
    default="qq",
    show_default=True,
    help="What the figure shows.",
)
@with_rows_options
@format_option
def check(
    file: str,
    run: str,
    by_expert: bool,
    figure: str | None,
    draw: str,
    layers: tuple[int, ...] | None,
    where: str | None,
    sample: float,
    threads: int | None,
    output_format: str,
) -> None:
    """Check that p-values are uniform where they should be.

    \b
    ks             distance of the p-values from uniform, on rows trimmed as the null was
    p_0.05 ...     share of them at most 0.05 ...
    ks_expert      the same distance for each expert alone: the median, and the worst
    ks_rank_k      k-th smallest p-value of a row against the k-th uniform order statistic
    """
    from analysis.kde.calibration import check as check_model
    from analysis.kde.calibration import check_frame, expert_frame
    from analysis.log import open_log

    check_figure(figure)
    model, log = load(file), open_log(run)
    total = sum(group.rows for group in log.row_groups(layers))
    with progress_bar("checking", total) as progress:
        checks = check_model(
            model,
            log,
            layers=layers,
            where=where,
            sample=sample,
            threads=threads,
            progress=progress,
        )
    frame = expert_frame(checks) if by_expert else check_frame(checks)
    print_frame(frame, output_format, title=f"{file} on {run}")
    if figure:
        from analysis.kde import figures as kde_figures

        name, x, y, title = CHECK_FIGURES[draw]
        plot = getattr(kde_figures, name)
        found = {each.layer: each for each in checks}
        page = kde_figures.layer_page(
            list(found), lambda layer, axes: plot(found[layer], axes), x=x, y=y, title=title
        )
        write_figure(page, figure)
