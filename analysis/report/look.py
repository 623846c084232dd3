"""How the page's plots look: one frame for all, colours as in the figures of bhlog plot."""

from typing import Any

from bokeh.models import HoverTool
from bokeh.plotting import figure

HEIGHT = 300  # pixels of a plot
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"

# Widgets live in a shadow root of their own: what crosses its border are variables
WIDGETS = """
:host { color: var(--ink); font-family: inherit; font-size: 15px; width: 100%; }
.bk-input-group > label { color: var(--soft); font-size: 13px; }
.bk-slider-title { display: none; }
.bk-input, select.bk-input { background: var(--field); color: var(--ink); font-size: 15px;
  border: 1px solid var(--line); border-radius: 6px; height: 36px; }
.bk-input:focus { outline: 2px solid var(--accent); outline-offset: 1px; }
select.bk-input { background-image: none; appearance: auto; color-scheme: var(--scheme); }
.noUi-target { background: var(--line); border: 0; box-shadow: none; border-radius: 4px; }
.noUi-connect { background: var(--accent) !important; }
.noUi-handle { border: 2px solid var(--accent); background: var(--card); border-radius: 50%;
  box-shadow: none; cursor: grab; }
.noUi-handle:before, .noUi-handle:after { display: none; }
.noUi-horizontal { height: 8px; }
.noUi-horizontal .noUi-handle { width: 22px; height: 22px; top: -8px; right: -11px; }
.noUi-handle:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
"""


def frame(
    *, name: str, x: str, y: str, height: int = HEIGHT, tools: str = "", **options: Any
) -> Any:
    """A plot as wide as its place, without a toolbar: the page scrolls under a finger.

    Args:
        name: by which the page's scripts find it.
        x, y: what the axes are.
    """
    plot = figure(
        name=name,
        x_axis_label=x,
        y_axis_label=y,
        height=height,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools=tools,
        min_border_right=12,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        **options,
    )
    for axis in plot.axis:
        axis.axis_label_text_font = axis.major_label_text_font = FONT
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.axis_label_text_font_style = "normal"
        axis.axis_line_color = axis.minor_tick_line_color = None
        axis.major_tick_line_color = None
    plot.grid.grid_line_width = 1
    return plot


def legend_below(plot: Any) -> None:
    """The legend under the plot, where it hides nothing; a click hides a curve."""
    legend = plot.legend[0]
    plot.add_layout(legend, "below")
    legend.update(
        orientation="horizontal",
        location="left",
        click_policy="hide",
        border_line_color=None,
        background_fill_color=None,
        label_text_font=FONT,
        label_text_font_size="12px",
        ncols=2,  # as many as fit on a phone
        padding=2,
        spacing=14,
    )


def hover(plot: Any, *tooltips: tuple[str, str], **options: Any) -> None:
    """What a pointer over a mark shows."""
    plot.add_tools(HoverTool(tooltips=list(tooltips), **options))
