"""A figure on its page: panels, title, legend."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy import ceil, sqrt

from bhlog.analysis.figures.about import title_lines
from bhlog.analysis.figures.registry import FigureKind, Numbers
from bhlog.analysis.figures.style import MOST_LAYERS, STYLE, Style

_LETTER = 0.0078  # inches that a letter takes per point of its size


def draw_page(kind: FigureKind, subject: Any, style: Style = STYLE) -> Figure:
    """Gather a figure's numbers and draw them.

    Args:
        subject: what the figure is of; see FigureKind.of.

    Raises:
        InvalidOption, KdeMismatch: the subject lacks what the figure needs.
    """
    return page_of(kind, kind.data(subject), style)


def page_of(kind: FigureKind, numbers: Numbers, style: Style = STYLE) -> Figure:
    """Draw numbers that are gathered already."""
    with mpl.rc_context(style.settings):
        if kind.panel is None:
            page = _new_page(*kind.size, style)
            kind.plot(page.subplots(), numbers.frame, **numbers.facts)
            page.suptitle(_title(numbers, kind.size[0], style))
        elif kind.shared:
            page = _layer_page(kind, numbers, kind.panel, style)
        else:
            page = _panel_page(kind, numbers, kind.panel, style)
        return page


def _new_page(width: float, height: float, style: Style) -> Figure:
    page = Figure(figsize=(width, height), layout=style.layout)
    FigureCanvasAgg(page)
    return page


def _title(numbers: Numbers, width: float, style: Style) -> str:
    """The title in lines that fit a page so many inches wide."""
    return title_lines(numbers.title, numbers.about, int(width / (_LETTER * style.font)))


def _panel_page(kind: FigureKind, numbers: Numbers, panel: str, style: Style) -> Figure:
    """Panels with axes of their own."""
    page = _new_page(*kind.size, style)
    parts = numbers.frame.partition_by(panel, maintain_order=True)
    columns = min(kind.columns, len(parts))
    grid = page.subplots(-(-len(parts) // columns), columns, squeeze=False)
    for axes, part in zip(grid.flat, parts, strict=False):
        kind.plot(axes, part, **numbers.facts)
    for axes in grid.flat[len(parts) :]:
        axes.set_visible(False)
    title = _title(numbers, kind.size[0], style)
    _head(page, title, list(grid.flat[: len(parts)]), style)
    return page


def _layer_page(kind: FigureKind, numbers: Numbers, panel: str, style: Style) -> Figure:
    """A panel a layer on common axes; beyond MOST_LAYERS, neighbouring layers share a panel."""
    parts = numbers.frame.partition_by(panel, maintain_order=True, as_dict=True)
    layers = [key for (key,) in parts]
    together = -(-len(layers) // MOST_LAYERS)
    groups = [layers[i : i + together] for i in range(0, len(layers), together)]
    columns = _columns(len(groups))
    rows = -(-len(groups) // columns)
    width = max(1.75 * columns, 5.5)
    title = _title(numbers, width, style)
    head = 0.5 + 0.02 * style.font * (title.count("\n") + 1)
    page = _new_page(width, max(1.6 * rows, 3) + 0.6 + head, style)
    grid = page.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, group in zip(grid.flat, groups, strict=False):
        for layer in group:
            kind.plot(axes, parts[(layer,)], **numbers.facts)
        name = f"layer {group[0]}" if len(group) == 1 else f"layers {group[0]}-{group[-1]}"
        axes.set_title(name, fontsize=style.font - 1, pad=3)
    shown = list(grid.flat[: len(groups)])
    for column in range(columns):  # the lowest panel of a column carries the numbers
        lowest = (len(groups) - 1 - column) // columns
        if lowest >= 0:
            grid[lowest, column].tick_params(labelbottom=True)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    page.supxlabel(shown[0].get_xlabel(), fontsize=style.font)
    page.supylabel(shown[0].get_ylabel(), fontsize=style.font)
    for axes in shown:
        axes.set(xlabel="", ylabel="")
    _head(page, title, shown, style)
    return page


def _head(page: Figure, title: str, panels: Sequence[Axes], style: Style) -> None:
    """The title, and below it a legend of all panels if they have several things to tell apart.

    The layout would put a legend outside the panels over the title: both are put by hand, and the
    layout gets what is below them.
    """
    renderer = page.canvas.get_renderer()  # type: ignore[attr-defined]
    gap = 0.06 / page.get_figheight()

    def lower_edge(artist: Artist) -> float:
        artist.set_in_layout(False)
        return float(artist.get_window_extent(renderer).y0 / page.bbox.height) - gap

    top = lower_edge(page.suptitle(title, y=1 - gap, va="top"))
    handles: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) > 1:
        columns = int(page.get_figwidth() / (0.6 + _LETTER * style.font * max(map(len, handles))))
        legend = page.legend(
            handles=list(handles.values()),
            labels=list(handles),
            loc="upper center",
            bbox_to_anchor=(0.5, top),
            borderaxespad=0,
            ncols=max(1, min(columns, len(handles))),
        )
        top = lower_edge(legend)
    engine = page.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, 0, 1, top))


def _columns(n: int) -> int:
    """Columns of a page of n panels: about as many as rows or a few more, with few left empty."""
    square = int(ceil(sqrt(n)))
    return min(range(square, int(1.4 * square) + 1), key=lambda columns: (-n % columns, columns))
