"""`bhlog import`."""

from typing import Any

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.commands.kinds import OUT_FOLDER, PathKind
from bhlog.analysis.commands.options import read_layers

FORMATS = ("megatron", "numpy", "vllm", "sglang", "route-trace")  # as in engines.formats
_EXPERTS = click.IntRange(1, (1 << 16) - 1)


@click.command(
    "import",
    epilog="\b\nexamples:\n"
    "  bhlog import route-trace phone.route.csv --out runs/phone\n"
    "  bhlog import vllm answers.jsonl --n-experts 128 --out runs/served",
)
@click.argument("format", type=click.Choice(FORMATS))
@click.argument("path", type=PathKind("file"))
@click.option("--out", required=True, type=OUT_FOLDER, metavar="RUN", help="The run to write.")
@click.option("--model", metavar="NAME", help="The model's name, where the trace has none.")
@click.option(
    "--layers",
    type=read_layers,
    metavar="LIST",
    help="Decoder layers with a router, such as 1-27, where the trace does not tell.",
)
@click.option("--n-experts", type=_EXPERTS, metavar="E", help="Experts per router.")
@click.option("--top-k", type=_EXPERTS, metavar="K", help="Experts per token.")
@click.option("--norm-topk-prob", is_flag=True, help="The model's weights are made to sum to 1.")
@click.option("--scoring", type=click.Choice(["softmax", "sigmoid"]), default="softmax",
              help="How the model makes weights of logits.")  # fmt: skip
def import_(format: str, path: str, out: str, **told: Any) -> None:
    """Write another engine's log of its routing as a run.

    \b
    megatron     Megatron-core's router_trace: a folder, or a rank's .jsonl
    numpy        a folder of logits by layer, router_logits_L{l}.npy
    vllm         answers with routed_experts, as JSON or a line each; or .npy
    sglang       answers with routed_experts, as JSON or a line each; or what
                 its recorder dumped, .pt (needs torch)
    route-trace  the CSV of an engine that streams experts (BigMoeOnEdge)

    Megatron's (if it was asked for them) and numpy's have logits, so that everything works on the
    run. The others have experts alone: loads, co-activation, routes and caches, no replays.
    """
    from bhlog.analysis.engines.formats import read_trace
    from bhlog.analysis.engines.trace import Told
    from bhlog.analysis.engines.writing import write_trace

    with progress_bar("import", None) as advance:
        manifest = write_trace(read_trace(format, path, Told(**told)), out, advance)
    model, totals = manifest.model, manifest.totals
    click.echo(
        f"{out}: {totals.tokens:,} tokens, {totals.rows:,} rows, {len(model.layers)} layers, top "
        f"{model.top_k} of {model.n_experts} experts, {'with' if manifest.logits else 'no'} logits"
    )
    for name, n in manifest.options.items():
        if isinstance(n, int):  # counts of what is not as it was
            click.echo(f"{n:,} {name.replace('_', ' ')}")
