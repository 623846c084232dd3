"""Figures of a run: functions that draw data on axes, without loading, saving or showing."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bhlog.capture.contract.rule import critical_values

# Okabe and Ito (2008): told apart by readers of every colour vision
BLUE, RED, GREY = "#0072B2", "#D55E00", "#777777"

_BOUND_STYLES = (("min_k", ":"), ("max_k", "--"))


def plot_p_value_histogram(axes: Axes, p: NDArray[np.float64]) -> Axes:
    """Histogram of p-values against the uniform density that a right null model gives.

    Args:
        p: any shape, in [0, 1]; NaN is left out.
    """
    values = p[np.isfinite(p)].ravel()
    density, edges = np.histogram(values, bins=50, range=(0, 1), density=True)
    axes.stairs(density, edges, fill=True, color=BLUE, label="p-values")
    axes.axhline(1, color=RED, linestyle="--", linewidth=2, label="uniform")
    axes.set(xlabel="p-value", ylabel="density", xlim=(0, 1), ylim=(0, None))
    axes.set_title(f"P-values of {len(values):,} sample logits")
    axes.legend()
    return axes


def plot_step_up(
    axes: Axes, p: NDArray[np.float64], alpha: float, *, n_rejected: int, n_selected: int
) -> Axes:
    """The step-up rule on one row: sorted p-values, the line k * alpha / E, and the cut.

    Shows as many ranks as it takes to see the cut and the choice, at least 12.

    Args:
        p: (E,), p-values of the row; NaN ranks last, as 1.
        alpha: BH level.
        n_rejected, n_selected: what was decided, before and after the bounds.
    """
    E = len(p)
    ranks = np.arange(1, E + 1)
    ordered = np.sort(np.where(np.isfinite(p), p, 1.0))
    line = critical_values(alpha, E)
    axes.plot(ranks, line, color=RED, label=r"$k\,\alpha/E$")
    chosen = ranks <= n_selected
    axes.scatter(ranks[chosen], ordered[chosen], s=16, color=BLUE, zorder=3, label="selected")
    axes.scatter(
        ranks[~chosen],
        ordered[~chosen],
        s=16,
        facecolors="white",
        edgecolors=GREY,
        zorder=3,
        label="not selected",
    )
    axes.axvline(n_rejected + 0.5, color="black", linestyle="--", label="cut after n_rejected")
    shown = min(E, max(12, round(1.6 * max(n_rejected, n_selected))))
    top = 1.05 * max(line[shown - 1], min(ordered[shown - 1], 2.5 * line[shown - 1]))
    axes.set(xlim=(0, shown + 0.7), ylim=(-0.03 * top, top), xlabel="rank k", ylabel="p-value")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_title(f"n_rejected {n_rejected}, n_selected {n_selected}")
    return axes


def plot_expert_heatmap(axes: Axes, load: NDArray[np.float64], layers: Sequence[int]) -> Axes:
    """How often each expert is selected, layer by layer.

    Args:
        load: (L, E), share of a layer's tokens that use the expert.
        layers: (L,) decoder layers.
    """
    image = axes.imshow(100 * load, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    _layer_by_expert(axes, layers)
    axes.set_title("How often each expert is selected")
    _figure(axes).colorbar(image, ax=axes, label="% of the layer's tokens")
    return axes


def plot_experts_histogram(
    axes: Axes, counts: NDArray[np.int64], *, min_k: int | None = None, max_k: int | None = None
) -> Axes:
    """Histogram of experts selected per row, with its mean and the bounds.

    Args:
        counts: (E + 1,), rows by n_selected, at least one.
        min_k, max_k: bounds of BH routing; None draws none.
    """
    k = np.arange(len(counts))
    present = np.flatnonzero(counts)
    mean = float(counts @ k / counts.sum())
    axes.bar(k, 100 * counts / counts.sum(), color=BLUE, width=0.9)
    axes.axvline(mean, color=RED, linewidth=2, label=f"mean {mean:.2f}")
    for (name, style), bound in zip(_BOUND_STYLES, (min_k, max_k), strict=True):
        if bound is not None:
            axes.axvline(bound, color="black", linestyle=style, label=f"{name} {bound}")
    last = max(int(present[-1]), max_k or 0)
    axes.set(xlim=(-0.7, last + 0.7), xlabel="experts selected (n_selected)", ylabel="% of rows")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_title(f"Experts per token and layer, {int(counts.sum()):,} rows")
    axes.legend()
    return axes


def plot_logits_against_p_values(
    axes: Axes, logits: NDArray[np.float32], p: NDArray[np.float64], layers: NDArray[np.integer]
) -> Axes:
    """Logits against their p-values; each layer has a null model, and so a curve, of its own.

    P-values below 10^-8 are drawn at the lower edge.

    Args:
        logits, p: (N, E); non-finite values are left out.
        layers: (N,), decoder layer of each row.
    """
    lowest = 1e-8
    finite = np.flatnonzero((np.isfinite(logits) & np.isfinite(p)).ravel())
    mixed = np.random.default_rng(0).permutation(finite)  # so that no layer covers the others
    colour = np.broadcast_to(layers[:, None], p.shape)
    norm = _layer_norm(layers)
    axes.scatter(
        logits.ravel()[mixed],
        np.maximum(p.ravel()[mixed], lowest),
        c=colour.ravel()[mixed],
        s=3,
        cmap="viridis",
        norm=norm,
        linewidths=0,
    )
    axes.set_yscale("log")
    axes.set(xlabel="router logit", ylabel="p-value (those below 1e-8 at 1e-8)")
    axes.set_ylim(lowest / 2, 2)
    axes.set_title(f"Logits against p-values, {len(p):,} sample rows")
    _layer_colorbar(axes, norm)
    return axes


def plot_passing_rate(
    axes: Axes,
    passing: NDArray[np.float64],
    rejected: NDArray[np.float64],
    *,
    alpha: float,
    min_k: int,
    max_k: int,
) -> Axes:
    """How often rank k passes its own threshold, and how often the step-up rule rejects it.

    The rule rejects a rank that fails its own threshold when a later rank passes. Ranks that next
    to no row rejects are cut off.

    Args:
        passing: (E,), share of rows with p_(k) <= k * alpha / E, rank 1 first.
        rejected: (E,), share of rows with n_rejected >= k.
        alpha: BH level.
        min_k, max_k: bounds on n_selected.
    """
    ranks = np.arange(1, len(passing) + 1)
    marker = "." if len(ranks) <= 64 else ""
    axes.plot(ranks, 100 * rejected, color=BLUE, marker=marker, label="rejected: n_rejected ≥ k")
    axes.plot(
        ranks,
        100 * passing,
        color=RED,
        marker=marker,
        linestyle="--",
        label=r"passes: p of rank k $\leq k\,\alpha/E$",
    )
    for (name, style), bound in zip(_BOUND_STYLES, (min_k, max_k), strict=True):
        axes.axvline(bound, color="black", linestyle=style, label=f"{name} {bound}")
    frequent = int(np.max(ranks, where=rejected >= 0.005, initial=1))
    shown = min(len(ranks), max(12, round(1.2 * max(frequent, max_k if max_k < len(ranks) else 0))))
    axes.set(xlabel="rank k", ylabel="% of sample rows", xlim=(0, shown + 0.7), ylim=(0, 102))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_title(f"How often a rank passes at alpha {alpha:g}")
    axes.legend()
    return axes


def plot_mean_experts(axes: Axes, selected: NDArray[np.int64], layers: Sequence[int]) -> Axes:
    """Mean experts per token of each layer, with the middle 80 % of tokens.

    Args:
        selected: (L, E + 1), rows by n_selected.
        layers: (L,) decoder layers.
    """
    k = np.arange(selected.shape[1])
    rows = np.maximum(selected.sum(axis=1), 1)
    share = np.cumsum(selected, axis=1) / rows[:, None]
    low, high = (np.argmax(share >= level, axis=1) for level in (0.1, 0.9))
    width = min(8.0, 180 / len(layers))
    middle = "10 % to 90 % of tokens"
    axes.vlines(layers, low, high, color=BLUE, alpha=0.3, linewidth=width, label=middle)
    axes.plot(layers, selected @ k / rows, color=BLUE, marker="o", markersize=4, label="mean")
    overall = float((selected @ k).sum() / rows.sum())
    axes.axhline(overall, color=RED, linestyle="--", label=f"mean of all layers {overall:.2f}")
    axes.set(xlabel="layer", ylabel="experts per token (n_selected)")
    axes.set(xlim=(min(layers) - 0.7, max(layers) + 0.7), ylim=(0, 1.3 * max(1, int(high.max()))))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_title("Experts per token by layer")
    axes.legend(loc="upper center", ncols=3, fontsize="small")
    return axes


def plot_sweep(
    axes: Axes,
    alphas: Sequence[float],
    mean: NDArray[np.float64],
    layers: Sequence[int],
    *,
    alpha: float | None = None,
) -> Axes:
    """Mean experts per token against alpha, replayed from the log: each layer, and all.

    Args:
        alphas: (A,), rising.
        mean: (L, A), mean n_selected of each layer; layers have equally many rows.
        layers: (L,) decoder layers.
        alpha: marked; None marks none.
    """
    norm = _layer_norm(np.asarray(layers))
    shades = ScalarMappable(norm, "viridis").to_rgba(np.asarray(layers))
    for shade, row in zip(shades, mean, strict=True):
        axes.plot(alphas, row, color=shade, linewidth=1)
    axes.plot(alphas, mean.mean(axis=0), color="black", linewidth=2.5, label="all layers")
    if alpha is not None:
        axes.axvline(alpha, color=RED, linestyle="--", label=f"the run's alpha {alpha:g}")
    axes.set_xscale("log")
    axes.set(xlabel="alpha", ylabel="experts per token (n_selected)", xlim=(alphas[0], 1))
    axes.set_ylim(0, None)
    axes.set_title("Experts per token at other alphas (replayed)")
    _layer_colorbar(axes, norm)
    axes.legend()
    return axes


def plot_source_difference(
    axes: Axes, difference: NDArray[np.float64], layers: Sequence[int], names: tuple[str, str]
) -> Axes:
    """Which experts serve one source more than another.

    Args:
        difference: (L, E), share of tokens of names[0] that use the expert, less that of names[1].
        layers: (L,) decoder layers.
        names: the two sources.
    """
    points = 100 * difference
    most = float(np.abs(points).max()) or 1.0
    image = axes.imshow(
        points, aspect="auto", cmap="PuOr", vmin=-most, vmax=most, interpolation="nearest"
    )
    _layer_by_expert(axes, layers)
    first, second = (name if len(name) <= 30 else f"…{name[-29:]}" for name in names)
    axes.set_title(f"Share of tokens that use an expert: {first} less {second}", fontsize=10)
    _figure(axes).colorbar(image, ax=axes, label="difference in percentage points")
    return axes


def _layer_by_expert(axes: Axes, layers: Sequence[int]) -> None:
    step = -(-len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    axes.set(xlabel="expert", ylabel="layer")


def _layer_norm(layers: NDArray[np.integer]) -> Normalize:
    first, last = int(layers.min()), int(layers.max())
    return Normalize(first, max(last, first + 1))  # one layer: any range that holds it


def _layer_colorbar(axes: Axes, norm: Normalize) -> None:
    ticks = MaxNLocator(nbins=8, integer=True, min_n_ticks=1)
    _figure(axes).colorbar(ScalarMappable(norm, "viridis"), ax=axes, label="layer", ticks=ticks)


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure
