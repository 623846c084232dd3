"""What a run is in a few lines, and what to mind before its numbers are believed."""

from dataclasses import dataclass

import numpy as np
import polars as pl

from bhlog.analysis.cells import cell
from bhlog.analysis.log import Log
from bhlog.analysis.report.markup import Panel, command_html, text
from bhlog.analysis.report.subject import Subject, quoted
from bhlog.analysis.verify.facts import facts_of

WORST_KS = 0.05  # of p-values from uniform; above, the null is called uncalibrated
MOST_AT_BOUNDS = 0.5  # share of a layer's rows


@dataclass(frozen=True)
class Warned:
    """Something to mind.

    Attributes:
        what: in a few words.
        why: what it does to the numbers.
        command: that looks closer.
    """

    what: str
    why: str
    command: str


def overview(subject: Subject) -> Panel:
    """The first panel."""
    runs = "".join(_run_facts(run) for run in subject.runs)
    found = [one for run in subject.runs for one in of_run(run)] + of_null(subject)
    items = "".join(
        f"<li><strong>{text(one.what)}</strong>{text(one.why)}{command_html(one.command)}</li>"
        for one in found
    )
    if not found:
        items = '<li class="fine"><strong>Nothing stands out.</strong>Counts are whole.</li>'
    body = f'<div class="runs">{runs}</div><h3>What to mind</h3><ul class="mind">{items}</ul>'
    return Panel(
        "overview",
        "What this is",
        "",
        body=body,
        commands=tuple(f"bhlog info {quoted(run.path)}" for run in subject.runs),
    )


def _run_facts(run: Log) -> str:
    facts = facts_of(run)
    model, options = run.manifest.model, run.manifest.routing.options
    layers = "1 layer" if len(model.layers) == 1 else f"{len(model.layers)} layers"
    routed = f"natively, top-{model.top_k}"
    if options is not None:
        low, high = options.bounds(run.n_experts)
        rule = f"BH at alpha {options.alpha:g}" if options.policy is None else options.policy
        routed = f"by {rule}, {low} to {high} experts"
    sources = list(facts["sources"])
    named = ", ".join(sources[:4]) + (f" and {len(sources) - 4} more" if sources[4:] else "")
    lines = {
        "Run": f"{run.path}, {run.manifest.created[:16].replace('T', ' ')} UTC",
        "Model": f"{model.name}: {layers} of {model.n_experts} experts, {model.dtype}",
        "Routed": routed,
        "Null model": facts["null_model"] or "none of its own",
        "Holds": f"{cell(facts['tokens'])} tokens, {cell(facts['rows'])} rows, "
        f"{cell(facts['bytes'] / 1e6)} MB",
        "Text": named or "no sources named",
    }
    pairs = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in lines.items())
    return f'<dl class="facts">{pairs}</dl>'


def of_run(run: Log) -> list[Warned]:
    """What to mind of a run's rows."""
    found, path, totals = [], quoted(run.path), run.manifest.totals
    verify = f"bhlog verify {path}"
    if run.manifest.closed is None or run.missing or run.manifest.error:
        why = run.manifest.error or "It is still being written, was killed, or lacks files."
        found.append(Warned(f"{run.name} is not whole", why, verify))
    if run.manifest.sample_every > 1 or totals.sampled_out:
        what = f"{run.name} holds a sample: every {run.manifest.sample_every}th position"
        why = f"{totals.sampled_out:,} tokens were left out on purpose; shares are estimates."
        found.append(Warned(what, why, f"bhlog info {path}"))
    if totals.dropped:
        what = f"{totals.dropped:,} tokens of {run.name} were dropped"
        why = "The queue was full in drop mode; which tokens are missing is not random."
        found.append(Warned(what, why, verify))
    if totals.nonfinite:
        what = f"{totals.nonfinite:,} rows of {run.name} have a NaN or infinite logit"
        why = "Such logits are never chosen before finite ones; sweeps leave out rows without any."
        found.append(Warned(what, why, verify))
    sequences = _sequences(run)
    if sequences == 1:
        why = (
            "Its tokens depend on each other: differences between settings may be those of a text."
        )
        found.append(Warned(f"{run.name} holds one sequence only", why, f"bhlog info {path}"))
    return found


def of_null(subject: Subject) -> list[Warned]:
    """What to mind of the null model and of the decisions under it."""
    run, found = subject.run, []
    path, top_k = quoted(run.path), run.manifest.model.top_k
    fit = f"bhlog kde fit {path} --trim-high {top_k} --out null.parquet"
    if subject.null is None:
        why = "P-values need one: without it there is no explorer."
        return [Warned(f"{run.name} has no null model", why, fit)]
    name, kde = subject.null
    named = quoted(name or f"{run.path}/kde.parquet")
    untrimmed = [layer for layer, curve in kde.curves if curve.trim.high == 0]
    if untrimmed:
        what = "The null model was fitted from all logits, the chosen experts' too"
        why = "The signal sits in its own null: fewer experts pass. Trim what the model chose."
        found.append(Warned(what, why, fit))
    checks = subject.checks
    if checks is not None:
        off = checks.filter(pl.col("ks") > WORST_KS)
        if off.height:
            worst = checks.row(int(checks["ks"].arg_max() or 0), named=True)
            what = f"P-values are not uniform in {off.height} of {checks.height} layers"
            why = (
                f"In layer {worst['layer']} they are up to {worst['ks']:.3f} away "
                f"(Kolmogorov-Smirnov): alpha there is not the error rate that it names."
            )
            command = f"bhlog kde check {named} {path}"
            found.append(Warned(what, why, command))
    return found + _bounds_hit(subject) + _unreached(subject)


def _bounds_hit(subject: Subject) -> list[Warned]:
    found = []
    for run in subject.runs:
        options = run.manifest.routing.options
        if options is None:
            continue
        counts = subject.loads[run.path].n_selected
        rows = np.maximum(1, counts.sum(axis=1))
        for name, bound in zip(("min_k", "max_k"), options.bounds(run.n_experts), strict=True):
            at = counts[:, bound] / rows > MOST_AT_BOUNDS
            if at.any():
                layers = ", ".join(str(run.layers[i]) for i in np.flatnonzero(at)[:8])
                what = f"{run.name}: {int(at.sum())} layers have most rows at {name} {bound}"
                why = f"There the bound decides, not the test (layers {layers})."
                command = f"bhlog sql {quoted(run.path)} --query floor_and_ceiling"
                found.append(Warned(what, why, command))
    return found


def _unreached(subject: Subject) -> list[Warned]:
    found = []
    for named in subject.profiles:
        profile = named.profile
        if profile.bounds is None:
            continue
        most = profile.mean_experts(float(profile.alphas[-1]))
        if most < named.top_k:
            what = f"{named.name}: no alpha gives native's {named.top_k} experts a token"
            why = f"At alpha {profile.alphas[-1]:g} they are {most:.4g} within the run's bounds."
            found.append(Warned(what, why, f"{named.command} --alpha {profile.alphas[-1]:g}"))
    return found


def _sequences(run: Log) -> int:
    """Sequences with tokens; looks no further than the second."""
    seen: set[tuple[str, int]] = set()
    for name in run.token_shards:
        table = run.read_tokens(name, ["rank", "sequence"])
        for sequence in table["sequence"].unique().to_pylist():
            seen.add((name.partition("-")[0], sequence))
        if len(seen) > 1:
            break
    return len(seen)
