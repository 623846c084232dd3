"""`bhlog cache`: what a cache of experts would have had at hand."""

from typing import TYPE_CHECKING

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kinds import ALPHA, POLICY, RUN
from bhlog.analysis.commands.options import (
    Output,
    bounds_options,
    check_figure,
    figure_option,
    kde_option,
    memory_option,
    null_named,
    open_run,
    output_options,
    scope_options,
    write_figure,
)

if TYPE_CHECKING:
    from bhlog.analysis.fold import Scope
    from bhlog.capture.contract.named import Bh
    from bhlog.capture.contract.rule import Bounds


@click.command(
    epilog="\b\nexamples:\n"
    "  bhlog cache runs/demo/native --budget 8 --budget 16\n"
    "  bhlog cache runs/demo/bh-0.3 --budget 8 --alpha 0.1 --policy topk:4 --figure hits.png\n"
    "  bhlog cache runs/demo/native --budget 4MiB --expert-bytes 96KiB"
)
@click.argument("run", type=RUN)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    required=True,
    metavar="K|SIZE",
    help="K experts of each layer, or a SIZE such as 4000MiB over all layers; repeatable.",
)
@click.option(
    "--alpha",
    "alphas",
    type=ALPHA,
    metavar="A|FILE",
    multiple=True,
    help="Under BH at this level; repeatable. Default: under the experts that the run used.",
)
@click.option(
    "--policy",
    "texts",
    multiple=True,
    type=POLICY,
    metavar="NAME:VALUE[,KEY=VALUE]",
    help="Under this policy, such as topk:4; repeatable.",
)
@click.option("--expert-bytes", metavar="SIZE", help="Of one expert, for budgets in bytes.")
@kde_option
@bounds_options()
@scope_options
@figure_option
@output_options()
@memory_option
def cache(
    run: str,
    budgets: tuple[str, ...],
    alphas: "tuple[float | Bh, ...]",
    texts: tuple[str, ...],
    expert_bytes: str | None,
    kde: str | None,
    bounds: "Bounds",
    scope: "Scope",
    figure: str | None,
    output: Output,
) -> None:
    """Hit rates of caches of experts, over a run in the order that its layers ran.

    A layer of a forward looks up each expert that its tokens chose, once; misses are loaded, then
    experts evicted until the budget holds. lru, lfu and belady (the optimum) start empty; pinned
    holds the most used of the whole run from before its start.
    """
    from bhlog.capture.contract.named import Bh

    if figure is not None:
        from bhlog.analysis.figures.about import run_words
        from bhlog.analysis.figures.gallery.caches import Cached, require_one_axis

        check_figure(figure)
        require_one_axis(budgets)
    log = open_run(run)
    policies = [*(str(alpha if isinstance(alpha, Bh) else Bh(alpha)) for alpha in alphas), *texts]
    with progress_bar("cache", log.rows_listed(scope.layers)) as advance:
        frame = log.cache(
            budgets,
            policies=policies,
            kde=null_named(kde),
            expert_bytes=expert_bytes,
            **vars(bounds),
            **vars(scope.but(progress=advance)),
        )
    output.write(frame)
    if figure is not None:
        cached = Cached(frame, (*run_words(log), *filter(None, [scope.words])), log.n_experts)
        write_figure("caches", "caches", cached, figure)
