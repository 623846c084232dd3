"""`bhlog replay`, `sweep` and `fidelity`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from bhlog.analysis.commands.options import (
    check_writable,
    kde_option,
    layers_option,
    load,
    open_run,
    where_option,
    with_replay_options,
)
from bhlog.analysis.output import format_option, print_frame, progress_bar
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.rule import RENORMALIZE, Bounds

if TYPE_CHECKING:
    import polars as pl

    from bhlog.analysis.sweep.profile import Profile
    from bhlog.capture.contract.null.model import KdeModel

DEFAULT_ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SHORT = (
    "alpha",
    "layer",
    "rows",
    "mean_experts",
    "sd_experts",
    "at_min_k",
    "at_max_k",
    "probability_kept",
    "native_recall",
    "logged_jaccard",
    "load_entropy",
    "flops",
)


@click.command(
    epilog="\b\nexamples:\n  bhlog replay runs/demo/bh-0.3 --alpha 0.1 --alpha 0.3\n"
    "  bhlog replay runs/demo/native --kde runs/demo/null.parquet --alpha 0.3 --max-k 16\n"
    "  bhlog replay runs/demo/bh-0.3 --alpha 0.1 --out runs/demo/bh-0.3/replay\n"
    '  bhlog sql runs/demo/bh-0.3 "SELECT replay, avg(n_selected) FROM replays GROUP BY replay"'
)
@click.argument("run")
@click.option(
    "--alpha",
    "alphas",
    type=float,
    multiple=True,
    required=True,
    help="BH level, 0 < A < 1; repeatable.",
)
@with_replay_options
@click.option("--temperature", type=float, help="Of the weights (default: as in the run, or 1).")
@click.option(
    "--renormalize",
    type=click.Choice([*RENORMALIZE]),
    help="Whether written weights sum to 1 (default: as in the run, or as the model does).",
)
@click.option("--all-columns", is_flag=True, help="Print every column of the summary.")
@click.option(
    "--out",
    metavar="DIR",
    help="Also write every decision, as Parquet shards in DIR; RUN/replay is where "
    "bhlog sql finds them, as the table replays.",
)
@format_option
def replay(
    run: str,
    alphas: tuple[float, ...],
    kde: str | None,
    min_k: int | None,
    max_k: int | None,
    temperature: float | None,
    renormalize: str | None,
    layers: tuple[int, ...] | None,
    where: str | None,
    all_columns: bool,
    out: str | None,
    output_format: str,
) -> None:
    """Recompute a run's expert selection at other values of alpha.

    Reads only the log: no model, no GPU.
    """
    from bhlog.analysis.fold import Scope
    from bhlog.analysis.replay.comparison import replay as replay_log
    from bhlog.analysis.replay.decisions import write_decisions
    from bhlog.analysis.replay.settings import settings_of

    log = open_run(run)
    null = _null_model(kde)
    settings = settings_of(
        log,
        alphas,
        bounds=Bounds(min_k, max_k),
        temperature=temperature,
        renormalize=None if renormalize is None else RENORMALIZE[renormalize],
    )
    if out is not None and (layers or where):
        raise InvalidOption("--out writes every row of the log: leave --layers and --where out")
    if out is not None:
        with progress_bar("write", log.manifest.totals.rows or None) as advance:
            scope = Scope(progress=advance)
            folders = write_decisions(log, settings, out, kde=null, scope=scope)
        for folder in folders:
            click.echo(f"wrote {folder}", err=True)
    with progress_bar("replay", log.manifest.totals.rows or None) as advance:
        scope = Scope(layers, where, progress=advance)
        frame = replay_log(log, settings, kde=null, scope=scope)
    print_frame(_shortened(frame, all_columns or output_format != "table"), output_format)


@click.command(
    epilog="\b\nexamples:\n  bhlog sweep runs/demo/bh-0.3\n"
    "  bhlog sweep runs/demo/native --kde runs/demo/null.parquet --target-experts 4 --max-k 16\n"
    "  bhlog sweep runs/demo/bh-0.3 --save bh.profile\n"
    "  bhlog sweep bh.profile --target-experts 4 --per-layer"
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--alpha",
    "alphas",
    type=float,
    multiple=True,
    help="Alphas to print; repeatable (default: a dozen from 0.01 to 0.9).",
)
@kde_option
@click.option("--min-k", type=int, help="Fewest experts a token (default: as in the run, or 1).")
@click.option("--max-k", type=int, help="Most experts a token (default: as in the run, or all).")
@layers_option
@where_option
@click.option(
    "--target-experts",
    type=float,
    metavar="K",
    help="Print the alpha that gives K experts a token, for each layer and for all together.",
)
@click.option(
    "--per-layer",
    is_flag=True,
    help="With --target-experts: share K experts a token among the layers, so that as much of the "
    "router's probability as possible is kept.",
)
@click.option(
    "--kept",
    is_flag=True,
    help="Count the probability that experts keep too, at about twice the cost; --per-layer does, "
    "a profile that is to answer it must.",
)
@click.option("--save", metavar="FILE", help="Keep the profile, which answers without the log.")
@format_option
def sweep(
    runs: tuple[str, ...],
    alphas: tuple[float, ...],
    kde: str | None,
    min_k: int | None,
    max_k: int | None,
    layers: tuple[int, ...] | None,
    where: str | None,
    target_experts: float | None,
    per_layer: bool,
    kept: bool,
    save: str | None,
    output_format: str,
) -> None:
    """Mean experts per token at many alphas, from one pass over the log.

    RUN is a run's folder, or a profile that --save kept, which answers at once; several count
    together.
    """
    from functools import reduce

    from bhlog.analysis.sweep.profile import Profile

    if per_layer and target_experts is None:
        raise InvalidOption("--per-layer shares a budget: give it with --target-experts K")
    if save is not None:
        check_writable(save)
    null = _null_model(kde)
    profiles = [_profile(run, alphas, kept or per_layer, null, layers, where) for run in runs]
    profile = reduce(Profile.merge, profiles)
    if save is not None:
        profile.save(save)
        click.echo(f"wrote {save}", err=True)
    if target_experts is not None:
        print_frame(_targets(profile, target_experts, min_k, max_k, per_layer), output_format)
        return
    off = [alpha for alpha in alphas if alpha not in profile.alphas]
    if off:
        click.echo(
            f"bhlog: {', '.join(f'{alpha:g}' for alpha in off)} is between two alphas of the "
            "profile: what the lower one gives",
            err=True,
        )
    frame = profile.frame(alphas or _within(profile), min_k=min_k, max_k=max_k)
    print_frame(frame, output_format)


@click.command(
    epilog="\b\nexample:\n  bhlog fidelity runs/demo/native runs/demo/bh-0.3",
)
@click.argument("native")
@click.argument("bh")
@format_option
def fidelity(native: str, bh: str, output_format: str) -> None:
    """How far a what-if can be trusted: replay NATIVE at the settings of BH and compare with BH.

    Both runs must hold the same text.
    """
    from bhlog.analysis.fold import Scope
    from bhlog.analysis.replay.fidelity import fidelity as compare

    logs = open_run(native), open_run(bh)
    rows = sum(log.manifest.totals.rows for log in logs)
    with progress_bar("compare", rows or None) as advance:
        frame = compare(*logs, scope=Scope(progress=advance))
    print_frame(frame, output_format)


def _profile(
    run: str,
    alphas: tuple[float, ...],
    kept: bool,
    null: "KdeModel | None",
    layers: tuple[int, ...] | None,
    where: str | None,
) -> "Profile":
    """The profile of a run, or the one in a file."""
    from bhlog.analysis.fold import Scope
    from bhlog.analysis.sweep.profile import GRID, Profile
    from bhlog.analysis.sweep.profiling import profile_log

    if Path(run).is_file():
        if null is not None or layers or where is not None:
            raise InvalidOption(
                f"{run}: a profile that is made already; --kde, --layers and --where need a run"
            )
        return Profile.load(run)
    log = open_run(run)
    with progress_bar("sweep", log.manifest.totals.rows or None) as advance:
        scope = Scope(layers, where, progress=advance)
        return profile_log(log, null, alphas=sorted({*GRID, *alphas}), kept=kept, scope=scope)


def _within(profile: "Profile") -> list[float]:
    """The default alphas that the profile can answer at; its own if it can at none."""
    inside = [alpha for alpha in DEFAULT_ALPHAS if alpha >= profile.alphas[0]]
    return inside or profile.alphas.tolist()


def _targets(
    profile: "Profile", experts: float, min_k: int | None, max_k: int | None, per_layer: bool
) -> "pl.DataFrame":
    """The alphas that give a number of experts, layer by layer and over all (layer null)."""
    import polars as pl

    shared = profile.alphas_for(experts, min_k=min_k, max_k=max_k) if per_layer else None
    rows: list[dict[str, float | None]] = []
    for layer in (*profile.layers, None):
        alpha = shared or profile.alpha_for(experts, min_k=min_k, max_k=max_k, layer=layer)
        mean = profile.mean_experts(alpha, min_k=min_k, max_k=max_k, layer=layer)
        one = alpha if isinstance(alpha, float) else None if layer is None else alpha[layer]
        rows.append({"layer": layer, "alpha": one, "mean_experts": mean})
        if profile.kept is not None:
            share = profile.probability_kept(alpha, min_k=min_k, max_k=max_k, layer=layer)
            rows[-1]["probability_kept"] = share
    return pl.DataFrame(rows, infer_schema_length=None)


def _null_model(path: str | None) -> "KdeModel | None":
    return None if path is None else load(path)


def _shortened(frame: "pl.DataFrame", whole: bool) -> "pl.DataFrame":
    """The columns that fit a screen; the layer of the overall rows as text."""
    import polars as pl

    if whole:
        return frame
    layer = pl.col("layer").cast(pl.String).fill_null("all")
    return frame.select(SHORT).with_columns(layer)
