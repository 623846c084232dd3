"""Heat maps of layers by experts, and of experts by experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.layouts import column
from bokeh.models import (
    BasicTicker,
    ColorBar,
    ColumnDataSource,
    CustomJS,
    CustomJSHover,
    HoverTool,
    LinearColorMapper,
    Select,
)
from bokeh.palettes import PuOr11, Viridis256
from numpy.typing import NDArray

from bhlog.analysis.report.look import WIDGETS, frame


def layer_map(
    name: str,
    cells: NDArray[np.float64],
    layers: Sequence[int],
    *,
    value: str,
    diverging: bool = False,
) -> Any:
    """Experts to the right, layers upwards.

    Args:
        cells: (L, E).
        value: what a cell says, in hovers and beside the colours.
        diverging: whether colours are of differences around 0.
    """
    rows = [str(layer) for layer in layers]
    plot = _plot(name, cells.shape, "expert", "layer", max(220, min(520, 60 + 14 * len(rows))))
    step = -(-len(rows) // 12)
    plot.yaxis.ticker = list(range(0, len(rows), step))
    plot.yaxis.major_label_overrides = dict(enumerate(rows))
    most = float(np.nanmax(np.abs(cells), initial=0)) or 1.0
    source = ColumnDataSource({"cells": [cells.astype(np.float32)]}, name=f"{name}_cells")
    _image(plot, source, cells.shape, (-most, most) if diverging else (0, most), diverging)
    place = CustomJSHover(
        args={"layers": rows}, code="return layers[Math.round(special_vars.y)] ?? ''"
    )
    expert = CustomJSHover(code="return String(Math.round(special_vars.x))")
    plot.add_tools(
        HoverTool(
            tooltips=[("layer", "$y{custom}"), ("expert", "$x{custom}"), (value, "@cells{0.000}")],
            formatters={"$y": place, "$x": expert},
        )
    )
    return plot


def pair_map(name: str, cells: Mapping[int, NDArray[np.float64]], *, value: str) -> Any:
    """Experts by experts of one layer at a time, chosen from a list above the plot.

    Args:
        cells: (E, E) by layer.
    """
    layers = list(cells)
    first = cells[layers[0]]
    plot = _plot(name, first.shape, "expert", "expert", 340)
    source = ColumnDataSource({"cells": [first.astype(np.float32)]}, name=f"{name}_cells")
    most = max(float(np.nanpercentile(one, 99)) for one in cells.values()) or 1.0
    _image(plot, source, first.shape, (0, most), False)
    names = {
        "$y": CustomJSHover(code="return String(Math.round(special_vars.y))"),
        "$x": CustomJSHover(code="return String(Math.round(special_vars.x))"),
    }
    tips = [("experts", "$x{custom} and $y{custom}"), (value, "@cells{0.00}")]
    plot.add_tools(HoverTool(tooltips=tips, formatters=names))
    every = ColumnDataSource({"cells": [one.astype(np.float32) for one in cells.values()]})
    chosen = Select(
        title="layer",
        name=f"{name}_layer",
        options=[(str(i), f"layer {layer}") for i, layer in enumerate(layers)],
        value="0",
        stylesheets=[WIDGETS],
        width=160,
        margin=0,
    )
    chosen.js_on_change(
        "value",
        CustomJS(
            args={"every": every, "source": source},
            code="source.data = {cells: [every.data.cells[Number(cb_obj.value)]]}",
        ),
    )
    return column(chosen, plot, sizing_mode="stretch_width")


def _plot(name: str, shape: tuple[int, ...], x: str, y: str, height: int) -> Any:
    plot = frame(
        name=name,
        x=x,
        y=y,
        height=height,
        x_range=(-0.5, shape[1] - 0.5),
        y_range=(-0.5, shape[0] - 0.5),
    )
    plot.grid.grid_line_color = None
    return plot


def _image(
    plot: Any,
    source: ColumnDataSource,
    shape: tuple[int, ...],
    limits: tuple[float, float],
    diverging: bool,
) -> None:
    palette = PuOr11[::-1] if diverging else Viridis256
    colours = LinearColorMapper(palette=palette, low=limits[0], high=limits[1])
    plot.image("cells", x=-0.5, y=-0.5, dw=shape[1], dh=shape[0], source=source,
               color_mapper=colours)  # fmt: skip
    bar = ColorBar(
        color_mapper=colours, width=10, ticker=BasicTicker(desired_num_ticks=5), padding=6,
        bar_line_color=None, major_tick_line_color=None, background_fill_color=None,
        major_label_text_font_size="12px", label_standoff=6,
    )  # fmt: skip
    plot.add_layout(bar, "right")
