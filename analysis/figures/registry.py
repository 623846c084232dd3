"""The registry of figures: the name of each, what it shows, where its numbers are from, its plot.

A figure is a function of the numbers and an Axes, and a function that gathers the numbers:

    def selected(run: RunData) -> Numbers: ...

    @figure("experts_histogram", shows="experts selected per row", data=selected)
    def plot_experts_histogram(axes: Axes, frame: pl.DataFrame, *, mean: float) -> Axes: ...

The decorator does the rest, in a file of `gallery` or in a user's own: `bhlog plot` and
draw_figures know the figure by its name.
"""

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal, TypeVar

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from bhlog.capture.contract.errors import InvalidOption

Subject = Literal["run", "check", "tails", "policies", "scores", "caches"]

_PACKAGE = "bhlog.analysis.figures.gallery"


@dataclass(frozen=True, eq=False)
class Numbers:
    """The numbers behind a figure: all that drawing it needs.

    Attributes:
        title: what they are, in a few words.
        about: of what run, model, null model and alpha, in words; see bhlog.analysis.figures.about.
        frame: the numbers, tidy: no lists, a row for each mark.
        facts: single values, such as alpha or a mean: the keyword arguments of the plot.
    """

    title: str
    about: tuple[str, ...]
    frame: pl.DataFrame
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FigureKind:
    """A registered figure.

    Attributes:
        name: in commands and file names.
        shows: in words, for listings.
        needs: what its subject must have, in words; "" if any will do.
        of: what it is a figure of. The subject decides what `data` gets: "run" a RunData, "check"
            a Checked, "tails" a Tails, "policies" a Compared, "scores" a Scored, "caches" a Cached.
        data: gathers the numbers; raises InvalidOption or KdeMismatch where the subject lacks what
            is needed.
        plot: draws them: gets an Axes, the frame (or a panel's part of it) and the facts, returns
            the Axes; reads, saves and shows nothing.
        size: of the page in inches, width and height.
        panel: column of the frame that has a value for each panel; None draws one panel.
        columns: panels side by side.
        shared: whether panels share their axes; then there is one a layer, and the page grows with
            their number.
    """

    name: str
    shows: str
    needs: str
    of: Subject
    data: Callable[[Any], Numbers]
    plot: Callable[..., Axes]
    size: tuple[float, float]
    panel: str | None
    columns: int
    shared: bool


_registered: dict[str, FigureKind] = {}

Plot = TypeVar("Plot", bound=Callable[..., Axes])


def figure(
    name: str,
    *,
    shows: str,
    data: Callable[[Any], Numbers],
    needs: str = "",
    of: Subject = "run",
    size: tuple[float, float] = (7, 4.5),
    panel: str | None = None,
    columns: int = 1,
    shared: bool = False,
) -> Callable[[Plot], Plot]:
    """Register a plot as a figure; arguments are the attributes of FigureKind.

    Raises:
        InvalidOption: another function has registered the name.
    """

    def register(plot: Plot) -> Plot:
        old = _registered.get(name)
        if old is not None and _origin(old.plot) != _origin(plot):
            raise InvalidOption(
                f"figure '{name}' of {plot.__module__}: {old.plot.__module__} has a figure of that "
                "name; choose another"
            )
        _registered[name] = FigureKind(
            name, shows, needs, of, data, plot, size, panel, columns, shared
        )
        return plot

    return register


def figures(of: Subject = "run") -> dict[str, FigureKind]:
    """Figures of a subject by name: those in the files of `gallery`, then those of users."""
    for entry in pkgutil.iter_modules(import_module(_PACKAGE).__path__):
        import_module(f"{_PACKAGE}.{entry.name}")
    found = [kind for kind in _registered.values() if kind.of == of]
    found.sort(key=_shelf)
    return {kind.name: kind for kind in found}


def _shelf(kind: FigureKind) -> tuple[bool, str]:
    """Files in their order, whichever was imported first; users' figures as they came."""
    module = kind.plot.__module__
    ours = module.startswith(_PACKAGE)
    return not ours, module if ours else ""


def find_figure(name: str, of: Subject = "run") -> FigureKind:
    """The figure of that name.

    Raises:
        InvalidOption: there is none.
    """
    known = figures(of)
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"figures: {', '.join(known)}"
        raise InvalidOption(f"no figure '{name}'; {hint}")
    return known[name]


def _origin(plot: Callable[..., Axes]) -> tuple[str, str]:
    return plot.__module__, plot.__qualname__


def tidy(**columns: ArrayLike) -> pl.DataFrame:
    """A frame of arrays that broadcast to one shape, a row for each of its places."""
    arrays = np.broadcast_arrays(*(np.asarray(values) for values in columns.values()))
    return pl.DataFrame({name: array.ravel() for name, array in zip(columns, arrays, strict=True)})
