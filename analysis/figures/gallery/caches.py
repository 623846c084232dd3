"""Hit rates of caches of experts: how many must be resident?"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
from matplotlib.axes import Axes

from bhlog.analysis.cache.hits import CACHES, Budget, replay_caches
from bhlog.analysis.figures.registry import Numbers, figure
from bhlog.analysis.figures.run_data import RunData
from bhlog.analysis.figures.style import CYCLE, GREY
from bhlog.analysis.fold import WHOLE
from bhlog.analysis.replay.empirical import missing_rows
from bhlog.capture.contract.errors import InvalidOption

EXPERTS, MIB = "resident experts a layer", "resident MiB over all layers"
PHASES = {"prefill_hit_rate": "prompts", "decode_hit_rate": "decoding"}


@dataclass(frozen=True, eq=False)
class Cached:
    """Caches that were replayed.

    Attributes:
        table: of bhlog.analysis.cache.hits.replay_caches.
        about: the run, and what decided.
        n_experts: of a layer.
    """

    table: pl.DataFrame
    about: tuple[str, ...]
    n_experts: int


def cached(of: Cached) -> Numbers:
    """Hit rate by policy, cache and budget.

    Raises:
        InvalidOption: see require_one_axis.
    """
    shared = require_one_axis(of.table["budget"])
    unit = 2.0**20 if shared else 1.0
    sizes = [Budget.of(text).size / unit for text in of.table["budget"]]
    frame = of.table.select(
        pl.col("policy").alias("panel"), "cache", pl.Series("resident", sizes), "hit_rate"
    )
    facts = {"n_experts": None if shared else of.n_experts}
    return Numbers("Hit rates of expert caches", of.about, frame, facts)


def require_one_axis(budgets: Iterable[str]) -> bool:
    """Whether budgets are bytes.

    Raises:
        InvalidOption: some are bytes, some are experts.
    """
    shared = {Budget.of(text).shared for text in budgets}
    if len(shared) > 1:
        raise InvalidOption("a figure has one axis of budgets: give experts a layer, or sizes")
    return True in shared


def cached_phases(run: RunData) -> Numbers:
    """Hit rate by phase, cache and resident experts of a layer, under the experts as logged."""
    log, E = run.log, run.log.n_experts
    if missing := missing_rows(log, WHOLE):
        raise InvalidOption(f"{log.path}: caches see whole forwards, but {missing}")
    table = replay_caches(log, [*(2**i for i in range(int(np.log2(E - 0.5)) + 1)), E])
    frame = (
        table.unpivot([*PHASES], index=["budget", "cache"], variable_name="panel")
        .drop_nulls("value")
        .select(
            pl.col("panel").replace_strict(PHASES),
            "cache",
            resident=pl.col("budget").cast(pl.Float64),
            hit_rate="value",
        )
    )
    return Numbers("Hit rates of expert caches", run.logged_about, frame, {"n_experts": E})


@figure(
    "cache",
    shows="hit rates of caches of experts, by how many are resident",
    needs="whole forwards",
    data=cached_phases,
    size=(9, 4.5),
    panel="panel",
    columns=2,
)
@figure(
    "caches",
    shows="hit rates of caches of experts, a panel a policy",
    of="caches",
    data=cached,
    size=(11, 4.5),
    panel="panel",
    columns=3,
)
def plot_caches(axes: Axes, frame: pl.DataFrame, *, n_experts: int | None) -> Axes:
    """Hit rate against what is resident, a line a cache.

    Args:
        frame: panel (its title), cache, resident, hit_rate.
        n_experts: of a layer, where `resident` counts experts of a layer; None: it is MiB.
    """
    for color, name in zip(CYCLE, CACHES, strict=False):
        line = frame.filter(pl.col("cache") == name).sort("resident")
        axes.plot(line["resident"], line["hit_rate"], "o-", color=color, ms=4, label=name)
    if n_experts is not None:
        share = np.linspace(frame["resident"].min(), n_experts, 100)  # type: ignore[arg-type]
        axes.plot(share, share / n_experts, ":", color=GREY, label="resident / experts")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda place, _: f"{place:g}")
    xlabel = MIB if n_experts is None else EXPERTS
    axes.set(title=frame["panel"][0], xlabel=xlabel, ylabel="hit rate", ylim=(0, 1.02))
    return axes
