"""`bhlog export`."""

from typing import TYPE_CHECKING

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kinds import ALPHA, OUT_FILE, RUN
from bhlog.analysis.commands.options import (
    bounds_options,
    kde_option,
    make_room,
    memory_option,
    null_named,
    open_run,
    scope_options,
)
from bhlog.capture.contract.uris import shown

if TYPE_CHECKING:
    from bhlog.analysis.fold import Scope
    from bhlog.capture.contract.named import Bh
    from bhlog.capture.contract.rule import Bounds

FORMATS = ("topk", "load", "hot", "thresholds")  # as in bhlog.analysis.exports.register


@click.command(
    epilog="\b\nexamples:\n"
    "  bhlog export topk runs/demo/native --experts 4 --out topk.json\n"
    "  bhlog export load runs/demo/native --out load.json\n"
    "  bhlog export thresholds runs/demo/bh-0.3 --alpha 0.3 --out bh.safetensors"
)
@click.argument("format", type=click.Choice(FORMATS))
@click.argument("run", type=RUN)
@click.option(
    "--alpha",
    type=ALPHA,
    metavar="A|FILE",
    help="The decisions of BH at this level, or at those of a file, one for each layer (default: "
    "as logged).",
)
@click.option("--experts", type=float, metavar="K", help="Those of K experts a token.")
@click.option(
    "--profile",
    type=RUN,
    metavar="FILE",
    help="What bhlog sweep --save kept: it knows the alpha of K experts without another pass.",
)
@kde_option
@bounds_options()
@scope_options
@click.option("--out", required=True, type=OUT_FILE, metavar="FILE", help="The file to write.")
@memory_option
def export(
    format: str,
    run: str,
    alpha: "float | Bh | None",
    experts: float | None,
    profile: str | None,
    kde: str | None,
    bounds: "Bounds",
    scope: "Scope",
    out: str,
) -> None:
    """Write an answer in the file that another engine reads.

    \b
    topk        a k for each layer, where it keeps most of the router's
                probability: num_experts_per_tok of vLLM's configs
    load        how often each expert is chosen: logical_count of SGLang's
                and ktransformers' --init-expert-location
    hot         experts by falling load, to keep in memory in that order
    thresholds  the rule's float32 thresholds by layer and rank, safetensors
    """
    from bhlog.analysis.exports.register import export as write
    from bhlog.analysis.exports.wanted import Wanted
    from bhlog.analysis.sweep.profile import Profile

    make_room(out)
    known = None if profile is None else Profile.load(profile)
    log, null = open_run(run), null_named(kde)
    with progress_bar("export", log.rows_listed(scope.layers)) as advance:
        part = scope.but(progress=advance)
        write(format, Wanted(log, alpha, experts, known, null, bounds, part), out)
    click.echo(f"wrote {shown(out)}", err=True)
