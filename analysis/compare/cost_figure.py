"""Figure of cost curves: what each policy keeps at each cost, and how that differs from top-k."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.compare.cost_curves import CostCurve, CostCurves
from analysis.figures.figures import GREY

# Okabe and Ito (2008), the colours that stand apart on white, then line styles for more families
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", (0, (5, 1.5)), (0, (1, 1)))


@dataclass(frozen=True)
class Mark:
    """A policy as it was compared: a dot on the figure.

    Attributes:
        text: the policy.
        label: of the curve it lies on; see analysis.compare.cost_curves.curve_label.
        mean_experts, probability_kept: over all rows.
    """

    text: str
    label: str
    mean_experts: float
    probability_kept: float


def plot_kept(axes: Axes, curves: CostCurves, marks: Sequence[Mark]) -> Axes:
    """Probability kept against mean experts per token: a curve a family, a dot a policy."""
    native = curves.native
    axes.plot(native.mean_experts, native.probability_kept, color=GREY, label="topk")
    styles = _styles(curves)
    for curve in curves.curves:
        color, style = styles[curve.label]
        axes.plot(
            curve.mean_experts, curve.probability_kept, color=color, ls=style, label=curve.label
        )
    for mark in marks:
        color = styles.get(mark.label, (GREY, "-"))[0]
        _dot(axes, mark.mean_experts, mark.probability_kept, color)
    axes.set(xlabel="mean experts per token", ylabel="router probability kept")
    axes.set_ylim(0, 1)
    return axes


def plot_gain(axes: Axes, curves: CostCurves, marks: Sequence[Mark]) -> Axes:
    """Probability kept beyond top-k at the same mean, in percentage points.

    Between two whole numbers of experts, top-k stands for a mixture of both.
    """
    native = curves.native
    axes.axhline(0, color=GREY)
    styles = _styles(curves)
    for curve in curves.curves:
        color, style = styles[curve.label]
        gain = _gain(native, curve)
        axes.plot(curve.mean_experts, gain, color=color, ls=style)
    for mark in marks:
        color = styles.get(mark.label, (GREY, "-"))[0]
        base = native.at(np.array([mark.mean_experts]))[0]
        _dot(axes, mark.mean_experts, 100 * (mark.probability_kept - base), color)
    axes.set(xlabel="mean experts per token", ylabel="kept beyond top-k (percentage points)")
    return axes


def draw_comparison(curves: CostCurves, marks: Sequence[Mark], *, title: str) -> Figure:
    """Both panels on one page, out to a little beyond the dearest policy."""
    figure = Figure(figsize=(10.5, 4.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    plot_kept(left, curves, marks)
    plot_gain(right, curves, marks)
    n_experts = float(curves.native.mean_experts[-1])
    most = shown_experts([mark.mean_experts for mark in marks], n_experts)
    for axes in (left, right):
        axes.set_xlim(0, most)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    _fit_gain(right, curves, marks, most)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    source = f"{curves.rows:,} rows" if curves.whole else f"a sample of {curves.rows:,} rows"
    figure.suptitle(f"{title}\ncurves from {source}; dots are the policies compared", fontsize=11)
    return figure


def shown_experts(means: Sequence[float], n_experts: float) -> float:
    """Where the x axis ends: beyond the dearest policy, but not beyond all experts."""
    return min(n_experts, max(4.0, 1.75 * max(means)))


def _styles(curves: CostCurves) -> Mapping[str, tuple[str, object]]:
    return {
        curve.label: (COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)])
        for i, curve in enumerate(curves.curves)
    }


def _gain(native: CostCurve, curve: CostCurve) -> np.ndarray:
    return 100 * (curve.probability_kept - native.at(curve.mean_experts))


def _dot(axes: Axes, x: float, y: float, color: str) -> None:
    axes.plot([x], [y], "o", color=color, ms=7, mec="white", mew=1, zorder=4)


def _fit_gain(axes: Axes, curves: CostCurves, marks: Sequence[Mark], most: float) -> None:
    """Let the y axis hold what the x axis shows, and no more."""
    values = [0.0]
    for curve in curves.curves:
        values += _gain(curves.native, curve)[curve.mean_experts <= most].tolist()
    for mark in marks:
        base = curves.native.at(np.array([mark.mean_experts]))[0]
        values.append(100 * (mark.probability_kept - base))
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    room = 0.08 * max(high - low, 0.1)
    axes.set_ylim(low - room, high + room)
