"""Figures of null models: functions that take data and Axes, and the page of panels they share."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from numpy.typing import NDArray
from scipy.special import betaincinv

from bhlog.analysis.null.calibration import LayerCheck, PValues
from bhlog.capture.contract.null.model import KdeModel, LayerNull

INK = "#1f4e79"
OTHER = "#c8553d"
PALE = "#9db8d2"
SMALLEST_SHOWN = 1e-8
HISTOGRAM_BINS = 32


def layer_page(
    layers: Sequence[int],
    draw: Callable[[int, Axes], Axes],
    *,
    x: str,
    y: str,
    title: str,
) -> Figure:
    """A page with a panel per layer, all on the same axes, legible from 1 to about 100 layers.

    Args:
        draw: draws one layer into its panel.
        x, y: what the axes show, written once for the page.
    """
    columns = _columns(len(layers))
    rows = -(-len(layers) // columns)
    width, height = max(1.75 * columns, 4.5), max(1.6 * rows + 1.0, 3.6)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, layer in zip(grid.flat, layers, strict=False):
        draw(layer, axes)
        axes.set_title(f"layer {layer}", fontsize=9, pad=3)
        axes.tick_params(labelsize=8)
        axes.grid(color="#e4e4e4", linewidth=0.5)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for column in range(columns):  # the lowest panel of a column carries the numbers
        lowest = (len(layers) - 1 - column) // columns
        if lowest >= 0:
            grid[lowest, column].tick_params(labelbottom=True)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    if len(labels) > 1:
        longest = max(len(label) for label in labels)
        # With the title, above the panels: below them it would lie on the label of the x axis.
        legend = figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=max(1, int(width / (0.5 + 0.07 * longest))),
            fontsize=9,
            frameon=False,
        )
        legend.set_title(title, prop=FontProperties(size=11))
    else:
        figure.suptitle(title, fontsize=11)
    return figure


def tail_page(models: Mapping[str, KdeModel]) -> Figure:
    """The tails of one null model, or of two by their names, on the layers that all have."""
    layers = sorted(set.intersection(*(set(model) for model in models.values())))

    def draw(layer: int, axes: Axes) -> Axes:
        for color, (name, model) in zip((INK, OTHER), models.items(), strict=False):
            plot_tail(model[layer], axes, color=color, label=_last_of(name))
        return axes

    title = "tails of the null model" if len(models) == 1 else "tails of two null models"
    return layer_page(layers, draw, x="logit x", y="S(x) = P(logit > x)", title=title)


def check_page(checks: Sequence[LayerCheck], draw: str) -> Figure:
    """One of CHECKS, a panel a layer."""
    plot, x, y, title = CHECKS[draw]
    found = {check.layer: check for check in checks}
    return layer_page(list(found), lambda i, axes: plot(found[i], axes), x=x, y=y, title=title)


def _last_of(name: str, most: int = 32) -> str:
    """A name that fits in a legend: the end of a path tells more than its start."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _columns(n: int) -> int:
    """Columns of a page of n panels: about as many as rows or a few more, with few left empty."""
    square = int(np.ceil(np.sqrt(n)))
    return min(range(square, int(1.4 * square) + 1), key=lambda columns: (-n % columns, columns))


def plot_tail(null: LayerNull, axes: Axes, *, color: str = INK, label: str = "S(x)") -> Axes:
    """Tails of a layer on a logarithmic axis: the pooled one, or one line per expert."""
    many = len(null.curves) > 1
    for i, curve in enumerate(null.curves):
        shown = curve.tail >= SMALLEST_SHOWN / 10
        x, tail = _thinned(curve.grid[shown], curve.tail[shown])
        width, strength = (0.5, 0.35) if many else (1.3, 1.0)
        axes.plot(x, tail, color=color, linewidth=width, alpha=strength, label=None if i else label)
    axes.set_yscale("log")
    axes.set_ylim(SMALLEST_SHOWN, 1.5)
    return axes


def plot_qq(found: LayerCheck, axes: Axes) -> Axes:
    """Observed against expected p-values, both as -log10, with each expert behind all of them."""
    for i, values in enumerate(found.by_expert):
        _qq_line(values, axes, color=PALE, width=0.5, label=None if i else "one expert")
    _qq_line(found.trimmed, axes, color=INK, width=1.5, label="all experts")
    most = -np.log10(max(SMALLEST_SHOWN, 0.5 / max(found.trimmed.n, 1)))
    axes.axline((0, 0), slope=1, color=OTHER, linewidth=0.9, linestyle="--", label="uniform")
    axes.set_xlim(0, most)
    axes.set_ylim(0, most)
    return axes


def plot_histogram(found: LayerCheck, axes: Axes) -> Axes:
    """Density of the p-values in even bins, against uniform; a lump is spread to its neighbours."""
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    density = np.diff(found.trimmed.cdf(edges)) * HISTOGRAM_BINS
    axes.stairs(density, edges, fill=True, color=PALE, label="p-values")
    axes.axhline(1, color=OTHER, linewidth=0.9, linestyle="--", label="uniform")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    _from_zero(axes, density)
    return axes


def plot_experts(found: LayerCheck, axes: Axes) -> Axes:
    """Share of p-values at most 0.05 of each expert, by how often the expert is in the top k."""
    share = [values.share_below(0.05) for values in found.by_expert]
    axes.plot(found.popularity, share, ".", color=INK, markersize=3, label="an expert")
    axes.axhline(0.05, color=OTHER, linewidth=0.9, linestyle="--", label="uniform")
    _from_zero(axes, np.array(share))
    return axes


def plot_ranks(found: LayerCheck, axes: Axes) -> Axes:
    """Quantiles of a row's k-th smallest p-value against those of the k-th of E uniform ones."""
    colors = colormaps["viridis"](np.linspace(0.1, 0.8, max(len(found.by_rank), 1)))
    farthest = 0.0
    for color, (k, values) in zip(colors, found.by_rank.items(), strict=False):
        expected = betaincinv(k, found.n_experts - k + 1, values.mid_cdf)
        x, y = _thinned(-np.log10(expected), -np.log10(values.p))
        axes.plot(x, y, color=color, linewidth=1.2, label=f"k = {k}")
        farthest = max(farthest, float(x.max(initial=0.0)))
    axes.axline((0, 0), slope=1, color=OTHER, linewidth=0.9, linestyle="--", label="uniform")
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.05 * farthest))  # panels share it
    axes.set_ylim(0, -np.log10(SMALLEST_SHOWN))
    return axes


# Pages of a check: what draws a panel, its axes, the title.
CHECKS: dict[str, tuple[Callable[[LayerCheck, Axes], Axes], str, str, str]] = {
    "qq": (plot_qq, "expected -log10 p", "observed -log10 p", "p-values against uniform"),
    "histogram": (plot_histogram, "p-value", "density", "p-values against uniform"),
    "experts": (
        plot_experts,
        "share of rows with the expert in the top k",
        "share of p at most 0.05",
        "bias of the null by popularity of experts",
    ),
    "ranks": (
        plot_ranks,
        "expected -log10 of the k-th smallest of uniform p-values",
        "observed -log10 p",
        "k-th smallest p-value of a row",
    ),
}


def _from_zero(axes: Axes, values: NDArray[np.float64]) -> None:
    """Let the y axis start at 0 and hold these values beside those of panels that share it."""
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.1 * float(np.nanmax(values, initial=0.0))))


def _qq_line(values: PValues, axes: Axes, *, color: str, width: float, label: str | None) -> None:
    cdf = values.mid_cdf
    shown = (values.p > 0) & (values.weight > 0)
    x, y = _thinned(-np.log10(cdf[shown]), -np.log10(values.p[shown]))
    axes.plot(x, y, color=color, linewidth=width, label=label)


def _thinned(
    x: NDArray[np.float64], y: NDArray[np.float64], most: int = 600
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most so many points of a line, its ends kept."""
    if len(x) <= most:
        return x, y
    chosen = np.unique(np.linspace(0, len(x) - 1, most).astype(np.int64))
    return x[chosen], y[chosen]
