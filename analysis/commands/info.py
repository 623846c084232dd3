"""`bhlog info` and `bhlog verify`."""

from typing import TYPE_CHECKING, Any

import click

from bhlog.analysis.bar import progress_bar
from bhlog.analysis.cells import cell, spelled_out
from bhlog.analysis.commands.kinds import RUN
from bhlog.analysis.commands.options import Output, memory_option, output_options
from bhlog.analysis.commands.scheduler import scheduler_option
from bhlog.capture.contract.errors import CorruptRun, InvalidOption
from bhlog.capture.contract.uris import shown

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import polars as pl

    from bhlog.analysis.run import Run

NOT_CLOSED = 3  # exit status of verify
_MOST_SOURCES = 8  # shown in a table; programs get all of them


@click.command(epilog="\b\nexample:\n  bhlog info runs/demo/bh-0.3")
@click.argument("run", type=RUN)
@output_options()
@memory_option
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
    "  bhlog verify s3://bucket/run --format json\n  bhlog verify runs/null.parquet",
)
@click.argument("run", type=RUN)
@click.option("--replay", is_flag=True, help="Also replay the run at its own settings.")
@scheduler_option
@output_options()
@memory_option
def verify(run: str, replay: bool, executor: "Executor | None", output: Output) -> int:
    """Is a run whole, and does replay reproduce it?

    RUN is a run's folder, or a null model or profile in a file of its own.

    Reads every page of every shard and prints what was found: ok, warning (worth knowing, nothing
    is wrong) or error. Exits 1 if there is an error, 3 if there is none but the run was not closed:
    its capture still runs or was killed. It cannot tell whether the model gave these logits and
    losses; weights it compares with the formula that the manifest tells.
    """
    from bhlog.analysis.run import open_log
    from bhlog.analysis.verify.kept_file import is_kept_file

    if is_kept_file(run):
        return _verify_file(run, replay, output)
    log = open_log(run)
    rows = log.manifest.totals.rows * (1 + replay)
    with progress_bar("verify", rows or None) as advance:
        frame = log.verify(replay=replay, progress=advance, executor=executor)
    output.write(frame)
    _raise_errors(log.path, frame)
    if log.manifest.closed is None:
        click.echo(f"bhlog: {spelled_out(_missing(log))}", err=True)
        return NOT_CLOSED
    return 0


def _verify_file(path: str, replay: bool, output: Output) -> int:
    """Of a null model or a profile."""
    from bhlog.analysis.verify.kept_file import verify_file
    from bhlog.analysis.verify.verification import findings_frame

    if replay:
        raise InvalidOption(f"{shown(path)}: is a file, and --replay replays a run: leave it out")
    frame = findings_frame(verify_file(path))
    output.write(frame)
    _raise_errors(shown(path), frame)
    return 0


def _raise_errors(path: str, frame: "pl.DataFrame") -> None:
    errors = int((frame["status"] == "error").sum())
    if errors:
        raise CorruptRun(f"{path}: {errors} {'error' if errors == 1 else 'errors'} found")


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
