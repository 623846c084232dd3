"""Cost curves: what each policy keeps at each cost, and how that differs from top-k."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bhlog.analysis.figures.registry import Numbers, figure, tidy
from bhlog.analysis.figures.style import CYCLE, GREY
from bhlog.analysis.replay.cost_curves import CostCurve, CostCurves

KEPT = "router probability kept"
GAIN = "kept beyond top-k (percentage points)"
PAIRED = "kept beyond {}, row by row\n(percentage points)"

Look = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Compared:
    """Policies compared over a run.

    Attributes:
        curves: of their families.
        about: the run, its model, the null model and the bounds.
        errors: standard errors of the probability kept by policies' texts, clustered by sequence.
        paired: probability kept less that of the first policy, and its standard error.
    """

    curves: CostCurves
    about: tuple[str, ...]
    errors: Mapping[str, float] = field(default_factory=dict)
    paired: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def costs(compared: Compared) -> Numbers:
    """Points of every curve, and the policies on them (policy null: a point of the curve)."""
    curves = compared.curves
    parts = []
    for curve in (curves.native, *curves.curves):
        points = _measured(curves.native, curve.mean_experts, curve.probability_kept)
        parts.append(points.with_columns(curve=pl.lit(curve.label), policy=pl.lit(None, pl.String)))
    for mark in curves.marks:
        point = _measured(
            curves.native, np.array([mark.mean_experts]), np.array([mark.probability_kept])
        )
        error = pl.lit(compared.errors.get(mark.text), pl.Float64)
        parts.append(
            point.with_columns(
                curve=pl.lit(mark.label),
                policy=pl.lit(mark.text),
                se=pl.when(pl.col("measure") == KEPT).then(error),
            )
        )
        if mark.text in compared.paired:
            value, se = (100 * number for number in compared.paired[mark.text])
            measure = PAIRED.format(curves.marks[0].text)
            difference = tidy(measure=measure, mean_experts=mark.mean_experts, value=value, se=se)
            parts.append(
                difference.with_columns(curve=pl.lit(mark.label), policy=pl.lit(mark.text))
            )
    panel = pl.col("measure").replace_strict({KEPT: 0, GAIN: 1}, default=2)
    frame = pl.concat(parts, how="diagonal").sort(panel, maintain_order=True)
    rows = f"{curves.rows:,} rows" if curves.whole else f"a sample of {curves.rows:,} rows"
    policies = ", ".join(mark.text for mark in curves.marks)
    bars = ("bars: 95 % intervals",) if any(compared.errors.values()) or compared.paired else ()
    about = (*compared.about, f"from {rows}", f"dots: {policies}", *bars)
    labels = tuple(curve.label for curve in (curves.native, *curves.curves))
    facts = {"most_experts": curves.most_experts, "curves": labels}
    return Numbers("Policies at equal cost", about, frame, facts)


def _measured(
    native: CostCurve, mean_experts: NDArray[np.float64], kept: NDArray[np.float64]
) -> pl.DataFrame:
    """Probability kept, and its percentage points beyond top-k at the same mean.

    Between two whole numbers of experts, top-k stands for a mixture of both; beyond its ends the
    gain is NaN.
    """
    gain = 100 * (kept - native.at(mean_experts))
    return pl.concat(
        [
            tidy(measure=KEPT, mean_experts=mean_experts, value=kept),
            tidy(measure=GAIN, mean_experts=mean_experts, value=gain),
        ]
    )


@figure(
    "policies",
    shows="probability kept against experts, a curve a policy",
    of="policies",
    data=costs,
    size=(11, 5.4),
    panel="measure",
    columns=3,
)
def plot_policies(
    axes: Axes, frame: pl.DataFrame, *, most_experts: float, curves: Sequence[str]
) -> Axes:
    """One measure against mean experts per token: a curve a family, a dot a policy.

    Args:
        frame: measure, curve (top-k first), policy (null: a point of the curve), mean_experts,
            value, se (of dots; null draws no interval of 95 %).
        most_experts: where the axis ends.
        curves: all there are, top-k first: each has its look in every panel.
    """
    points = frame.filter(pl.col("policy").is_null())
    marks = frame.filter(pl.col("policy").is_not_null())
    looks = _looks(curves)
    if frame["measure"][0] not in (KEPT, GAIN):
        return _differences(axes, frame, looks)
    for (label,), curve in points.group_by("curve", maintain_order=True):
        axes.plot(curve["mean_experts"], curve["value"], label=label, **looks[str(label)])
    for label, x, y, se in marks.select("curve", "mean_experts", "value", "se").iter_rows():
        color = looks[label]["color"]
        if se is not None:
            axes.errorbar([x], [y], yerr=[1.96 * se], color=color, capsize=3, zorder=3)
        axes.plot([x], [y], "o", color=color, ms=7, mec="white", mew=1, zorder=4)
    axes.set(xlabel="mean experts per token", ylabel=frame["measure"][0], xlim=(0, most_experts))
    if frame["measure"][0] == KEPT:
        axes.set_ylim(0, 1)
    else:
        shown = frame.filter(pl.col("mean_experts") <= most_experts)["value"].to_numpy()
        low, high = np.nanmin(shown, initial=0.0), np.nanmax(shown, initial=0.0)
        room = 0.08 * max(high - low, 0.1)
        axes.set_ylim(low - room, high + room)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return axes


def _differences(axes: Axes, frame: pl.DataFrame, looks: Mapping[str, Look]) -> Axes:
    """Policies below each other, in the order given, each with its interval."""
    axes.axvline(0, color=GREY, lw=1)
    marks = frame.select("curve", "value", "se").rows()
    for place, (label, value, se) in enumerate(marks):
        color = looks[label]["color"]
        axes.errorbar([value], [place], xerr=[1.96 * se], color=color, capsize=3)
        axes.plot([value], [place], "o", color=color, ms=7, mec="white", mew=1, zorder=4)
    axes.set_yticks(range(len(marks)), [text.split(",")[0] for text in frame["policy"]])
    axes.set(xlabel=frame["measure"][0], ylim=(len(marks) - 0.5, -0.5))
    return axes


def _looks(labels: Sequence[str]) -> dict[str, Look]:
    """Colour, line style and width by curve; wider below, so that no curve hides another."""
    native, *others = labels
    looks: dict[str, Look] = {native: {"color": GREY, "ls": "-", "lw": 1.5}}
    n = len(others)
    for i, label in enumerate(others):
        looks[label] = {
            "color": CYCLE[i % len(CYCLE)],
            "ls": ("-", (0, (4, 1.5)))[i % 2],
            "lw": 1.3 + 1.7 * (n - 1 - i) / max(1, n - 1),
        }
    return looks
