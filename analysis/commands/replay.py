"""`bhlog replay`, `sweep` and `fidelity`."""

from typing import TYPE_CHECKING

import click

from analysis.table import format_option, print_frame, progress_bar
from capture.contract.errors import InvalidOption

if TYPE_CHECKING:
    import polars as pl

    from capture.contract.kde import KdeModel

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
    "  bhlog replay runs/demo/native --kde runs/demo/null.parquet --alpha 0.3 --max-k 16"
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
@click.option("--kde", metavar="FILE", help="Null model (default: the run's own).")
@click.option("--min-k", type=int, help="Fewest experts a token (default: as in the run, or 1).")
@click.option("--max-k", type=int, help="Most experts a token (default: as in the run, or all).")
@click.option("--temperature", type=float, help="Of the weights (default: as in the run, or 1).")
@click.option("--layer", "layers", type=int, multiple=True, help="Only this layer; repeatable.")
@click.option("--where", metavar="SQL", help="Only rows that match: \"phase = 'decode'\".")
@click.option("--all-columns", is_flag=True, help="Print every column of the summary.")
@click.option("--out", metavar="DIR", help="Also write every decision, as Parquet shards in DIR.")
@format_option
def replay(
    run: str,
    alphas: tuple[float, ...],
    kde: str | None,
    min_k: int | None,
    max_k: int | None,
    temperature: float | None,
    layers: tuple[int, ...],
    where: str | None,
    all_columns: bool,
    out: str | None,
    output_format: str,
) -> None:
    """Recompute a run's expert selection at other values of alpha.

    Reads only the log: no model, no GPU.
    """
    from analysis.log import open_log
    from analysis.replay.decisions import write_decisions
    from analysis.replay.replay import replay as replay_log
    from analysis.replay.replay import settings_of

    log = open_log(run)
    null = _null_model(kde)
    settings = settings_of(log, alphas, min_k=min_k, max_k=max_k, temperature=temperature)
    if out is not None and (layers or where):
        raise InvalidOption("--out writes every row of the log: leave --layer and --where out")
    if out is not None:
        with progress_bar("write", log.manifest.totals.rows or None) as advance:
            folders = write_decisions(log, settings, out, kde=null, progress=advance)
        for folder in folders:
            click.echo(f"wrote {folder}", err=True)
    with progress_bar("replay", log.manifest.totals.rows or None) as advance:
        frame = replay_log(
            log, settings, kde=null, layers=layers or None, where=where, progress=advance
        )
    print_frame(_shortened(frame, all_columns or output_format != "table"), output_format)


@click.command(
    epilog="\b\nexamples:\n  bhlog sweep runs/demo/bh-0.3\n"
    "  bhlog sweep runs/demo/native --kde runs/demo/null.parquet --target-experts 4 --max-k 16"
)
@click.argument("run")
@click.option(
    "--alpha",
    "alphas",
    type=float,
    multiple=True,
    help="Alphas to print; repeatable (default: a dozen from 0.01 to 0.9).",
)
@click.option("--kde", metavar="FILE", help="Null model (default: the run's own).")
@click.option("--min-k", type=int, default=1, show_default=True, help="Fewest experts a token.")
@click.option("--max-k", type=int, help="Most experts a token (default: all).")
@click.option(
    "--target-experts",
    type=float,
    metavar="K",
    help="Print the alpha that gives K experts a token, per layer and overall.",
)
@click.option("--save", metavar="FILE", help="Keep the profile, which answers without the log.")
@format_option
def sweep(
    run: str,
    alphas: tuple[float, ...],
    kde: str | None,
    min_k: int,
    max_k: int | None,
    target_experts: float | None,
    save: str | None,
    output_format: str,
) -> None:
    """Mean experts per token at many alphas, from one pass over the log."""
    import polars as pl

    from analysis.log import open_log
    from analysis.replay.profile import GRID, profile_log

    log = open_log(run)
    grid = sorted({*GRID, *alphas})
    with progress_bar("sweep", log.manifest.totals.rows or None) as advance:
        profile = profile_log(log, _null_model(kde), alphas=grid, progress=advance)
    if save is not None:
        profile.save(save)
    if target_experts is None:
        frame = profile.frame(alphas or DEFAULT_ALPHAS, min_k=min_k, max_k=max_k)
        print_frame(frame, output_format)
        return
    rows = []
    for layer in [*sorted(profile.counts), None]:
        alpha = profile.alpha_for(target_experts, min_k=min_k, max_k=max_k, layer=layer)
        mean = profile.mean_experts(alpha, min_k=min_k, max_k=max_k, layer=layer)
        rows.append({"layer": layer, "alpha": alpha, "mean_experts": mean})
    print_frame(pl.DataFrame(rows, infer_schema_length=None), output_format)


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
    from analysis.log import open_log
    from analysis.replay.fidelity import fidelity as compare

    print_frame(compare(open_log(native), open_log(bh)), output_format)


def _null_model(path: str | None) -> "KdeModel | None":
    from capture.contract.kde import KdeModel

    return None if path is None else KdeModel.load(path)


def _shortened(frame: "pl.DataFrame", whole: bool) -> "pl.DataFrame":
    """The columns that fit a screen; the layer of the overall rows as text."""
    import polars as pl

    if whole:
        return frame
    layer = pl.col("layer").cast(pl.String).fill_null("all")
    return frame.select(SHORT).with_columns(layer)
