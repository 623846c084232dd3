"""`bhlog info` and `bhlog verify`."""

from typing import TYPE_CHECKING, Any

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.cells import cell, spelled_out
from bhlog.analysis.commands.kinds import RUN
from bhlog.analysis.commands.options import Output, output_options
from bhlog.capture.contract.errors import CorruptRun

if TYPE_CHECKING:
    import polars as pl

    from bhlog.analysis.run import Run

NOT_CLOSED = 3  # exit status of verify
_MOST_SOURCES = 8  # shown in a table; programs get all of them


@click.command(epilog="\b\nexample:\n  bhlog info runs/demo/bh-0.3")
@click.argument("run", type=RUN)
@output_options()
def info(run: str, output: Output) -> None:
    """What a run is and what it holds.

    Counts are those of the sealed shards, so they hold for a run that is still open or was killed.
    """
    import polars as pl

    from bhlog.analysis.run import open_log
    from bhlog.analysis.verify.facts import facts_of

    facts = facts_of(open_log(run))
    if not output.for_people:
        output.write(_one_row(facts, words=output.kind != "json"))
        return
    if facts["closed"] is None:
        facts["closed"] = "no: still running, or killed"
    text = {name: _words(value) for name, value in facts.items() if value is not None}
    output.write(pl.DataFrame({"fact": list(text), "value": list(text.values())}))


@click.command(
    epilog="\b\nexamples:\n  bhlog verify runs/demo/bh-0.3 --replay\n"
    "  bhlog verify s3://bucket/run --format json",
)
@click.argument("run", type=RUN)
@click.option("--replay", is_flag=True, help="Also replay the run at its own settings.")
@output_options()
def verify(run: str, replay: bool, output: Output) -> int:
    """Is a run whole, and does replay reproduce it?

    Reads every page of every shard and prints what was found: ok, warning (worth knowing, nothing
    is wrong) or error. Exits 1 if there is an error, 3 if there is none but the run was not closed:
    its capture still runs or was killed. It cannot tell whether the model gave these logits and
    losses; weights it compares with the formula that the manifest tells.
    """
    import polars as pl

    from bhlog.analysis.run import open_log

    log = open_log(run)
    rows = log.manifest.totals.rows * (1 + replay)
    with progress_bar("verify", rows or None) as advance:
        frame = log.verify(replay=replay, progress=advance)
    output.write(frame)
    errors = frame.filter(pl.col("status") == "error").height
    if errors:
        raise CorruptRun(f"{run}: {errors} {'error' if errors == 1 else 'errors'} found")
    if log.manifest.closed is None:
        click.echo(f"bhlog: {spelled_out(_missing(log))}", err=True)
        return NOT_CLOSED
    return 0


def _missing(log: "Run") -> str:
    """What an open run has and lacks, in a line."""
    tokens = sum(log.open_shard("tokens", name).metadata.num_rows for name in log.token_shards)
    shards = "1 sealed shard" if len(log.shards) == 1 else f"{len(log.shards):,} sealed shards"
    return (
        f"{log.path}: not closed: {tokens:,} tokens in {shards} are whole, what came after them "
        "is missing; let the capture end, or continue it with --resume"
    )


def _one_row(facts: dict[str, Any], *, words: bool) -> "pl.DataFrame":
    """Facts as a frame; counts by name as text where a format has no room for them."""
    import polars as pl

    plain = {n: _words(v) if words and isinstance(v, dict) else v for n, v in facts.items()}
    return pl.DataFrame([plain], infer_schema_length=None)


def _words(value: object) -> str:
    if isinstance(value, dict):
        parts = [f"{name} {cell(count)}" for name, count in value.items()]
        more = len(parts) - _MOST_SOURCES
        return ", ".join(parts[:_MOST_SOURCES]) + (f" and {more} more" if more > 0 else "") or "-"
    return cell(value)
