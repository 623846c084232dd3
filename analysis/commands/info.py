"""`bhlog info` and `bhlog verify`."""

import json

import click

from bhlog.analysis.output import cell, format_option, print_frame, progress_bar
from bhlog.capture.contract.errors import CorruptRun

_MOST_SOURCES = 8  # shown in a table; programs get all of them


@click.command(epilog="\b\nexample:\n  bhlog info runs/demo/bh-0.3")
@click.argument("run")
@format_option
def info(run: str, output_format: str) -> None:
    """What a run is and what it holds.

    Counts are those of the sealed shards, so they hold for a run that is still open or was killed.
    """
    import polars as pl

    from bhlog.analysis.log import open_log
    from bhlog.analysis.verify.facts import facts_of

    facts = facts_of(open_log(run))
    if output_format == "json":
        print(json.dumps([facts]))
        return
    if output_format == "csv":
        plain = {n: _words(v) if isinstance(v, list | dict) else v for n, v in facts.items()}
        print_frame(pl.DataFrame([plain]), "csv")
        return
    if facts["closed"] is None:
        facts["closed"] = "no: still running, or killed"
    text = {name: _words(value) for name, value in facts.items() if value is not None}
    print_frame(pl.DataFrame({"fact": list(text), "value": list(text.values())}))


@click.command(
    epilog="\b\nexamples:\n  bhlog verify runs/demo/bh-0.3 --replay\n"
    "  bhlog verify s3://bucket/run --format json",
)
@click.argument("run")
@click.option("--replay", is_flag=True, help="Also replay the run at its own settings.")
@format_option
def verify(run: str, replay: bool, output_format: str) -> None:
    """Is a run whole, and does replay reproduce it?

    Reads every page of every shard and prints what was found: ok, warning (worth knowing, nothing
    is wrong) or error. Exits 1 if there is an error.
    """
    import polars as pl

    from bhlog.analysis.log import open_log
    from bhlog.analysis.verify.verification import Finding, verify_decisions
    from bhlog.analysis.verify.verification import verify as verify_log

    log = open_log(run)
    rows = log.manifest.totals.rows or None
    with progress_bar("verify", rows) as advance:
        findings = verify_log(log, progress=advance)
    errors = sum(finding.status == "error" for finding in findings)
    if replay and errors:
        detail = "not replayed: the run has errors"
        findings.append(Finding("replay", "warning", log.path, detail))
    elif replay:
        with progress_bar("replay", rows) as advance:
            findings += verify_decisions(log, progress=advance)
        errors = sum(finding.status == "error" for finding in findings)
    print_frame(pl.DataFrame([vars(finding) for finding in findings]), output_format)
    if errors:
        raise CorruptRun(f"{run}: {errors} {'error' if errors == 1 else 'errors'} found")


def _words(value: object) -> str:
    if isinstance(value, dict):
        parts = [f"{name} {cell(count)}" for name, count in value.items()]
        more = len(parts) - _MOST_SOURCES
        return ", ".join(parts[:_MOST_SOURCES]) + (f" and {more} more" if more > 0 else "") or "-"
    return cell(value)
