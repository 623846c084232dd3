"""Figures of a run: functions that draw data on axes, without loading, saving or showing."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

# Okabe and Ito (2008): told apart by readers of every colour vision
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"


def plot_p_value_histogram(axes: Axes, p: NDArray[np.float64]) -> Axes:
    """Histogram of p-values against the uniform density that a right null model gives.

    Args:
        p: any shape, in [0, 1].
    """
    values = p[np.isfinite(p)].ravel()
    axes.hist(values, bins=50, range=(0, 1), density=True, color=BLUE, label="p-values")
    axes.axhline(1, color=RED, linestyle="--", label="uniform")
    axes.set(xlabel="p-value", ylabel="density", xlim=(0, 1))
    axes.set_title(f"P-values of {len(values):,} logits")
    axes.legend()
    return axes


def plot_step_up(
    axes: Axes, p: NDArray[np.float64], alpha: float, *, n_rejected: int, n_selected: int
) -> Axes:
    """The step-up rule on one row: sorted p-values, the line k * alpha / E, and the cut.

    Args:
        p: (E,), p-values of the row.
        alpha: BH level.
        n_rejected, n_selected: what was decided.
    """
    E = len(p)
    ranks = np.arange(1, E + 1)
    ordered = np.sort(p)
    axes.plot(ranks, ranks * alpha / E, color=RED, label=r"$k\,\alpha/E$")
    chosen = ranks <= n_selected
    axes.scatter(ranks[chosen], ordered[chosen], s=14, color=BLUE, zorder=3, label="selected")
    axes.scatter(ranks[~chosen], ordered[~chosen], s=10, color=GREY, zorder=3, label="not selected")
    axes.axvline(n_selected + 0.5, color=GREEN, linestyle="--")
    shown = min(E, max(12, 2 * n_selected))
    top = max(ordered[shown - 1], shown * alpha / E) * 1.05
    axes.set(xlim=(0.5, shown + 0.5), ylim=(-0.03 * top, top), xlabel="rank k", ylabel="p-value")
    axes.set_title(f"rejected {n_rejected}, selected {n_selected}", fontsize=9)
    return axes


def plot_expert_heatmap(axes: Axes, load: NDArray[np.float64], layers: Sequence[int]) -> Axes:
    """How often each expert is selected, layer by layer.

    Args:
        load: (L, E), share of a layer's tokens that use the expert.
        layers: (L,) decoder layers.
    """
    image = axes.imshow(load, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    step = max(1, len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title("Share of tokens that use an expert")
    _figure(axes).colorbar(image, ax=axes, label="share of tokens")
    return axes


def plot_experts_histogram(
    axes: Axes, counts: NDArray[np.int64], *, min_k: int | None = None, max_k: int | None = None
) -> Axes:
    """Histogram of experts selected per row, with its mean and the bounds.

    Args:
        counts: (E + 1,), rows by n_selected.
        min_k, max_k: bounds of BH routing; None draws none.
    """
    k = np.arange(len(counts))
    present = np.flatnonzero(counts)
    share = counts / counts.sum()
    mean = float(counts @ k / counts.sum())
    axes.bar(k, share, color=BLUE, width=0.9)
    axes.axvline(mean, color=RED, label=f"mean {mean:.2f}")
    for name, bound, style in (("min_k", min_k, ":"), ("max_k", max_k, "--")):
        if bound is not None:
            axes.axvline(bound, color=GREEN, linestyle=style, label=f"{name} {bound}")
    last = max(int(present[-1]), max_k or 0)
    axes.set(xlim=(-0.5, last + 0.9), xlabel="experts selected", ylabel="share of rows")
    axes.set_title(f"Experts per token and layer, {int(counts.sum()):,} rows")
    axes.legend()
    return axes


def plot_logits_against_p_values(
    axes: Axes, logits: NDArray[np.float32], p: NDArray[np.float64], layers: NDArray[np.integer]
) -> Axes:
    """Logits against their p-values; each layer has a null model, and so a curve, of its own.

    Args:
        logits, p: (N, E).
        layers: (N,), decoder layer of each row.
    """
    present = np.unique(layers)
    # a p-value of 0, above the grid of the null model, is drawn at the bottom
    smallest = p[p > 0].min(initial=1.0)
    colour = np.broadcast_to(layers[:, None], p.shape)
    points = axes.scatter(
        logits.ravel(),
        np.maximum(p, smallest).ravel(),
        c=colour.ravel(),
        s=2,
        cmap="viridis",
        linewidths=0,
        rasterized=True,
    )
    axes.set_yscale("log")
    axes.set(xlabel="router logit", ylabel="p-value")
    axes.set_title("Logits against p-values")
    bar = _figure(axes).colorbar(points, ax=axes, label="layer")
    bar.set_ticks(present[:: max(1, len(present) // 8)].tolist())
    return axes


def plot_passing_rate(axes: Axes, passing: NDArray[np.float64], max_k: int | None = None) -> Axes:
    """How often the k-th smallest p-value is at most k * alpha / E, rank by rank.

    Args:
        passing: (E,), share of rows, rank 1 first.
        max_k: upper bound of BH routing; None draws none.
    """
    ranks = np.arange(1, len(passing) + 1)
    axes.plot(ranks, passing, color=BLUE, marker=".", label="share that passes")
    if max_k is not None:
        axes.axvline(max_k, color=GREEN, linestyle="--", label=f"max_k {max_k}")
    axes.set(xlabel="rank k", ylabel="share of rows", xlim=(0.5, len(passing) + 0.5))
    axes.set_ylim(0, max(0.05, 1.05 * passing.max()))
    axes.set_title(r"Rows whose k-th p-value is at most $k\,\alpha/E$")
    axes.legend()
    return axes


def plot_mean_experts(axes: Axes, selected: NDArray[np.int64], layers: Sequence[int]) -> Axes:
    """Mean experts per token of each layer, with the middle 80 % of tokens.

    Args:
        selected: (L, E + 1), rows by n_selected.
        layers: (L,) decoder layers.
    """
    k = np.arange(selected.shape[1])
    rows = selected.sum(axis=1)
    mean = selected @ k / rows
    share = np.cumsum(selected, axis=1) / rows[:, None]
    low, high = (np.argmax(share >= level, axis=1) for level in (0.1, 0.9))
    axes.fill_between(layers, low, high, color=BLUE, alpha=0.2, label="10 % to 90 % of tokens")
    axes.plot(layers, mean, color=BLUE, marker="o", markersize=4, label="mean")
    axes.set(xlabel="layer", ylabel="experts per token", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Experts per token by layer")
    axes.legend()
    return axes


def plot_sweep(
    axes: Axes, alphas: Sequence[float], by_layer: Mapping[int, Sequence[float]],
    overall: Sequence[float],
) -> Axes:  # fmt: skip
    """Mean experts per token against alpha, replayed from the log.

    Args:
        alphas: (J,).
        by_layer: (J,) for each layer.
        overall: (J,) over all layers.
    """
    from matplotlib import colormaps

    shades = colormaps["viridis"](np.linspace(0, 0.9, len(by_layer)))
    for shade, (layer, mean) in zip(shades, by_layer.items(), strict=True):
        label = f"layer {layer}" if len(by_layer) <= 8 else None
        axes.plot(alphas, mean, color=shade, linewidth=1, label=label)
    axes.plot(alphas, overall, color=RED, linewidth=2.5, label="all layers")
    axes.set(xlabel="alpha", ylabel="experts per token", xlim=(0, 1), ylim=(0, None))
    axes.set_title("Experts per token at every alpha (replayed)")
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
    most = float(np.abs(difference).max()) or 1.0
    image = axes.imshow(
        difference, aspect="auto", cmap="PuOr", vmin=-most, vmax=most, interpolation="nearest"
    )
    step = max(1, len(layers) // 16)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title(f"Share of tokens that use an expert: {names[0]} less {names[1]}")
    _figure(axes).colorbar(image, ax=axes, label="difference of shares")
    return axes


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure
