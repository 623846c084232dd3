"""The alpha explorer: sliders that a page answers at once from packed profiles."""

from collections.abc import Sequence
from math import ceil, log10
from typing import Any

from bokeh.models import (
    ColumnDataSource,
    CustomJS,
    NumericInput,
    Range1d,
    Select,
    Slider,
    Span,
    TapTool,
)

from bhlog.analysis.figures.style import CYCLE, GREY, MAIN, NATIVE, REFERENCE
from bhlog.analysis.report.look import WIDGETS, frame, hover, legend_below
from bhlog.analysis.report.packed import Named, bounds_of

STEPS = 100  # of alpha's slider, a tenfold


def explorer_models(profiles: Sequence[Named]) -> dict[str, Any]:
    """The widgets and plots of the explorer by name; the script beside this file moves them.

    Args:
        profiles: at least one.
    """
    return {**_widgets(profiles), **_plots(profiles)}


def _widgets(profiles: Sequence[Named]) -> dict[str, Any]:
    first, E = profiles[0].profile, max(named.profile.n_experts for named in profiles)
    layers = [("all", "all layers"), *((str(i), f"layer {i}") for i in first.layers)]
    lowest = min(float(named.profile.alphas[0]) for named in profiles)
    names = [(str(i), named.name) for i, named in enumerate(profiles)]
    last = len(bounds_of(E)) - 1
    widgets = {
        "alpha": Slider(
            title="alpha",
            start=ceil(log10(lowest) * STEPS) / STEPS,
            end=0,
            step=1 / STEPS,
            value=-1.3,
            show_value=False,
            tooltips=False,
        ),
        "min_k": _bound("min_k", last, 1),
        "max_k": _bound("max_k", last, last),
        "exact_alpha": NumericInput(title="alpha, typed", mode="float", low=0, high=1),
        "target": NumericInput(title="experts a token, to find alpha", mode="float", low=0, high=E),
        "profile": Select(title="run and null model", options=names, value="0"),
        "layer": Select(title="layers", options=layers, value="all"),
    }
    return {name: _moves(name, widget) for name, widget in widgets.items()}


def _bound(title: str, last: int, value: int) -> Slider:
    """A slider over the places of bounds; the page says above it where it is."""
    return Slider(
        title=title, start=0, end=last, step=1, value=value, show_value=False, tooltips=False
    )


def _plots(profiles: Sequence[Named]) -> dict[str, Any]:
    first = profiles[0].profile
    lowest, E = float(first.alphas[0]), first.n_experts
    curve = frame(
        name="curve", x="alpha", y="mean experts a token", x_axis_type="log",
        x_range=Range1d(lowest, 1), y_range=Range1d(0, E),
    )  # fmt: skip
    for i, named in enumerate(profiles):
        source = ColumnDataSource({"alpha": [], "experts": []}, name=f"curve_{i}")
        line = curve.line(
            "alpha", "experts", source=source, line_width=2.5, color=CYCLE[i % 6],
            legend_label=named.name,
        )  # fmt: skip
        hover(curve, ("alpha", "@alpha{0.0000}"), ("experts", "@experts{0.000}"),
              mode="vline", renderers=[line])  # fmt: skip
    noise = ColumnDataSource({"alpha": [], "experts": []}, name="noise")
    curve.line("alpha", "experts", source=noise, color=GREY, line_dash="dashed",
               line_width=1.5, legend_label="shuffled logits")  # fmt: skip
    top_k = profiles[0].top_k
    curve.line([lowest, 1], [top_k, top_k], color=NATIVE, line_dash="dashdot", line_width=1.5,
               legend_label=f"native top-{top_k}")  # fmt: skip
    here = ColumnDataSource({"alpha": [], "experts": []}, name="here")
    curve.scatter("alpha", "experts", source=here, size=13, color=REFERENCE, line_color="white",
                  line_width=2)  # fmt: skip
    curve.add_layout(Span(name="at_alpha", location=0.05, dimension="height",
                          line_color=REFERENCE, line_width=1, line_dash="dotted"))  # fmt: skip
    legend_below(curve)

    layers = [str(layer) for layer in first.layers]
    by_layer = frame(
        name="by_layer", x="layer", y="mean experts a token",
        x_range=Range1d(-0.6, len(layers) - 0.4), y_range=Range1d(0, E), tools="tap",
    )  # fmt: skip
    means = ColumnDataSource({"place": [], "layer": [], "experts": []}, name="means")
    bars = by_layer.vbar("place", 0.86, "experts", source=means, color=MAIN, line_color=None,
                         nonselection_fill_alpha=0.35)  # fmt: skip
    by_layer.add_layout(Span(location=top_k, dimension="width", line_color=NATIVE,
                             line_dash="dashdot", line_width=1.5))  # fmt: skip
    by_layer.add_layout(Span(name="overall", location=0, dimension="width",
                             line_color=REFERENCE, line_dash="dashed", line_width=1.5))  # fmt: skip
    step = -(-len(layers) // 8)
    by_layer.xaxis.ticker = list(range(0, len(layers), step))
    by_layer.xaxis.major_label_overrides = dict(enumerate(layers))
    by_layer.xgrid.grid_line_color = None
    hover(by_layer, ("layer", "@layer"), ("experts", "@experts{0.000}"), renderers=[bars])
    by_layer.select_one(TapTool).renderers = [bars]
    means.selected.js_on_change("indices", CustomJS(code="bhlog.tapped(cb_obj.indices)"))

    histogram = frame(
        name="histogram", x="experts a token, n_selected", y="% of rows",
        x_range=Range1d(-0.5, E + 0.5), y_range=Range1d(0, 100),
    )  # fmt: skip
    shares = ColumnDataSource({"left": [], "right": [], "share": [], "k": []}, name="shares")
    blocks = histogram.quad(left="left", right="right", bottom=0, top="share", source=shares,
                            color=MAIN, line_color=None)  # fmt: skip
    histogram.add_layout(Span(name="mean", location=0, dimension="height", line_color=REFERENCE,
                              line_dash="dashed", line_width=1.5))  # fmt: skip
    histogram.xgrid.grid_line_color = None
    hover(histogram, ("experts", "@k"), ("rows", "@share{0.00} %"), renderers=[blocks])
    return {"curve": curve, "by_layer": by_layer, "histogram": histogram}


def _moves(name: str, widget: Any) -> Any:
    """A widget that tells the page's script what it became."""
    widget.update(name=name, stylesheets=[WIDGETS], sizing_mode="stretch_width", margin=0)
    widget.js_on_change("value", CustomJS(code=f"bhlog.moved('{name}', cb_obj.value)"))
    return widget
