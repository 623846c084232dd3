"""`bhlog kde compare` and `bhlog kde check`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kinds import KDE, RUN
from bhlog.analysis.commands.options import (
    Output,
    bounds_options,
    check_figure,
    figure_option,
    load_null,
    memory_option,
    note_one_sequence,
    open_run,
    output_options,
    scope_options,
    write_figure,
)
from bhlog.analysis.commands.scheduler import scheduler_option
from bhlog.capture.contract.uris import shown

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from bhlog.analysis.fold import Scope
    from bhlog.capture.contract.rule import Bounds

# names of figures("check") in bhlog.analysis.figures.registry
CHECK_FIGURES = ("qq", "histogram", "experts", "ranks")


@click.command(
    epilog="\b\nexample:\n"
    "  bhlog kde compare a.parquet b.parquet\n"
    "  bhlog kde compare a.parquet b.parquet --alpha 0.05 --run runs/native --figure tails.png"
)
@click.argument("a", type=KDE, metavar="KDE")
@click.argument("b", type=KDE, metavar="KDE")
@click.option("--alpha", type=float, default=0.05, show_default=True, metavar="A", help="BH level.")
@click.option("--run", type=RUN, metavar="RUN", help="Decide on the rows of this run.")
@click.option(
    "--n-experts",
    type=click.IntRange(min=1),
    metavar="E",
    help="Without a run, draw rows of E logits (default: those it was fitted for).",
)
@bounds_options(("0", "all"))
@scheduler_option
@figure_option
@output_options()
@memory_option
def compare(
    a: str,
    b: str,
    alpha: float,
    run: str | None,
    n_experts: int | None,
    bounds: "Bounds",
    executor: "Executor | None",
    figure: str | None,
    output: Output,
) -> None:
    """Show how two null models differ, layer by layer; --figure draws both tails.

    \b
    ks           largest difference of the tails
    wasserstein  area between the tails, in logits
    experts_a/b  mean experts per row that BH selects at alpha
    """
    from bhlog.analysis.fold import Scope
    from bhlog.analysis.null.difference import DRAWN_ROWS
    from bhlog.analysis.null.difference import compare as compare_models
    from bhlog.capture.contract.null.model import layer_ranges

    check_figure(figure)
    first, second = load_null(a), load_null(b)
    log = None if run is None else open_run(run)
    known = log or n_experts or first.n_experts or second.n_experts
    if not known:
        click.echo("bhlog: mean experts need --run RUN or --n-experts E: left out", err=True)
    elif log is None:
        click.echo(
            f"bhlog: mean experts of {DRAWN_ROWS:,} rows of independent logits, as {a} has them; "
            "--run RUN takes real rows",
            err=True,
        )
    only = sorted(set(first) ^ set(second))
    if only:
        click.echo(
            f"bhlog: left out layers {layer_ranges(only)}, which one of them lacks", err=True
        )
    with progress_bar("deciding", None) as progress:
        frame = compare_models(
            first,
            second,
            alpha=alpha if known else None,
            n_experts=n_experts,
            log=log,
            min_k=bounds.min_k or 0,
            max_k=bounds.max_k,
            scope=Scope(progress=progress, executor=executor),
        )
    output.write(frame, title=f"a: {a}   b: {b}   alpha {alpha}")
    if figure:
        from bhlog.analysis.figures.about import run_words
        from bhlog.analysis.figures.gallery.tails import Tails

        about = () if log is None else run_words(log)
        size = n_experts or (log.n_experts if log else None)
        tails = Tails(((a, first), (b, second)), about, alpha if known else None, size)
        write_figure("tails", "tails", tails, figure)


@click.command(
    epilog="\b\nexample:\n"
    "  bhlog kde check null.parquet runs/native\n"
    "  bhlog kde check null.parquet runs/native --draw ranks --figure ranks.png"
)
@click.argument("file", type=KDE, metavar="KDE")
@click.argument("run", type=RUN, metavar="RUN")
@click.option("--by-expert", is_flag=True, help="A line per layer and expert.")
@click.option(
    "--simulate",
    is_flag=True,
    help="Instead: false discovery rate and power of BH where the truth is known.",
)
@click.option(
    "--alpha",
    "alphas",
    type=float,
    multiple=True,
    default=(0.05, 0.3),
    show_default=True,
    help="Of --simulate; may be given several times.",
)
@click.option("--signals", default=8, show_default=True, help="Planted in a row.", metavar="N")
@click.option("--shift", default=2.0, show_default=True, help="Of a signal, in sd of the noise.")
@figure_option
@click.option(
    "--draw",
    type=click.Choice(CHECK_FIGURES),
    help="What the figure shows, a panel a layer (default: qq).",
)
@scope_options
@output_options()
@memory_option
def check(
    file: str,
    run: str,
    by_expert: bool,
    simulate: bool,
    alphas: tuple[float, ...],
    signals: int,
    shift: float,
    figure: str | None,
    draw: str | None,
    scope: "Scope",
    output: Output,
) -> None:
    """Check that p-values are uniform where they should be, and what BH makes of them.

    BH keeps the false discovery rate below alpha where the null is that of the tested logits. Under
    a trimmed null it does not: there it is a threshold that adapts to the row. --simulate plants
    signals in noise of the null's own shape and counts.

    \b
    ks             distance of the p-values from uniform, on rows trimmed as the null was
    p_0.05 ...     share of them at most 0.05 ...
    all_0.05 ...   the same of all logits, the trimmed ones among them
    pi0            share of all logits that are as the null has them (Storey)
    ks_expert      the same distance for each expert alone: the median, and the worst
    ks_rank_k      k-th smallest p-value of a row against the k-th uniform order statistic
    """
    from bhlog.analysis.null.calibration import check as check_model
    from bhlog.analysis.null.calibration import check_frame, expert_frame
    from bhlog.analysis.null.simulation import Planted
    from bhlog.analysis.null.simulation import simulate as simulated

    if simulate and (figure or by_expert or scope.narrows):
        raise click.UsageError("--simulate draws its own rows: leave the other options out")
    if draw and not figure:
        raise click.UsageError(f"--draw {draw} needs a file: --figure FILE")
    check_figure(figure)
    model, log = load_null(file), open_run(run)
    if simulate:
        planted = Planted(signals, shift)
        title = f"{shown(file)}: {signals} signals of {shift:g} sd in {planted.rows:,} rows a layer"
        output.write(simulated(model, alphas, log.n_experts, planted), title=title)
        return
    with progress_bar("checking", log.rows_listed(scope.layers)) as advance:
        checks = check_model(model, log, scope=scope.but(progress=advance))
    frame = expert_frame(checks) if by_expert else check_frame(checks)
    output.write(frame, title=f"{shown(file)} on {log.path}")
    if not by_expert:
        note_one_sequence(frame["all_0.05_se"])
    if figure:
        from bhlog.analysis.figures.about import null_words, run_words
        from bhlog.analysis.figures.gallery.checks import Checked

        about = (
            *run_words(log),
            null_words(model, Path(shown(file)).name),
            "no alpha: all p-values",
        )
        checked = Checked(checks, about, log.manifest.model.top_k)
        write_figure("check", draw or "qq", checked, figure)
