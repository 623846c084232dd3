"""Parts that several plots share: axes of layers and experts, reference lines, thinned lines."""

from collections.abc import Callable

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from bhlog.analysis.figures.style import (
    BLACK,
    MAX_K_LINE,
    MIN_K_LINE,
    MOST_EXPERTS,
    MOST_LAYERS,
    NATIVE,
    NATIVE_LINE,
    ORDERED,
)


def draw_layers_by(
    axes: Axes,
    frame: pl.DataFrame,
    values: str,
    *,
    across: str,
    pick: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    picked: str,
    **look: object,
) -> AxesImage:
    """A heat map with a row a layer; beyond MOST_LAYERS and MOST_EXPERTS neighbours share a cell.

    Args:
        frame: columns layer, `across` and `values`, a row for each pair, by layer first.
        across: the column that goes to the right.
        pick: reduces the last axis of (..., n) neighbouring cells to one value.
        picked: what it does, in a word.
    """
    layers = frame["layer"].unique(maintain_order=True).to_list()
    cells = frame[values].to_numpy().astype(np.float64).reshape(len(layers), -1)
    down, right = (
        -(-n // most) for n, most in zip(cells.shape, (MOST_LAYERS, MOST_EXPERTS), strict=True)
    )
    cells = _joined(_joined(cells, right, pick).T, down, pick).T
    image = axes.imshow(cells, aspect="auto", **look)  # type: ignore[arg-type]
    axes.grid(False)
    step = -(-len(cells) // 12)
    axes.set_yticks(range(0, len(cells), step), [str(layer) for layer in layers[:: step * down]])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    if right > 1:  # ticks still count single places
        axes.xaxis.set_major_formatter(lambda place, _: f"{place * right:.0f}")
    axes.set(xlabel=_shared(across, right, picked), ylabel=_shared("layer", down, picked))
    return image


def _joined(
    cells: NDArray[np.float64],
    n: int,
    pick: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """(A, B) cells with each n neighbours along B made one; the last may be fewer."""
    if n == 1:
        return cells
    starts = range(0, cells.shape[1], n)
    return np.stack([pick(cells[:, start : start + n]) for start in starts], axis=1)


def _shared(name: str, n: int, picked: str) -> str:
    return name if n == 1 else f"{name} ({picked} of {n} in a cell)"


def layer_norm(layers: NDArray[np.integer]) -> Normalize:
    """Layers as colours; one layer alone gets any range that holds it."""
    first, last = int(layers.min()), int(layers.max())
    return Normalize(first, max(last, first + 1))


def layer_colorbar(axes: Axes, norm: Normalize) -> None:
    ticks = MaxNLocator(nbins=8, integer=True, min_n_ticks=1)
    figure_of(axes).colorbar(ScalarMappable(norm, ORDERED), ax=axes, label="layer", ticks=ticks)


def bound_lines(axes: Axes, min_k: int | None, max_k: int | None) -> None:
    """Upright lines at the bounds on experts; None draws none."""
    for name, style, bound in (("min_k", MIN_K_LINE, min_k), ("max_k", MAX_K_LINE, max_k)):
        if bound is not None:
            axes.axvline(bound, color=BLACK, linestyle=style, label=f"{name} {bound}")


def native_line(axes: Axes, top_k: int | None, *, upright: bool) -> None:
    """A line at the experts that the model itself takes; None draws none."""
    if top_k is not None:
        draw = axes.axvline if upright else axes.axhline
        draw(top_k, color=NATIVE, linestyle=NATIVE_LINE, label=f"native top-{top_k}")


def level_lines(axes: Axes, alpha: float | None, n_experts: int | None) -> None:
    """Lines at what the p-values of the first and of the last rank must reach; None draws none."""
    if alpha is not None and n_experts is not None:
        for name, level in ((r"$\alpha/E$", alpha / n_experts), (r"$\alpha$", alpha)):
            label = f"{name} = {level:.2g}"
            axes.axhline(level, color=BLACK, linestyle=":", linewidth=1.2, label=label)


def whole_numbers(axes: Axes, *names: str) -> None:
    """Ticks at whole numbers along the axes named "x" and "y"."""
    for name in names:
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def thinned(*columns: NDArray[np.float64], most: int = 600) -> tuple[NDArray[np.float64], ...]:
    """At most so many points of a line, its ends kept."""
    if len(columns[0]) <= most:
        return columns
    chosen = np.unique(np.linspace(0, len(columns[0]) - 1, most).astype(np.int64))
    return tuple(column[chosen] for column in columns)


def figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure
