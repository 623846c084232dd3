"""Sources against experts."""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from numpy.typing import NDArray

from bhlog.analysis.figures.about import short
from bhlog.analysis.figures.axes import draw_layers_by, figure_of
from bhlog.analysis.figures.load import source_load
from bhlog.analysis.figures.registry import Numbers, figure, tidy
from bhlog.analysis.figures.run_data import RunData
from bhlog.analysis.figures.style import DIVERGING
from bhlog.capture.contract.errors import InvalidOption


def load_of_sources(run: RunData) -> Numbers:
    """How often the two sources with most tokens select each expert, and how they differ."""
    load = source_load(run.log)
    if load is None:
        raise InvalidOption(f"{run.log.path}: its tokens come from fewer than two sources")
    first, second = (short(name, 30) for name in load.names)
    frame = tidy(
        layer=np.array(run.log.layers)[:, None],
        expert=np.arange(run.log.n_experts),
        first=load.share[0],
        second=load.share[1],
        difference=load.share[0] - load.share[1],
    )
    title = f"Share of tokens that use an expert: {first} less {second}"
    if load.n_sources > 2:
        title += f", the 2 sources with most tokens of {load.n_sources:,}"
    return Numbers(title, run.logged_about, frame)


@figure(
    "sources",
    shows="experts that one source selects more than another",
    needs="two sources",
    data=load_of_sources,
    size=(8, 4.8),
)
def plot_source_difference(axes: Axes, frame: pl.DataFrame) -> Axes:
    """Which experts serve one source more than another.

    Args:
        frame: layer, expert, difference of the shares of tokens that use the expert.
    """
    points = frame.with_columns(points=100 * pl.col("difference"))
    most = float(points["points"].abs().max()) or 1.0  # type: ignore[arg-type]
    image = draw_layers_by(
        axes,
        points,
        "points",
        across="expert",
        pick=_farthest,
        picked="the largest",
        cmap=DIVERGING,
        vmin=-most,
        vmax=most,
    )
    figure_of(axes).colorbar(image, ax=axes, label="difference in percentage points")
    return axes


def _farthest(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """The value farthest from 0: a mean would hide differences of both signs."""
    place = np.abs(cells).argmax(axis=-1)
    farthest: NDArray[np.float64] = np.take_along_axis(cells, place[..., None], -1)[..., 0]
    return farthest
