"""Benchmark scores against what they cost."""

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from bhlog.analysis.figures.benchmarks import Scored
from bhlog.analysis.figures.registry import Numbers, figure
from bhlog.analysis.figures.style import CYCLE


def scored(of: Scored) -> Numbers:
    """Score, its standard error and mean experts of each policy, task and metric."""
    frame = of.table.select("task", "metric", "policy", "mean_experts", "score", "score_se")
    about = (*of.about, "bars: one standard error each way, the harness's")
    return Numbers("Scores at their cost", about, frame, {})


@figure(
    "scores",
    shows="What does a benchmark score at each policy's mean experts?",
    data=scored,
    of="scores",
)
def scores(axes: Axes, frame: pl.DataFrame) -> Axes:
    """A point a policy, a line a task and metric, by mean experts."""
    groups = frame.group_by("task", "metric", maintain_order=True)
    for i, ((task, metric), part) in enumerate(groups):
        part = part.sort("mean_experts")
        error = part["score_se"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        axes.errorbar(
            part["mean_experts"].to_numpy(),
            part["score"].to_numpy(),
            yerr=np.nan_to_num(error),
            marker="o",
            color=CYCLE[i % len(CYCLE)],
            capsize=2,
            label=f"{task} {metric}",
        )
    for policy, experts, score in frame.select("policy", "mean_experts", "score").rows():
        axes.annotate(policy, (experts, score), xytext=(3, 3), textcoords="offset points", size=7)
    axes.set_xlabel("mean experts a token")
    axes.set_ylabel("score")
    axes.legend(fontsize=8)
    return axes
