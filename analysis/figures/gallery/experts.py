"""Experts that rows were given, as logged: how many, and which."""

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from bhlog.analysis.figures.axes import (
    bound_lines,
    draw_layers_by,
    figure_of,
    native_line,
    whole_numbers,
)
from bhlog.analysis.figures.registry import Numbers, figure, tidy
from bhlog.analysis.figures.run_data import RunData
from bhlog.analysis.figures.style import BLACK, MAIN, PALE, REFERENCE


def load_of_experts(run: RunData) -> Numbers:
    """How often each expert was selected, beside an even share of the load."""
    load = run.load
    layers = np.array(run.log.layers)[:, None]
    experts = np.arange(run.log.n_experts)
    frame = tidy(layer=layers, expert=experts, rows=load.experts, share=load.share)
    even = float(load.experts.sum() / load.rows.sum() / len(experts))
    return Numbers("How often each expert is selected", run.logged_about, frame, {"even": even})


@figure(
    "expert_heatmap",
    shows="how often each expert was selected, layer by expert",
    data=load_of_experts,
    size=(8, 4.8),
)
def plot_expert_heatmap(axes: Axes, frame: pl.DataFrame, *, even: float | None = None) -> Axes:
    """How often each expert is selected, layer by layer.

    Args:
        frame: layer, expert, share of the layer's rows that use the expert.
        even: share that each expert would have if all were used alike; marked beside the colours.
    """
    percent = frame.with_columns(percent=100 * pl.col("share"))
    image = draw_layers_by(
        axes,
        percent,
        "percent",
        across="expert",
        pick=lambda cells: cells.mean(axis=-1),
        picked="mean",
        vmin=0,
    )
    bar = figure_of(axes).colorbar(image, ax=axes, label="% of the layer's tokens")
    if even is not None:
        bar.ax.axhline(100 * even, color="white", linewidth=4)
        bar.ax.axhline(100 * even, color=BLACK, linewidth=2)
        bar.set_label(f"% of the layer's tokens (line: even share, {100 * even:.3g} %)")
    return axes


def experts_of_rows(run: RunData) -> Numbers:
    """Rows by the number of experts they were given."""
    counts = run.load.n_selected.sum(axis=0)
    low, high = run.logged_bounds
    frame = tidy(n_selected=np.arange(len(counts)), rows=counts, share=counts / counts.sum())
    title = f"Experts per token and layer, {int(counts.sum()):,} rows"
    facts = {"min_k": low, "max_k": high, "top_k": run.top_k}
    return Numbers(title, run.logged_about, frame, facts)


@figure(
    "experts_histogram",
    shows="experts selected per row, with mean, min_k and max_k",
    data=experts_of_rows,
)
def plot_experts_histogram(
    axes: Axes,
    frame: pl.DataFrame,
    *,
    min_k: int | None = None,
    max_k: int | None = None,
    top_k: int | None = None,
) -> Axes:
    """Histogram of experts selected per row, with its mean, the bounds and the native number.

    Args:
        frame: n_selected from 0 to E, rows, share; at least one row.
        min_k, max_k: bounds of BH routing; None draws none.
        top_k: experts per token under native routing; None draws none.
    """
    k, rows = frame["n_selected"].to_numpy(), frame["rows"].to_numpy()
    mean = float(k @ rows / rows.sum())
    axes.bar(k, 100 * frame["share"].to_numpy(), color=MAIN, width=0.9)
    axes.axvline(mean, color=REFERENCE, linewidth=2, label=f"mean {mean:.2f}")
    bound_lines(axes, min_k, max_k)
    native_line(axes, top_k, upright=True)
    last = max(int(np.flatnonzero(rows)[-1]), max_k or 0, top_k or 0)
    axes.set(xlim=(-0.7, last + 0.7), xlabel="experts selected (n_selected)", ylabel="% of rows")
    axes.margins(y=0.08)
    whole_numbers(axes, "x")
    axes.legend()
    return axes


def experts_of_layers(run: RunData) -> Numbers:
    """Mean experts of each layer, and the middle 80 % of its tokens."""
    counts = run.load.n_selected
    rows = counts.sum(axis=1)
    some = np.maximum(rows, 1)
    k = np.arange(counts.shape[1])
    share = np.cumsum(counts, axis=1) / some[:, None]
    low, high = (np.argmax(share >= level, axis=1) for level in (0.1, 0.9))
    frame = tidy(layer=run.log.layers, rows=rows, mean=counts @ k / some, low=low, high=high)
    facts = {"overall": float((counts @ k).sum() / rows.sum()), "top_k": run.top_k}
    return Numbers("Experts per token by layer", run.logged_about, frame, facts)


@figure("mean_experts", shows="experts per token by layer", data=experts_of_layers)
def plot_mean_experts(
    axes: Axes, frame: pl.DataFrame, *, overall: float, top_k: int | None = None
) -> Axes:
    """Mean experts per token of each layer, with the middle 80 % of tokens.

    Args:
        frame: layer, mean, low and high (of the middle).
        overall: mean of all rows.
        top_k: experts per token under native routing; None draws none.
    """
    layers, high = frame["layer"].to_numpy(), int(frame["high"].max())  # type: ignore[arg-type]
    width = min(8.0, 180 / len(layers))
    middle = "10 % to 90 % of tokens"
    axes.vlines(layers, frame["low"], frame["high"], color=PALE, alpha=0.5, lw=width, label=middle)
    axes.plot(layers, frame["mean"], color=MAIN, marker="o", markersize=4, label="mean")
    label = f"mean of all layers {overall:.2f}"
    axes.axhline(overall, color=REFERENCE, linestyle="--", label=label)
    native_line(axes, top_k, upright=False)
    axes.set(xlabel="layer", ylabel="experts per token (n_selected)")
    top = 1.45 * max(1, high, top_k or 0)
    axes.set(xlim=(layers.min() - 0.7, layers.max() + 0.7), ylim=(0, top))
    whole_numbers(axes, "x", "y")
    axes.legend(loc="upper center", ncols=2)
    return axes
