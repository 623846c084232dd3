"""Two runs of one text: how alike they route, and how far a replay can be trusted."""

from typing import Any

import polars as pl
from bokeh.models import Range1d

from bhlog.analysis.database.connection import connect
from bhlog.analysis.database.question import find_question
from bhlog.analysis.figures.style import GREY, MAIN, REFERENCE
from bhlog.analysis.log import Log
from bhlog.analysis.replay.fidelity import fidelity
from bhlog.analysis.report.look import frame, hover, legend_below
from bhlog.analysis.report.markup import Drawn, Listed, Panel
from bhlog.analysis.report.subject import Subject, quoted


def saturation(subject: Subject) -> Panel | None:
    """Experts that the first run shares with the second."""
    if len(subject.runs) < 2:
        return None
    first, second = subject.runs[:2]
    question = find_question("router_saturation")
    with connect([first, second]) as database:
        question.check(database)
        answer = database.sql(question.text, question.values({})).pl()
    plot = by_layer("saturation", answer, {"saturation": MAIN, "by_chance": GREY}, most=1)
    return Panel(
        "saturation",
        "Saturation between two runs",
        f"The share of the experts of {second.name} that {first.name} selects for the same token.",
        drawn=(Drawn("Shared experts by layer", plot),),
        listed=(Listed("Saturation by layer", answer),),
        commands=(
            f"bhlog sql {quoted(first.path)} {quoted(second.path)} --query router_saturation",
        ),
    )


def trusted(subject: Subject) -> Panel | None:
    """Fidelity of the first native run against the first one that a policy routed."""
    native = _first(subject, routed=False)
    rerun = _first(subject, routed=True)
    if native is None or rerun is None:
        return None
    answer = fidelity(native, rerun)
    colors = {"same_count": MAIN, "same_experts": REFERENCE, "jaccard": GREY}
    plot = by_layer("fidelity", answer, colors, most=1)
    means = by_layer("replayed", answer, {"replayed": MAIN, "actual": REFERENCE})
    return Panel(
        "fidelity",
        "How far a replay can be trusted",
        f"{native.name} replayed at the settings of {rerun.name}, held against what {rerun.name} "
        "did. The first layer is exact; below it, other experts upstream change the logits.",
        drawn=(
            Drawn("Experts a token, replayed and for real", means),
            Drawn("Tokens that agree", plot),
        ),
        listed=(Listed("Fidelity by layer", answer, shown=True),),
        commands=(f"bhlog fidelity {quoted(native.path)} {quoted(rerun.path)}",),
    )


def _first(subject: Subject, *, routed: bool) -> Log | None:
    return next((r for r in subject.runs if (r.manifest.routing.kind != "native") == routed), None)


def by_layer(
    name: str,
    answer: pl.DataFrame,
    colors: dict[str, str],
    most: float | None = None,
    x: str = "layer",
) -> Any:
    """A line for each column, layers to the right, or what the column x counts."""
    layers = [str(layer) for layer in answer[x]]
    places = list(range(len(layers)))
    plot = frame(name=name, x=x, y="share" if most else "mean experts a token",
                 x_range=Range1d(-0.4, len(layers) - 0.6))  # fmt: skip
    top = most or 1.1 * max(float(answer[column].max() or 0) for column in colors)  # type: ignore[arg-type]
    plot.y_range = Range1d(0, 1.03 * top)
    plot.xaxis.ticker = list(range(0, len(layers), -(-len(layers) // 8)))
    plot.xaxis.major_label_overrides = dict(enumerate(layers))
    for column, color in colors.items():
        label = column.replace("_", " ")
        plot.line(places, answer[column], color=color, line_width=2.5, legend_label=label)
        dots = plot.scatter(places, answer[column], color=color, size=8, legend_label=label)
        hover(plot, (label, "@y{0.000}"), renderers=[dots])
    legend_below(plot)
    return plot
