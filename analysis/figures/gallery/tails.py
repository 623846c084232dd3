"""Tails of null models."""

from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from bhlog.analysis.figures.about import null_words, short
from bhlog.analysis.figures.axes import level_lines, thinned
from bhlog.analysis.figures.registry import Numbers, figure, tidy
from bhlog.analysis.figures.style import MAIN, REFERENCE, SMALLEST_P
from bhlog.capture.contract.null.model import KdeModel

MOST_OF_AN_EXPERT = 100  # points of one curve of many


@dataclass(frozen=True, eq=False)
class Tails:
    """One null model, or two to compare.

    Attributes:
        models: with their names, which may be the same.
        about: the run and the model they are held against, if any.
        alpha: BH level whose first and last thresholds are drawn; None draws none.
        n_experts: experts per router, for them; None takes what the first model was fitted for.
    """

    models: tuple[tuple[str, KdeModel], ...]
    about: tuple[str, ...] = ()
    alpha: float | None = None
    n_experts: int | None = None


def points_of_tails(tails: Tails) -> Numbers:
    """Points of the tails on the layers that all models have."""
    names = [PurePath(name).name for name, _ in tails.models]
    if len(set(names)) < len(names):
        names = [f"{side}: {name}" for side, (name, _) in zip("ab", tails.models, strict=False)]
    layers = sorted(set.intersection(*(set(model) for _, model in tails.models)))
    parts = []
    for layer in layers:
        for number, (_, model) in enumerate(tails.models):
            curves = model[layer].curves
            for curve in curves:
                shown = curve.tail >= SMALLEST_P / 10
                most = 600 if len(curves) == 1 else MOST_OF_AN_EXPERT
                x, tail = thinned(curve.grid[shown], curve.tail[shown], most=most)
                name, expert = short(names[number], 32), pl.lit(curve.expert, pl.Int64)
                part = tidy(layer=layer, number=number, model=name, x=x, tail=tail)
                parts.append(part.with_columns(expert=expert))
    several = len(tails.models) > 1
    nulls = [null_words(model, n) for n, (_, model) in zip(names, tails.models, strict=True)]
    about = [*tails.about, *nulls]
    facts = {}
    n_experts = tails.n_experts or tails.models[0][1].n_experts
    if tails.alpha is not None:
        about.append(f"alpha {tails.alpha:g}")
        if n_experts is not None:
            facts = {"alpha": tails.alpha, "n_experts": n_experts}
    title = "Tails of two null models" if several else "Tails of the null model"
    return Numbers(title, tuple(about), pl.concat(parts), facts)


@figure(
    "tails",
    shows="tails of one null model or two, a panel a layer",
    of="tails",
    data=points_of_tails,
    panel="layer",
    shared=True,
)
def plot_tail(
    axes: Axes, frame: pl.DataFrame, *, alpha: float | None = None, n_experts: int | None = None
) -> Axes:
    """Tails of one layer on a logarithmic axis: of each model one line, or one per expert.

    A second model is drawn thin and dashed over the first, which shows where they agree.

    Args:
        frame: number of the model, model, expert (null: pooled), x, tail.
        alpha, n_experts: mark p = alpha / E and p = alpha, the first and the last rank's; None
            marks none.
    """
    for (number,), model in frame.group_by("number", maintain_order=True):
        curves = model.partition_by("expert", maintain_order=True)
        many = len(curves) > 1
        look = ("-", 2.6, MAIN) if number == 0 else ((0, (3, 1.5)), 1.3, REFERENCE)
        for i, curve in enumerate(curves):
            axes.plot(
                curve["x"],
                curve["tail"],
                color=look[2],
                linestyle=look[0],
                linewidth=0.5 if many else look[1],
                alpha=0.35 if many else 1.0,
                label=None if i else curve["model"][0],
            )
    level_lines(axes, alpha, n_experts)
    axes.set_yscale("log")
    axes.set_ylim(SMALLEST_P, 1.5)
    axes.set_yticks(10.0 ** np.arange(-8, 1, 4))
    axes.set(xlabel="logit x", ylabel="S(x) = P(logit > x)")
    return axes
