"""Which experts: their load, which go together, which serve one source more than another."""

from collections.abc import Sequence
from functools import partial
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.cache.hits import CACHES
from bhlog.analysis.figures.gallery.caches import cached_phases
from bhlog.analysis.figures.gallery.experts import load_of_experts
from bhlog.analysis.figures.gallery.sources import load_of_sources
from bhlog.analysis.figures.run_data import RunData
from bhlog.analysis.figures.style import CYCLE
from bhlog.analysis.fold import Scope, fold
from bhlog.analysis.log import Log, layer_of
from bhlog.analysis.report.heat import layer_map, pair_map
from bhlog.analysis.report.markup import Drawn, Listed, Panel
from bhlog.analysis.report.reruns import by_layer
from bhlog.analysis.report.subject import Subject, quoted
from bhlog.capture.contract.arrays import values_of

MOST_PAIRS = 300_000  # cells of the maps of pairs, over the layers shown
MOST_ROWS = 400_000  # read for pairs; a sample of larger runs
FEWEST = 10  # tokens that select a pair before its lift is shown


class Pairs:
    """Counts of pairs of experts that rows selected together.

    Attributes:
        rows: by layer, rows.
        together: by layer, (E, E) int64; an expert with itself is its own count.
    """

    COLUMNS = ("layer", "experts")

    def __init__(self, n_experts: int) -> None:
        self._n = n_experts
        self.rows: dict[int, int] = {}
        self.together: dict[int, NDArray[np.int64]] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        layer, lists = layer_of(batch), batch.column("experts")
        chosen = np.zeros((batch.num_rows, self._n), dtype=np.float32)
        lengths = np.diff(values_of(lists.offsets))
        chosen[np.repeat(np.arange(batch.num_rows), lengths), values_of(lists.flatten())] = 1
        found = (chosen.T @ chosen).astype(np.int64)  # float32 counts a piece's rows exactly
        self.rows[layer] = self.rows.get(layer, 0) + batch.num_rows
        self.together[layer] = self.together.get(layer, np.int64(0)) + found

    def merge(self, other: Self) -> None:
        for layer, found in other.together.items():
            self.rows[layer] = self.rows.get(layer, 0) + other.rows[layer]
            self.together[layer] = self.together.get(layer, np.int64(0)) + found

    def lift(self, layer: int) -> NDArray[np.float64]:
        """(E, E) N(a, b) T / (N(a) N(b)): 1 for independent experts; 0 on the diagonal and where
        too few tokens select both."""
        together = self.together[layer].astype(np.float64)
        alone = np.maximum(np.diag(together), 1)
        lift = together * self.rows[layer] / np.outer(alone, alone)
        lift[together < FEWEST] = 0
        np.fill_diagonal(lift, 0)
        return np.asarray(lift)


def pairs_of(log: Log, layers: Sequence[int], sample: float) -> Pairs:
    """Count pairs in one pass."""
    scope = Scope(layers=layers, sample=sample)
    return fold(log, partial(Pairs, log.n_experts), Pairs.COLUMNS, scope)


def load(subject: Subject) -> Panel:
    """Load of experts, and pairs of them."""
    run = subject.run
    numbers = load_of_experts(RunData(run))
    share = 100 * numbers.frame["share"].to_numpy().reshape(len(run.layers), -1)
    even = 100 * numbers.facts["even"]
    most = max(1, min(len(run.layers), MOST_PAIRS // run.n_experts**2))
    chosen = [run.layers[i] for i in np.unique(np.linspace(0, len(run.layers) - 1, most).round()
                                               .astype(int))]  # fmt: skip
    rows = max(1, run.manifest.totals.rows)
    pairs = pairs_of(run, chosen, min(1.0, MOST_ROWS / rows))
    lifts = {layer: pairs.lift(layer) for layer in chosen if layer in pairs.together}
    if len(chosen) < len(run.layers):
        shown = f"layers {', '.join(map(str, chosen))}"
    else:
        shown = "a layer at a time"
    return Panel(
        "load",
        "Expert load and co-activation",
        f"How often {run.name} selected each expert, and which experts go together. An even share "
        f"of the load is {even:.3g} % of a layer's tokens. Lift is 1 for experts that are "
        "selected independently of each other.",
        drawn=(
            Drawn("% of the layer's tokens that use an expert",
                  layer_map("load", share, run.layers, value="% of tokens")),
            Drawn("Lift of pairs", pair_map("pairs", lifts, value="lift"), shown),
        ),
        listed=(
            Listed("Load of experts", numbers.frame.sort("share", descending=True)),
            Listed("Pairs that go together most", _top_pairs(pairs, lifts)),
        ),
        commands=(
            f"bhlog sql {quoted(run.path)} --query expert_load",
            f"bhlog sql {quoted(run.path)} --query coactivation",
        ),
    )  # fmt: skip


def _top_pairs(pairs: Pairs, lifts: dict[int, NDArray[np.float64]], most: int = 5) -> pl.DataFrame:
    rows = []
    for layer, lift in lifts.items():
        upper = np.triu(lift, 1)
        for flat in np.argsort(-upper, axis=None, kind="stable")[:most]:
            first, second = divmod(int(flat), lift.shape[1])
            tokens = int(pairs.together[layer][first, second])
            if upper[first, second]:
                rows.append((layer, first, second, tokens, float(upper[first, second])))
    return pl.DataFrame(rows, schema=["layer", "first", "second", "tokens", "lift"], orient="row")


def sources(subject: Subject) -> Panel:
    """Experts that serve one source more than another."""
    run = subject.run
    numbers = load_of_sources(RunData(run))
    frame = numbers.frame
    points = 100 * frame["difference"].to_numpy().reshape(len(run.layers), -1)
    plot = layer_map("sources", points, run.layers, value="percentage points", diverging=True)
    by_size = frame.sort(pl.col("difference").abs(), descending=True)
    return Panel(
        "sources",
        "Sources against experts",
        f"{numbers.title}. Orange and violet: experts that prefer one of the two.",
        drawn=(Drawn("Difference in percentage points", plot),),
        listed=(Listed("Experts by how far they prefer a source", by_size),),
        commands=(f"bhlog sql {quoted(run.path)} --query experts_by_source",),
    )


def resident(subject: Subject) -> Panel:
    """Hit rates of caches that hold some of the experts."""
    run, x = subject.run, "resident experts a layer"
    frame = cached_phases(RunData(run)).frame.with_columns(pl.col("resident").cast(pl.Int64))
    colors = dict(zip(CACHES, CYCLE, strict=False))
    drawn = []
    for (phase,), part in frame.group_by("panel", maintain_order=True):
        rates = part.pivot("cache", index="resident", values="hit_rate").rename({"resident": x})
        plot = by_layer(f"caches-{phase}", rates, colors, most=1, x=x)
        drawn.append(Drawn(f"Hit rate, {phase}", plot))
    budgets = " ".join(f"--budget {n}" for n in frame["resident"].unique(maintain_order=True))
    return Panel(
        "caches",
        "How many experts must be resident?",
        "The share of the experts a forward needs that a cache of each layer has at hand: lru and "
        "lfu start empty, pinned holds the most used, belady is the best that any can do.",
        drawn=tuple(drawn),
        listed=(Listed("Hit rates by budget", frame),),
        commands=(f"bhlog cache {quoted(run.path)} {budgets}",),
    )
