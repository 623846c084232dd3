"""Calibration of a null model on a run, a panel a layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.special import betaincinv

from bhlog.analysis.figures.axes import thinned
from bhlog.analysis.figures.registry import Numbers, figure, tidy
from bhlog.analysis.figures.style import MAIN, NATIVE, NATIVE_LINE, ORDERED, PALE, REFERENCE
from bhlog.analysis.null.calibration import P_BINS, LayerCheck, PValues

SMALLEST = 8  # -log10 of the smallest p-value shown
BINS = 32
LEVEL = 0.05  # whose share of p-values is shown for each expert
MOST_OF_AN_EXPERT = 40  # points of one curve of many


@dataclass(frozen=True, eq=False)
class Checked:
    """A null model checked on a run.

    Attributes:
        layers: what was found.
        about: the run, its model and the null model.
        top_k: experts per token under the model's own routing.
    """

    layers: Sequence[LayerCheck]
    about: tuple[str, ...]
    top_k: int


def _by_layer(checked: Checked, points: Callable[[LayerCheck], pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(
        [points(found).with_columns(layer=pl.lit(found.layer)) for found in checked.layers]
    )


def quantiles(checked: Checked) -> Numbers:
    """Expected and observed -log10 p, of all logits (expert null) and of each expert."""

    def points(found: LayerCheck) -> pl.DataFrame:
        parts = [
            # below the first bin in which p-values of an expert are counted, nothing is known
            _quantiles(values, MOST_OF_AN_EXPERT, 1 / P_BINS).with_columns(expert=pl.lit(i))
            for i, values in enumerate(found.by_expert)
        ]
        every = _quantiles(found.trimmed, 600, 0).with_columns(expert=pl.lit(None, pl.Int32))
        return pl.concat([*parts, every])

    most = max(max(found.trimmed.n for found in checked.layers), 1)
    facts = {"most": min(SMALLEST, float(-np.log10(0.5 / most)))}
    title = "P-values against uniform"
    return Numbers(title, checked.about, _by_layer(checked, points), facts)


def _quantiles(values: PValues, most: int, above: float) -> pl.DataFrame:
    cdf = values.mid_cdf
    shown = (values.p > above) & (values.weight > 0)
    x, y = thinned(-np.log10(cdf[shown]), -np.log10(values.p[shown]), most=most)
    return tidy(expected=x, observed=y)


@figure(
    "qq",
    shows="observed against expected p-values, with each expert behind all of them",
    of="check",
    data=quantiles,
    panel="layer",
    shared=True,
)
def plot_qq(axes: Axes, frame: pl.DataFrame, *, most: float = SMALLEST) -> Axes:
    """Observed against expected p-values, both as -log10, with each expert behind all of them.

    Args:
        frame: of a layer: expert (null: all), expected, observed.
        most: where the axes end; beyond, points are drawn at the edge.
    """
    experts = frame.drop_nulls("expert").partition_by("expert", maintain_order=True)
    every = frame.filter(pl.col("expert").is_null())
    for i, expert in enumerate(experts):
        observed = expert["observed"].clip(None, most)
        label = None if i else "one expert"
        axes.plot(expert["expected"], observed, color=PALE, lw=0.5, alpha=0.6, label=label)
    observed = every["observed"].clip(None, most)
    axes.plot(every["expected"], observed, color=MAIN, linewidth=1.8, label="all experts")
    _diagonal(axes)
    axes.set(xlim=(0, most), ylim=(0, 1.02 * most))
    axes.set(xlabel="expected -log10 p", ylabel="observed -log10 p")
    return axes


def densities(checked: Checked) -> Numbers:
    """Density of p-values in even bins; a lump is spread to its neighbours."""
    edges = np.linspace(0, 1, BINS + 1)

    def points(found: LayerCheck) -> pl.DataFrame:
        density = np.diff(found.trimmed.cdf(edges)) * BINS
        return tidy(low=edges[:-1], high=edges[1:], density=density)

    return Numbers("P-values against uniform", checked.about, _by_layer(checked, points))


@figure(
    "histogram",
    shows="density of p-values against uniform",
    of="check",
    data=densities,
    panel="layer",
    shared=True,
)
def plot_histogram(axes: Axes, frame: pl.DataFrame) -> Axes:
    """Density of a layer's p-values in even bins, against uniform."""
    edges = [*frame["low"], frame["high"][-1]]
    axes.stairs(frame["density"], edges, fill=True, color=MAIN, alpha=0.7, label="p-values")
    axes.axhline(1, color=REFERENCE, linewidth=1.2, linestyle="--", label="uniform")
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set(xlabel="p-value", ylabel="density")
    _from_zero(axes, frame["density"].to_numpy())
    return axes


def bias_of_experts(checked: Checked) -> Numbers:
    """Share of p-values at most LEVEL of each expert, beside its popularity."""

    def points(found: LayerCheck) -> pl.DataFrame:
        share = [values.share_below(LEVEL) for values in found.by_expert]
        experts = np.arange(len(share))
        return tidy(expert=experts, popularity=found.popularity, share=share)

    even = checked.top_k / checked.layers[0].n_experts
    title = "Bias of the null by popularity of experts"
    return Numbers(title, checked.about, _by_layer(checked, points), {"even": even})


@figure(
    "experts",
    shows="share of small p-values of each expert, by its popularity",
    of="check",
    data=bias_of_experts,
    panel="layer",
    shared=True,
)
def plot_experts(axes: Axes, frame: pl.DataFrame, *, even: float | None = None) -> Axes:
    """Share of p-values at most LEVEL of each expert, by how often the expert is in the top k.

    Args:
        frame: of a layer: popularity, share.
        even: popularity that all experts would have if alike; None marks none.
    """
    axes.plot(frame["popularity"], frame["share"], ".", color=MAIN, ms=4, label="an expert")
    axes.axhline(LEVEL, color=REFERENCE, linewidth=1.2, linestyle="--", label="uniform")
    if even is not None:
        axes.axvline(even, color=NATIVE, linestyle=NATIVE_LINE, linewidth=1.2, label="even share")
    axes.set_xlabel("share of rows with the expert in the top k")
    axes.set_ylabel(f"share of p at most {LEVEL}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    _from_zero(axes, frame["share"].to_numpy())
    return axes


def order_statistics(checked: Checked) -> Numbers:
    """Quantiles of a row's k-th smallest p-value, and of the k-th smallest of E uniform ones."""

    def points(found: LayerCheck) -> pl.DataFrame:
        parts = []
        for k, values in found.by_rank.items():
            expected = betaincinv(k, found.n_experts - k + 1, values.mid_cdf)
            x, y = thinned(-np.log10(expected), -np.log10(values.p))
            parts.append(tidy(k=k, expected=x, observed=y))
        return pl.concat(parts)

    title = "K-th smallest p-value of a row"
    return Numbers(title, checked.about, _by_layer(checked, points))


@figure(
    "ranks",
    shows="k-th smallest p-value of a row against that of uniform p-values",
    of="check",
    data=order_statistics,
    panel="layer",
    shared=True,
)
def plot_ranks(axes: Axes, frame: pl.DataFrame) -> Axes:
    """Quantiles of a row's k-th smallest p-value against those of the k-th of E uniform ones.

    P-values below 10^-SMALLEST are drawn at the upper edge.

    Args:
        frame: of a layer: k, expected and observed as -log10.
    """
    ranks = frame["k"].unique(maintain_order=True).to_list()
    colors = colormaps[ORDERED](np.linspace(0.1, 0.8, max(len(ranks), 1)))
    for color, k in zip(colors, ranks, strict=True):
        curve = frame.filter(pl.col("k") == k)
        observed = curve["observed"].clip(None, SMALLEST)
        axes.plot(curve["expected"], observed, color=color, linewidth=1.4, label=f"k = {k}")
    _diagonal(axes)
    farthest = float(np.max(frame["expected"].to_numpy(), initial=0.0))
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.05 * farthest))  # panels share it
    axes.set_ylim(0, 1.04 * SMALLEST)
    axes.set(
        xlabel="expected -log10 of the k-th smallest of uniform p-values",
        ylabel=f"observed -log10 p (at most {SMALLEST})",
    )
    return axes


def _diagonal(axes: Axes) -> None:
    axes.axline((0, 0), slope=1, color=REFERENCE, linewidth=1.2, linestyle="--", label="uniform")


def _from_zero(axes: Axes, values: NDArray[np.float64]) -> None:
    """Let the y axis start at 0 and hold these values beside those of panels that share it."""
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.1 * float(np.nanmax(values, initial=0.0))))
