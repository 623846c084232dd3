"""Calibration by layer: how far p-values are from uniform."""

from typing import Any

from bokeh.models import Range1d

from bhlog.analysis.figures.style import MAIN, NATIVE, REFERENCE
from bhlog.analysis.report.look import frame, hover, legend_below
from bhlog.analysis.report.markup import Drawn, Listed, Panel
from bhlog.analysis.report.mind import WORST_KS
from bhlog.analysis.report.subject import Subject, quoted


def calibration(subject: Subject) -> Panel | None:
    """KS distances and shares of small p-values, a place a layer."""
    checks = subject.checks
    if checks is None or subject.null is None:
        return None
    run, layers = subject.run, [str(layer) for layer in checks["layer"]]
    places = list(range(len(layers)))
    plot = _plot("ks", "KS distance from uniform", layers)
    bars = plot.vbar(places, 0.8, checks["ks"], color=MAIN, line_color=None)
    hover(plot, ("KS", "@top{0.0000}"), renderers=[bars])
    most = max(float(checks["ks"].max() or 0), WORST_KS)  # type: ignore[arg-type]
    plot.y_range = Range1d(0, 1.15 * most)
    plot.line([-0.5, len(layers) - 0.5], [WORST_KS] * 2, color=REFERENCE, line_dash="dashed")
    small = _plot("small", "share, over the level", layers)
    for level, color in ((0.05, MAIN), (0.01, REFERENCE), (0.001, NATIVE)):
        shares = checks[f"p_{level}"] / level
        small.line(places, shares, color=color, line_width=2, legend_label=f"p ≤ {level:g}")
        dots = small.scatter(places, shares, color=color, size=6, legend_label=f"p ≤ {level:g}")
        hover(small, (f"share at most {level:g}", "@y{0.00} x"), renderers=[dots])
    small.line([-0.5, len(layers) - 0.5], [1, 1], color="#777777", line_dash="dashed")
    legend_below(small)
    name = quoted(subject.null[0] or f"{run.path}/kde.parquet")
    return Panel(
        "calibration",
        "Calibration by layer",
        "P-values of the logits that the null is of should be uniform: then a share alpha of them "
        "is at most alpha. The first plot says how far they are from it, the second how many "
        "small ones there are (1: as many as there should be).",
        drawn=(
            Drawn("Distance from uniform", plot, f"dashed: {WORST_KS:g}"),
            Drawn("Small p-values", small, "dashed: as many as there should be"),
        ),
        listed=(Listed("Calibration by layer", checks),),
        commands=(f"bhlog kde check {name} {quoted(run.path)}",),
    )


def _plot(name: str, y: str, layers: list[str]) -> Any:
    plot = frame(name=name, x="layer", y=y, x_range=Range1d(-0.6, len(layers) - 0.4))
    plot.xaxis.ticker = list(range(0, len(layers), -(-len(layers) // 8)))
    plot.xaxis.major_label_overrides = dict(enumerate(layers))
    plot.xgrid.grid_line_color = None
    return plot
