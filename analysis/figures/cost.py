"""Figure of cost curves: what each policy keeps at each cost, and how that differs from top-k."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bhlog.analysis.figures.figures import GREY
from bhlog.analysis.replay.cost_curves import CostCurve, CostCurves

# Okabe and Ito (2008), the colours that stand apart on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LEGEND_COLUMNS = 8

Look = Mapping[str, Any]


def plot_kept(axes: Axes, curves: CostCurves) -> Axes:
    """Probability kept against mean experts per token: a curve a family, a dot a policy."""
    looks = _looks(curves)
    for curve in (curves.native, *curves.curves):
        axes.plot(
            curve.mean_experts, curve.probability_kept, label=curve.label, **looks[curve.label]
        )
    for mark in curves.marks:
        _dot(axes, mark.mean_experts, mark.probability_kept, looks[mark.label])
    axes.set(xlabel="mean experts per token", ylabel="router probability kept")
    axes.set_ylim(0, 1)
    return axes


def plot_gain(axes: Axes, curves: CostCurves) -> Axes:
    """Probability kept beyond top-k at the same mean, in percentage points.

    Between two whole numbers of experts, top-k stands for a mixture of both.
    """
    looks = _looks(curves)
    axes.axhline(0, **looks[curves.native.label])
    shown = [0.0]
    for curve in curves.curves:
        gain = _gain(curves.native, curve.mean_experts, curve.probability_kept)
        axes.plot(curve.mean_experts, gain, **looks[curve.label])
        shown += gain[curve.mean_experts <= curves.most_experts].tolist()
    for mark in curves.marks:
        gain = _gain(curves.native, mark.mean_experts, mark.probability_kept)
        _dot(axes, mark.mean_experts, float(gain), looks[mark.label])
        shown.append(float(gain))
    axes.set(xlabel="mean experts per token", ylabel="kept beyond top-k (percentage points)")
    low, high = np.nanmin(shown), np.nanmax(shown)
    room = 0.08 * max(high - low, 0.1)
    axes.set_ylim(low - room, high + room)
    return axes


def draw_comparison(curves: CostCurves, *, title: str) -> Figure:
    """Both panels on one page."""
    figure = Figure(figsize=(10.5, 4.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    plot_kept(left, curves)
    plot_gain(right, curves)
    for axes in (left, right):
        axes.set_xlim(0, curves.most_experts)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    columns = min(len(labels), LEGEND_COLUMNS)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    source = f"{curves.rows:,} rows" if curves.whole else f"a sample of {curves.rows:,} rows"
    figure.suptitle(f"{title}\nfrom {source}; dots are the policies compared", fontsize=11)
    return figure


def _looks(curves: CostCurves) -> dict[str, Look]:
    """Colour, line style and width by label; wider below, so that no curve hides another."""
    looks: dict[str, Look] = {curves.native.label: {"color": GREY, "ls": "-", "lw": 1.5}}
    n = len(curves.curves)
    for i, curve in enumerate(curves.curves):
        looks[curve.label] = {
            "color": COLORS[i % len(COLORS)],
            "ls": ("-", (0, (4, 1.5)))[i % 2],
            "lw": 1.3 + 1.7 * (n - 1 - i) / max(1, n - 1),
        }
    return looks


def _gain(
    native: CostCurve,
    mean_experts: np.ndarray | float,
    probability_kept: np.ndarray | float,
) -> np.ndarray:
    """Percentage points beyond top-k at the same mean; NaN where top-k has none."""
    return np.asarray(100 * (probability_kept - native.at(mean_experts)))


def _dot(axes: Axes, x: float, y: float, look: Look) -> None:
    axes.plot([x], [y], "o", color=look["color"], ms=7, mec="white", mew=1, zorder=4)
