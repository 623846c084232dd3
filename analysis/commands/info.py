"""`bhlog info` and `bhlog verify`."""

from typing import TYPE_CHECKING, Any

import click

from analysis.table import format_option, print_frame, progress_bar

if TYPE_CHECKING:
    from analysis.log import Log


@click.command(epilog="\b\nexample:\n  bhlog info runs/demo/bh-0.3")
@click.argument("run")
@format_option
def info(run: str, output_format: str) -> None:
    """What a run is and what it holds."""
    import polars as pl

    from analysis.log import open_log

    facts = _facts(open_log(run))
    if output_format == "table":
        rows = [{"fact": name, "value": str(value)} for name, value in facts.items()]
        print_frame(pl.DataFrame(rows))
    else:
        print_frame(pl.DataFrame([facts], infer_schema_length=None), output_format)


@click.command(
    epilog="\b\nexample:\n  bhlog verify runs/demo/bh-0.3 --replay",
)
@click.argument("run")
@click.option("--replay", is_flag=True, help="Also replay the run at its own settings.")
@format_option
@click.pass_context
def verify(context: click.Context, run: str, replay: bool, output_format: str) -> None:
    """Is a run whole, and does replay reproduce it?

    Reads every page of every shard. Exits 1 if anything is wrong.
    """
    import polars as pl

    from analysis.log import open_log
    from analysis.replay import verify_replay
    from analysis.verification import Finding
    from analysis.verification import verify as verify_log

    log = open_log(run)
    rows = log.manifest.totals.rows or None
    with progress_bar("verify", rows) as advance:
        findings = verify_log(log, progress=advance)
    errors = sum(finding.status == "error" for finding in findings)
    if replay and not errors:
        with progress_bar("replay", rows) as advance:
            for row in verify_replay(log, progress=advance).iter_rows(named=True):
                wrong = row["mismatches"]
                detail = f"{row['rows']:,} rows replayed, {wrong:,} disagree"
                findings.append(
                    Finding(
                        "error" if wrong else "ok",
                        f"layer {row['layer']}",
                        detail + (f", first at {row['first']}" if wrong else ""),
                    )
                )
        errors = sum(finding.status == "error" for finding in findings)
    schema = {"status": pl.String, "where": pl.String, "detail": pl.String}
    print_frame(pl.DataFrame([vars(finding) for finding in findings], schema), output_format)
    if errors:
        click.echo(f"bhlog: {run}: {errors} {'error' if errors == 1 else 'errors'}", err=True)
        context.exit(1)


def _facts(log: "Log") -> dict[str, Any]:
    manifest = log.manifest
    model, options, totals = manifest.model, manifest.routing.options, manifest.totals
    sizes = log.tree()
    size = sum(n for path, n in sizes.items() if path.startswith(("routing/", "tokens/")))
    rows = sum(group.rows for group in log.row_groups())
    sources = log.tokens(["source"])["source"].unique().to_pylist()
    facts: dict[str, Any] = {
        "run": log.path,
        "run_id": manifest.run_id,
        "created": manifest.created,
        "closed": manifest.closed or "no: still running, or killed",
        "model": model.name,
        "class": model.class_name,
        "layers": ", ".join(map(str, model.layers)),
        "experts": model.n_experts,
        "top_k": model.top_k,
        "norm_topk_prob": model.norm_topk_prob,
        "scoring": model.scoring,
        "routing": manifest.routing.kind,
    }
    if options is not None:
        low, high = options.bounds(model.n_experts)
        facts |= {
            "alpha": options.alpha,
            "min_k": low,
            "max_k": high,
            "temperature": options.temperature,
            "renormalize": options.renormalize,
            "p_values": options.p_values,
        }
    facts |= {
        "rows": rows,
        "tokens": rows // max(1, len(model.layers)),
        "shards": len(log.shards),
        "bytes": size,
        "bytes_per_row": round(size / max(1, rows), 1),
        "sample_every": manifest.sample_every,
        "sampled_out": totals.sampled_out,
        "dropped": totals.dropped,
        "nonfinite_rows": totals.nonfinite,
        "token_ids": manifest.token_ids,
        "sources": ", ".join(sorted(s for s in sources if s is not None)) or None,
        "null_model": None if log.kde is None else f"{len(log.kde)} layers",
        "versions": ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
    }
    if manifest.error:
        facts["error"] = manifest.error
    return facts
