"""`bhlog compare`: policies over one log, side by side."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kinds import POLICY, RUN
from bhlog.analysis.commands.options import (
    Output,
    bounds_options,
    check_figure,
    figure_option,
    kde_option,
    memory_option,
    note_summary,
    null_named,
    open_run,
    output_options,
    scope_options,
    write_figure,
)
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.uris import shown

if TYPE_CHECKING:
    import polars as pl

    from bhlog.analysis.fold import Scope
    from bhlog.analysis.log import Log
    from bhlog.analysis.replay.policy import Policy
    from bhlog.analysis.run import Run
    from bhlog.capture.contract.null.model import KdeModel
    from bhlog.capture.contract.rule import Bounds

SHORT = (
    "policy",
    "layer",
    "mean_experts",
    "mean_experts_se",
    "noise_experts",
    "sd_experts",
    "noise_sd_experts",
    "at_min_k",
    "at_max_k",
    "probability_kept",
    "probability_kept_se",
    "probability_kept_difference",
    "probability_kept_difference_se",
    "native_jaccard",
    "native_recall",
    "load_entropy",
    "load_gini",
    "busiest_share",
    "dead_experts",
    "flops",
    "distinct_experts",
)
HELD_OUT = (
    "policy",
    "null",
    "fitted_experts",
    "mean_experts",
    "noise_experts",
    "probability_kept",
    "native_recall",
    "flops",
)


@click.command(
    epilog="\b\nexamples:\n"
    "  bhlog compare runs/demo/bh-0.3 --policy bh:0.3 --policy topk:8 --policy topp:0.5\n"
    "  bhlog compare runs/demo/native --kde runs/demo/null.parquet --experts 8 --figure cost.png\n"
    "  bhlog compare --fit-on runs/demo/fit --test-on runs/demo/native --experts 6 --max-k 16\n"
    "  bhlog compare --list"
)
@click.argument("run", required=False, type=RUN)
@click.option(
    "--policy",
    "texts",
    multiple=True,
    type=POLICY,
    metavar="NAME:VALUE[,KEY=VALUE]",
    help="A policy, such as bh:0.3 or topk:4,max_k=16; repeatable. With --experts the value may be "
    "left out. Default: every policy, at the model's own experts per token.",
)
@click.option(
    "--experts",
    type=float,
    metavar="K",
    help="Bring every policy to K mean experts per token first, by its value.",
)
@click.option(
    "--fit-on",
    type=RUN,
    metavar="RUN",
    help="Choose parameters on this run, under null models fitted from it: whole, trimmed, "
    "central, centred, by expert.",
)
@click.option("--test-on", type=RUN, metavar="RUN", help="Report on this one, of another text.")
@kde_option
@bounds_options()
@scope_options
@click.option("--by-layer", is_flag=True, help="A line for each layer too.")
@click.option("--all-columns", is_flag=True, help="Print every column of the summary.")
@figure_option
@click.option("--list", "listing", is_flag=True, help="List the policies.")
@output_options()
@memory_option
def compare(
    run: str | None,
    texts: tuple[str, ...],
    experts: float | None,
    fit_on: str | None,
    test_on: str | None,
    kde: str | None,
    bounds: "Bounds",
    scope: "Scope",
    by_layer: bool,
    all_columns: bool,
    figure: str | None,
    listing: bool,
    output: Output,
) -> None:
    """Compare policies over a run: what each would have chosen, and at what cost.

    Reads only the log: no model, no GPU. X_se is the standard error of X, clustered by sequence;
    X_difference is X less that of the first policy, row by row; noise_experts: the same rule where
    each expert's logits are shuffled over a sample of tokens. --figure draws probability kept
    against experts, a curve a policy. --fit-on and --test-on hold a text out: what one run chose,
    on the other.
    """
    import polars as pl

    if listing:
        output.write(_families())
        return
    if fit_on is not None or test_on is not None:
        if fit_on is None or test_on is None or run is not None:
            raise InvalidOption("--fit-on RUN goes with --test-on RUN, and no other run")
        if kde is not None or by_layer or figure is not None:
            raise InvalidOption(
                "--fit-on fits nulls of its own and prints one table: leave "
                "--kde, --by-layer and --figure out"
            )
        frame = _held_out(open_run(fit_on), open_run(test_on), texts, experts, bounds, scope)
        output.write(frame if all_columns or not output.for_people else frame.select(HELD_OUT))
        return
    if run is None:
        raise click.UsageError("name the run to compare policies on, or --list")
    check_figure(figure)
    log, null = open_run(run), null_named(kde)
    if not texts:
        texts = _all_policies(log, null, scope)
        experts = log.manifest.model.top_k if experts is None else experts
    policies = _policies(log, texts, experts, null, bounds, scope)
    with progress_bar("compare", log.rows_listed(scope.layers)) as advance:
        rows = vars(scope.but(progress=advance))
        frame = log.compare(policies, kde=null, **vars(bounds), **rows)
    output.write(_shortened(frame, by_layer=by_layer, whole=all_columns or not output.for_people))
    note_summary(frame, log, scope, output)
    _note_bounds(log, bounds)
    if experts is not None:
        _note_misses(frame.filter(pl.col("layer").is_null()), experts)
    if figure is not None:
        overall, kept = frame.filter(pl.col("layer").is_null()), "probability_kept"
        errors = dict(overall.select("policy", f"{kept}_se").drop_nulls().iter_rows())
        differences = overall.select("policy", f"{kept}_difference", f"{kept}_difference_se")
        paired = {text: (x, se) for text, x, se in differences[1:].drop_nulls().iter_rows()}
        _draw(log, policies, null, kde, figure, bounds, scope, errors, paired)


def _held_out(
    fitted: "Run",
    tested: "Run",
    texts: tuple[str, ...],
    experts: float | None,
    bounds: "Bounds",
    scope: "Scope",
) -> "pl.DataFrame":
    from bhlog.analysis.replay.empirical import not_whole
    from bhlog.analysis.replay.held_out import held_out
    from bhlog.analysis.replay.registry import families

    whole = not any(not_whole(log, scope) for log in (fitted, tested))
    texts = texts or (*(name for name, kind in families().items() if whole or not kind.pools),)
    budget = fitted.manifest.model.top_k if experts is None else experts
    with progress_bar("held out", None) as advance:
        rows = scope.but(progress=advance)
        return held_out(fitted, tested, texts, budget, bounds=bounds, scope=rows)


def _policies(
    log: "Log",
    texts: tuple[str, ...],
    experts: float | None,
    null: "KdeModel | None",
    bounds: "Bounds",
    scope: "Scope",
) -> "list[Policy]":
    """The policies that are named, brought to a budget if there is one."""
    from bhlog.analysis.replay.match import match_experts
    from bhlog.analysis.replay.registry import parse_policy

    policies = [parse_policy(text, open_value=experts is not None) for text in texts]
    if experts is None:
        return policies
    with progress_bar("match", None) as advance:
        scope = scope.but(progress=advance)
        return match_experts(log, policies, experts, kde=null, bounds=bounds, scope=scope)


def _all_policies(log: "Log", null: "KdeModel | None", scope: "Scope") -> tuple[str, ...]:
    """Every family; without p-values only those that do not test, and of parts of forwards those
    that take a token alone."""
    from bhlog.analysis.nulls import has_p_values
    from bhlog.analysis.replay.empirical import not_whole
    from bhlog.analysis.replay.registry import families

    tested, known = has_p_values(log, null), families()
    kde = null or log.kde
    if tested and not (kde and all(layer.central for layer in kde.values())):
        known.pop("lfdr")  # it has no other null to go by
    parts = not_whole(log, scope)
    for name in [name for name, kind in known.items() if kind.pools and parts]:
        click.echo(f"bhlog: left out {name}, which ranks whole forwards: {parts}", err=True)
        known.pop(name)
    left_out = [name for name, kind in known.items() if kind.tests and not tested]
    if left_out:
        click.echo(
            f"bhlog: left out {', '.join(left_out)}: {log.path} has no null model of its own; "
            "give one with --kde FILE",
            err=True,
        )
    return tuple(name for name in known if name not in left_out)


def _note_bounds(log: "Log", bounds: "Bounds") -> None:
    """Say on stderr which bounds the run lends to every policy, top-k among them."""
    from bhlog.analysis.replay.settings import bounds_of

    lends = bounds_of(log)
    lent = [
        f"{name} {value}"
        for name, value, asked, none in (
            ("min_k", lends.min_k, bounds.min_k, 1),
            ("max_k", lends.max_k, bounds.max_k, None),
        )
        if asked is None and value not in (none, None)
    ]
    if lent:
        click.echo(
            f"bhlog: {' and '.join(lent)} as in the run; --min-k and --max-k say otherwise",
            err=True,
        )


def _note_misses(overall: "pl.DataFrame", experts: float) -> None:
    """Say on stderr which policies could not be brought to the budget."""
    missed = [
        f"{policy} ({mean:.4g})"
        for policy, mean in overall.select("policy", "mean_experts").iter_rows()
        if abs(mean - experts) > 0.01
    ]
    if missed:
        click.echo(
            f"bhlog: no value gives exactly {experts:g} experts, this is the nearest: "
            f"{', '.join(missed)}",
            err=True,
        )


def _families() -> "pl.DataFrame":
    import polars as pl

    from bhlog.analysis.replay.registry import families

    rows = []
    for name, kind in families().items():
        summary = (kind.__doc__ or "").strip().splitlines()[0]
        own = [f for f in fields(kind) if not f.kw_only and f.name != kind.parameter]
        options = [f",{f.name.rstrip('_')}={f.default}" for f in own]
        example = f"{name}:{kind.example:g}{''.join(options)}"
        rows.append({"policy": example, "parameter": kind.parameter, "chooses": summary})
    return pl.DataFrame(rows)


def _shortened(frame: "pl.DataFrame", *, by_layer: bool, whole: bool) -> "pl.DataFrame":
    """The rows asked for, with the columns that fit a screen."""
    import polars as pl

    if not by_layer:
        frame = frame.filter(pl.col("layer").is_null())
    if whole:
        return frame
    layer = pl.col("layer").cast(pl.String).fill_null("all")
    short = frame.select(SHORT).with_columns(layer)
    return short if by_layer else short.drop("layer")


def _draw(
    log: "Log",
    policies: "list[Policy]",
    null: "KdeModel | None",
    kde: str | None,
    figure: str,
    bounds: "Bounds",
    scope: "Scope",
    errors: dict[str, float],
    paired: dict[str, tuple[float, float]],
) -> None:
    from bhlog.analysis.figures.about import bound_words, null_words, run_words
    from bhlog.analysis.figures.gallery.policies import Compared
    from bhlog.analysis.replay.cost_curves import cost_curves
    from bhlog.analysis.replay.settings import bounds_of
    from bhlog.capture.contract.null.model import layer_ranges

    curves = cost_curves(log, policies, kde=null, bounds=bounds, scope=scope)
    low, high = bounds_of(log, bounds).resolve(log.n_experts)
    known, name = null or log.kde, Path(shown(kde)).name if kde else "the run's own"
    about = [
        *run_words(log),
        "no null model" if known is None else null_words(known, name),
        bound_words(low, high, log.n_experts),
    ]
    if scope.layers is not None:
        about.append(f"layers {layer_ranges(scope.layers)}")
    if scope.where is not None:
        about.append(f"rows where {scope.where}")
    subject = Compared(curves, tuple(about), errors, paired)
    write_figure("policies", "policies", subject, figure)
