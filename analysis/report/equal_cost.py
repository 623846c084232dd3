"""Policies at equal cost: what each keeps of the router's choice for the same number of experts."""

from typing import Any

import polars as pl
from bokeh.models import Range1d

from bhlog.analysis.figures.style import CYCLE, GREY, REFERENCE
from bhlog.analysis.fold import Scope
from bhlog.analysis.replay.comparison import compare
from bhlog.analysis.replay.cost_curves import CostCurves, cost_curves
from bhlog.analysis.replay.match import match_experts
from bhlog.analysis.replay.registry import parse_policy
from bhlog.analysis.report.look import frame, hover, legend_below
from bhlog.analysis.report.markup import Drawn, Listed, Panel
from bhlog.analysis.report.subject import Subject, quoted

TESTS = ("bh", "by")  # policies that need p-values
OTHERS = ("minp", "topp", "topk")
MOST_ROWS = 400_000  # read for the panel; a sample of larger runs
_COLUMNS = (
    "policy",
    "mean_experts",
    "noise_experts",
    "probability_kept",
    "probability_kept_se",
    "flops",
    "dead_experts",
    "busiest_share",
)


def equal_cost(subject: Subject) -> Panel | None:
    """Curves of policies over their values, and all of them at native's number of experts."""
    run = subject.run
    if not run.has_logits:
        return None
    kde = None if subject.null is None else subject.null[1]
    names = (*(TESTS if kde is not None else ()), *OTHERS)
    scope = Scope(sample=min(1.0, MOST_ROWS / max(1, run.manifest.totals.rows)))
    top_k = run.manifest.model.top_k
    asked = " ".join(f"--policy {name}" for name in names)
    texts = [f"topk:{top_k}" if name == "topk" else name for name in names]
    open_policies = [parse_policy(one, open_value=True) for one in texts]
    matched = match_experts(run, open_policies, top_k, kde=kde, scope=scope)
    alpha = next((named.alpha for named in subject.profiles if named.alpha is not None), 0.05)
    chosen = [parse_policy(f"bh:{alpha:g}")] if kde is not None else []
    curves = cost_curves(run, [*matched, *chosen], kde=kde, scope=scope)
    table = compare(run, [*matched, *chosen], kde=kde, scope=scope)
    table = table.filter(pl.col("layer").is_null())
    table = table.select([name for name in _COLUMNS if name in table.columns])
    flags = subject.kde_words() + ("" if scope.sample == 1 else f" --sample {scope.sample:.4g}")
    sampled = "" if curves.whole else f" Curves come from a sample of {curves.rows:,} rows."
    return Panel(
        "policies",
        "Policies at equal cost",
        "For the same number of experts, how much of the router's probability does each rule "
        f"keep? Dots: each rule at native's {top_k} experts, and BH at the chosen alpha.{sampled} "
        "noise_experts: the same rule on logits shuffled over tokens; _se: clustered by sequence.",
        drawn=(Drawn("Probability kept at every cost", _plot(curves)),),
        listed=(
            Listed(f"Policies brought to {top_k} experts a token", table, shown=True),
            Listed("Points of the curves", _points(curves)),
        ),
        commands=(f"bhlog compare {quoted(run.path)} {asked} --experts {top_k}{flags}",),
    )


def _plot(curves: CostCurves) -> Any:
    plot = frame(
        name="costs",
        x="mean experts a token",
        y="router probability kept",
        height=360,
        x_range=Range1d(0, curves.most_experts),
        y_range=Range1d(0, 1),
    )
    looks = {curves.native.label: (GREY, "dashdot")}
    looks |= {one.label: (CYCLE[i % 6], "solid") for i, one in enumerate(curves.curves)}
    for curve in (curves.native, *curves.curves):
        color, dash = looks[curve.label]
        line = plot.line(curve.mean_experts, curve.probability_kept, color=color, line_dash=dash,
                         line_width=2.5, legend_label=curve.label)  # fmt: skip
        hover(plot, ("policy", curve.label), ("experts", "@x{0.00}"), ("kept", "@y{0.0000}"),
              renderers=[line])  # fmt: skip
    for mark in curves.marks:
        color = looks[mark.label][0] if mark.label in looks else REFERENCE
        dot = plot.scatter([mark.mean_experts], [mark.probability_kept], size=12, color=color,
                           line_color="white", line_width=2)  # fmt: skip
        hover(plot, ("policy", mark.text), ("experts", "@x{0.00}"), ("kept", "@y{0.0000}"),
              renderers=[dot])  # fmt: skip
    legend_below(plot)
    return plot


def _points(curves: CostCurves) -> pl.DataFrame:
    parts = [
        pl.DataFrame({"mean_experts": c.mean_experts, "probability_kept": c.probability_kept})
        .with_columns(pl.lit(c.label).alias("policy"))
        .select("policy", "mean_experts", "probability_kept")
        for c in (curves.native, *curves.curves)
    ]
    return pl.concat(parts)
