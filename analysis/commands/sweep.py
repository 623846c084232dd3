"""`bhlog sweep`: all alphas in one pass, and the alpha for a budget."""

from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kinds import OUT_FILE, RUN
from bhlog.analysis.commands.options import (
    Output,
    bounds_options,
    bundle,
    kde_option,
    make_room,
    memory_option,
    null_named,
    open_run,
    output_options,
    scope_options,
)
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.uris import shown, suffix_of

if TYPE_CHECKING:
    import polars as pl

    from bhlog.analysis.fold import Scope
    from bhlog.analysis.sweep.profile import Profile
    from bhlog.capture.contract.null.model import KdeModel
    from bhlog.capture.contract.rule import Bounds

DEFAULT_ALPHAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Budget:
    """Experts a token to find the alphas for.

    Attributes:
        experts: mean experts a token; None asks for none.
        per_layer: whether layers share them, so that as much probability as possible is kept.
    """

    experts: float | None = None
    per_layer: bool = False

    def __post_init__(self) -> None:
        if self.per_layer and self.experts is None:
            raise InvalidOption("--per-layer shares a budget: give it with --experts K")


def _budget(experts: float | None, target_experts: float | None, per_layer: bool) -> Budget:
    return Budget(target_experts if experts is None else experts, per_layer)


budget_options = bundle(
    "budget",
    _budget,
    click.option(
        "--experts",
        type=float,
        metavar="K",
        help="Print the alpha that gives K experts a token, for each layer and for all together.",
    ),
    click.option("--target-experts", type=float, hidden=True),  # what --experts was called
    click.option(
        "--per-layer",
        is_flag=True,
        help="With --experts: share K experts a token among the layers, so that as much of the "
        "router's probability as possible is kept.",
    ),
)


@click.command(
    epilog="\b\nexamples:\n  bhlog sweep runs/demo/bh-0.3\n"
    "  bhlog sweep runs/demo/native --kde runs/demo/null.parquet --experts 4 --max-k 16\n"
    "  bhlog sweep runs/demo/bh-0.3 --save bh.profile\n"
    "  bhlog sweep bh.profile --experts 4 --per-layer"
)
@click.argument("runs", nargs=-1, required=True, type=RUN, metavar="RUN...")
@click.option(
    "--alpha",
    "alphas",
    type=float,
    multiple=True,
    help="Alphas to print; repeatable (default: a dozen from 0.01 to 0.9).",
)
@kde_option
@bounds_options()
@scope_options
@budget_options
@click.option(
    "--kept",
    is_flag=True,
    help="Count the probability that experts keep too, at about twice the cost; --per-layer does, "
    "a profile that is to answer it must.",
)
@click.option(
    "--save", type=OUT_FILE, metavar="FILE", help="Keep the profile, which answers without the log."
)
@output_options()
@memory_option
def sweep(
    runs: tuple[str, ...],
    alphas: tuple[float, ...],
    kde: str | None,
    bounds: "Bounds",
    scope: "Scope",
    budget: Budget,
    kept: bool,
    save: str | None,
    output: Output,
) -> None:
    """Mean experts per token at many alphas, from one pass over the log.

    RUN is a run's folder, or a profile that --save kept, which answers at once; several count
    together. noise is the same rule with each expert's logits shuffled over a sample of tokens: how
    many experts chance alone gives.
    """
    from bhlog.analysis.sweep.profile import Profile

    if save is not None:
        make_room(save)
    null, kept = null_named(kde), kept or budget.per_layer
    profile = reduce(Profile.merge, [_profile(run, alphas, kept, null, scope) for run in runs])
    if save is not None:
        profile.save(save)
        click.echo(f"wrote {shown(save)}", err=True)
    if budget.experts is not None:
        output.write(_targets(profile, budget.experts, bounds, budget.per_layer))
        return
    off = [alpha for alpha in alphas if alpha not in profile.alphas]
    if off:
        click.echo(
            f"bhlog: {', '.join(f'{alpha:g}' for alpha in off)} is between two alphas of the "
            "profile: what the lower one gives",
            err=True,
        )
    output.write(profile.frame(alphas or _within(profile), **vars(bounds)))


def _profile(
    run: str, alphas: tuple[float, ...], kept: bool, null: "KdeModel | None", scope: "Scope"
) -> "Profile":
    """The profile of a run, or the one in a file."""
    from bhlog.analysis.sweep.grid import grid_for
    from bhlog.analysis.sweep.profile import Profile
    from bhlog.analysis.sweep.profiling import profile_log

    if Path(run).is_file() or ("://" in run and suffix_of(run) == ".parquet"):
        if null is not None or scope.narrows:
            raise InvalidOption(
                f"{shown(run)}: a profile that is made already; --kde, --layers, --where and "
                "--sample need a run"
            )
        return Profile.load(run)
    log = open_run(run)
    shape = len(log.check_layers(scope.layers)), log.n_experts
    grid = sorted({*grid_for(*shape), *DEFAULT_ALPHAS, *alphas})
    with progress_bar("sweep", log.rows_listed(scope.layers)) as advance:
        return profile_log(log, null, alphas=grid, kept=kept, scope=scope.but(progress=advance))


def _within(profile: "Profile") -> list[float]:
    """The default alphas that the profile can answer at; its own if it can at none."""
    inside = [alpha for alpha in DEFAULT_ALPHAS if alpha >= profile.alphas[0]]
    return inside or profile.alphas.tolist()


def _targets(
    profile: "Profile", experts: float, bounds: "Bounds", per_layer: bool
) -> "pl.DataFrame":
    """The alphas that give a number of experts, layer by layer and over all (layer null)."""
    import polars as pl

    shared = profile.alphas_for(experts, **vars(bounds)) if per_layer else None
    rows: list[dict[str, float | None]] = []
    for layer in (*profile.layers, None):
        alpha = shared or profile.alpha_for(experts, **vars(bounds), layer=layer)
        mean = profile.mean_experts(alpha, **vars(bounds), layer=layer)
        one = alpha if isinstance(alpha, float) else None if layer is None else alpha[layer]
        rows.append({"layer": layer, "alpha": one, "mean_experts": mean})
        noise = profile.noise_experts(alpha, **vars(bounds), layer=layer)
        if noise is not None:
            rows[-1] |= {"noise_experts": noise[0], "noise_experts_se": noise[1]}
        if profile.kept is not None:
            share = profile.probability_kept(alpha, **vars(bounds), layer=layer)
            rows[-1]["probability_kept"] = share
    _note_floors(profile, experts, bounds)
    return pl.DataFrame(rows, infer_schema_length=None)


def _note_floors(profile: "Profile", experts: float, bounds: "Bounds") -> None:
    """Say which layers no alpha brings down to a number of experts, and why."""
    floors = {layer: profile.floor(**vars(bounds), layer=layer) for layer in profile.layers}
    above = {layer: floor for layer, floor in floors.items() if floor > experts}
    if above:
        layers = "1 layer" if len(above) == 1 else f"{len(above)} layers"
        worst = max(above, key=lambda layer: above[layer])
        click.echo(
            f"bhlog: {layers} cannot come down to {experts:g} experts a token: at alpha "
            f"{profile.alphas[0]:g}, the smallest, layer {worst} takes {above[worst]:.4g}; min_k "
            "and logits beyond the null model's support (p = 0 at any alpha) set a floor",
            err=True,
        )
