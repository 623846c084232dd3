"""Experts along a sequence: do tokens late in a text get more of them?"""

from collections.abc import Sequence
from functools import partial
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable

from bhlog.analysis.figures.axes import layer_colorbar, layer_norm, native_line
from bhlog.analysis.figures.registry import Numbers, figure, tidy
from bhlog.analysis.figures.run_data import RunData
from bhlog.analysis.figures.style import BLACK, ORDERED
from bhlog.analysis.fold import fold
from bhlog.analysis.log import layer_of
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.errors import InvalidOption

A_DOUBLING = 4  # places, between a position and twice that; each of the first few has its own
EDGES = np.unique(np.round(2 ** (np.arange(33 * A_DOUBLING) / A_DOUBLING))).astype(np.int64) - 1


class PositionCounts:
    """Rows and the experts they selected, by layer and place along the sequence.

    Attributes:
        rows, experts: (L, P) int64; place i holds positions from EDGES[i] to EDGES[i + 1] - 1.
    """

    COLUMNS = ("layer", "position", "n_selected")

    def __init__(self, layers: Sequence[int]) -> None:
        self._index = {layer: i for i, layer in enumerate(layers)}
        self.rows = np.zeros((len(layers), len(EDGES)), dtype=np.int64)
        self.experts = np.zeros_like(self.rows)

    def update(self, batch: pa.RecordBatch) -> None:
        layer = self._index[layer_of(batch)]
        position = values_of(batch.column("position")).astype(np.int64)
        place = np.searchsorted(EDGES, position, side="right") - 1
        n_selected = values_of(batch.column("n_selected")).astype(np.int64)
        np.add.at(self.rows[layer], place, 1)
        np.add.at(self.experts[layer], place, n_selected)

    def merge(self, other: Self) -> None:
        self.rows += other.rows
        self.experts += other.experts


def experts_of_positions(run: RunData) -> Numbers:
    """Mean experts at each place along the sequence, of each layer and over all (layer null)."""
    layers = run.log.layers
    counts = fold(run.log, partial(PositionCounts, layers), PositionCounts.COLUMNS)
    seen = np.flatnonzero(counts.rows.sum(axis=0))
    if not len(seen):
        raise InvalidOption(f"{run.log.path}: no rows to draw")

    first, last = EDGES[seen], EDGES[seen + 1] - 1
    rows, experts = counts.rows[:, seen], counts.experts[:, seen]
    every, of_every = rows.sum(axis=0), experts.sum(axis=0)
    mean = experts / np.maximum(rows, 1)
    each = tidy(
        layer=np.array(layers)[:, None], first=first, last=last, rows=rows, mean_experts=mean
    )
    overall = tidy(first=first, last=last, rows=every, mean_experts=of_every / every)
    frame = pl.concat([each, overall], how="diagonal").filter(pl.col("rows") > 0)
    facts = {"top_k": run.top_k}
    return Numbers("Experts per token along the sequence", run.logged_about, frame, facts)


@figure(
    "n_selected_by_position",
    shows="experts per token along the sequence",
    data=experts_of_positions,
)
def plot_positions(axes: Axes, frame: pl.DataFrame, *, top_k: int | None = None) -> Axes:
    """Mean experts per token against position: each layer, and all.

    Args:
        frame: layer (null: over all), first (position of each place), mean_experts.
        top_k: experts per token under native routing; None draws none.
    """
    each = frame.drop_nulls("layer")
    norm = layer_norm(each["layer"].to_numpy())
    shade = ScalarMappable(norm, ORDERED)
    for (layer,), line in each.group_by("layer", maintain_order=True):
        axes.plot(1 + line["first"], line["mean_experts"], color=shade.to_rgba(layer), linewidth=1)
    overall = frame.filter(pl.col("layer").is_null())
    axes.plot(
        1 + overall["first"], overall["mean_experts"], color=BLACK, lw=2.5, label="all layers"
    )
    native_line(axes, top_k, upright=False)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda place, _: f"{place:.0f}")
    axes.set(xlabel="position in the sequence, from 1", ylabel="experts per token (n_selected)")
    axes.set_ylim(0, None)
    layer_colorbar(axes, norm)
    axes.legend(loc="lower right")
    return axes
