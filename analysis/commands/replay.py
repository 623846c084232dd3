"""`bhlog replay` and `fidelity`."""

from typing import TYPE_CHECKING

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kinds import ALPHA, OUT_PLACE, RUN
from bhlog.analysis.commands.options import (
    Output,
    bounds_options,
    centre_option,
    kde_option,
    memory_option,
    note_one_sequence,
    note_summary,
    null_named,
    open_run,
    output_options,
    scope_options,
)
from bhlog.analysis.commands.scheduler import scheduler_option
from bhlog.capture.contract.errors import InvalidOption

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import polars as pl

    from bhlog.analysis.fold import Scope
    from bhlog.analysis.replay.settings import Alpha
    from bhlog.capture.contract.rule import Bounds

RENORMALIZE = ("model", "yes", "no")  # as in bhlog.capture.contract.rule
SHORT = (
    "alpha",
    "layer",
    "rows",
    "mean_experts",
    "mean_experts_se",
    "noise_experts",
    "sd_experts",
    "noise_sd_experts",
    "at_min_k",
    "at_max_k",
    "probability_kept",
    "probability_kept_se",
    "native_recall",
    "flops",
    "distinct_experts",
)


@click.command(
    epilog="\b\nexamples:\n  bhlog replay runs/demo/bh-0.3 --alpha 0.1 --alpha 0.3\n"
    "  bhlog replay runs/demo/native --kde runs/demo/null.parquet --alpha 0.3 --max-k 16\n"
    "  bhlog replay runs/demo/bh-0.3 --alpha 0.1 --out runs/demo/bh-0.3/replay\n"
    '  bhlog sql runs/demo/bh-0.3 "SELECT replay, avg(n_selected) FROM replays GROUP BY replay"'
)
@click.argument("run", type=RUN)
@click.option(
    "--alpha",
    "alphas",
    type=ALPHA,
    metavar="A|FILE",
    multiple=True,
    required=True,
    help="BH level, 0 < A < 1, or a file with one for each layer, as sweep --per-layer writes it; "
    "repeatable.",
)
@kde_option
@bounds_options()
@scope_options
@centre_option("Of which logits the null model must be (default: whichever it is).")
@click.option("--temperature", type=float, help="Of the weights (default: as in the run, or 1).")
@click.option(
    "--renormalize",
    type=click.Choice(RENORMALIZE),
    help="Whether written weights sum to 1 (default: as in the run, or as the model does).",
)
@click.option("--all-columns", is_flag=True, help="Print every column of the summary.")
@click.option(
    "--out",
    type=OUT_PLACE,
    metavar="DIR",
    help="Also write every decision, as Parquet shards in DIR or behind a URI; RUN/replay is where "
    "bhlog sql finds them, as the table replays.",
)
@output_options("--table")
@memory_option
def replay(
    run: str,
    alphas: "tuple[Alpha, ...]",
    kde: str | None,
    bounds: "Bounds",
    scope: "Scope",
    centre: str | None,
    temperature: float | None,
    renormalize: str | None,
    all_columns: bool,
    out: str | None,
    output: Output,
) -> None:
    """Recompute a run's expert selection at other values of alpha.

    Reads only the log: no model, no GPU. X_se is the standard error of X, clustered by sequence;
    noise_experts what the same rule takes where each expert's logits are shuffled over tokens.
    """
    from bhlog.analysis.replay.comparison import replay as replay_log
    from bhlog.analysis.replay.decisions import write_decisions
    from bhlog.analysis.replay.settings import bounds_words, settings_of
    from bhlog.capture.contract.rule import RENORMALIZE, require_centre

    log, null = open_run(run), null_named(kde)
    known = null or log.kde
    if centre is not None and known is not None:
        require_centre(centre, known.centre)
    settings = settings_of(
        log,
        alphas,
        bounds=bounds,
        temperature=temperature,
        renormalize=None if renormalize is None else RENORMALIZE[renormalize],
    )
    rows = log.rows_listed(scope.layers)
    if out is not None:
        if scope.narrows:
            raise InvalidOption(
                "--out writes every row of the log: leave --layers, --where and --sample out"
            )
        with progress_bar("write", rows) as advance:
            part = scope.but(progress=advance)
            folders = write_decisions(log, settings, out, kde=null, scope=part)
        for folder in folders:
            click.echo(f"wrote {folder}", err=True)
    with progress_bar("replay", rows) as advance:
        frame = replay_log(log, settings, kde=null, scope=scope.but(progress=advance))
    whole = all_columns or not output.for_people
    output.write(_shortened(frame, whole), title=f"{log.name}: {bounds_words(log, bounds)}")
    note_summary(frame, log, scope, output)


@click.command(
    epilog="\b\nexample:\n  bhlog fidelity runs/demo/native runs/demo/bh-0.3",
)
@click.argument("native", type=RUN)
@click.argument("bh", type=RUN)
@scheduler_option
@output_options()
@memory_option
def fidelity(native: str, bh: str, executor: "Executor | None", output: Output) -> None:
    """How far a what-if can be trusted: replay NATIVE at the settings of BH and compare with BH.

    Both runs must hold the same text. X_se is the standard error of X, clustered by sequence.
    """
    mine, rerun = open_run(native), open_run(bh)
    rows = sum(log.manifest.totals.rows for log in (mine, rerun))
    with progress_bar("compare", rows or None) as advance:
        frame = mine.fidelity(rerun, progress=advance, executor=executor)
    output.write(frame)
    note_one_sequence(frame["gap_se"])


def _shortened(frame: "pl.DataFrame", whole: bool) -> "pl.DataFrame":
    """The columns that fit a screen; the layer of the overall rows as text."""
    import polars as pl

    if whole:
        return frame
    layer = pl.col("layer").cast(pl.String).fill_null("all")
    return frame.select(SHORT).with_columns(layer)
