"""Profiling: a log counted into a profile, in one pass."""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.fold import WHOLE, Scope, fold
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.analysis.noise import COLUMNS, Noise, last_hash
from bhlog.analysis.nulls import null_model
from bhlog.analysis.replay.settings import bounds_of
from bhlog.analysis.sweep.critical import MOST_ALPHAS, Counted, CriticalAlphas, table_bytes
from bhlog.analysis.sweep.grid import grid_for, rising
from bhlog.analysis.sweep.profile import Profile
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.model import KdeModel

MOST_TABLE_BYTES = 1 << 28  # of the tables that are kept


def profile_log(
    log: Log,
    kde: KdeModel | None = None,
    *,
    alphas: Sequence[float] | None = None,
    kept: bool = False,
    scope: Scope = WHOLE,
) -> Profile:
    """Profile of a log under a null model; None takes the run's own.

    Rows without a finite logit are left out: the rule does not decide them.

    Args:
        alphas: the grid; None is grid_for the shape of the log.
        kept: whether to count the probability kept too, for probability_kept and alphas_for.
        scope: which rows.

    Raises:
        KdeMismatch: no null model, one for other layers, or one with a curve per expert.
        InvalidOption: alphas are not rising inside (0, 1), there are too many, or the rows are a
            sample.
    """
    if scope.sample < 1:
        raise InvalidOption("a profile counts every row, and its file says so: leave sample out")
    if alphas is None:
        alphas = grid_for(len(log.check_layers(scope.layers)), log.n_experts)
    grid = np.asarray(alphas, dtype=np.float64)
    if not rising(grid) or len(grid) > MOST_ALPHAS:
        raise InvalidOption(f"alphas must rise inside (0, 1), at most {MOST_ALPHAS:,} of them")
    model = null_model(log, kde)
    if not model.pooled:
        raise KdeMismatch(
            "a profile needs a null model pooled over experts; this one has a curve per expert, "
            "for which replay answers: bhlog replay RUN --alpha A"
        )
    tables = Tables(model, grid, log.n_experts)
    noise = partial(Noise, log.n_experts, last_hash(log, scope.where))
    make = partial(LayerCounts, tables, kept, noise, Shared())
    folded = fold(log, make, ("layer", "logits", *COLUMNS), scope, exact=True)
    layers = folded.layers
    if not layers:
        raise InvalidOption(f"{log.path}: no rows to count{scope.words}")
    return Profile(
        grid,
        {layer: counted.rows for layer, counted in layers.items()},
        (log.manifest.run_id,),
        model.sha256,
        scope.where,
        {i: c.kept for i, c in layers.items() if c.kept is not None} if kept else None,
        bounds_of(log),
        {
            layer: tables[layer]
            .count(model[layer].tested(folded.noise.layers[layer].shuffled(layer)), weigh=False)
            .rows
            for layer in layers
        },
    )


class Tables:
    """What finds critical alphas, by layer, made when a layer is asked for.

    Those of the first layers are kept, in MOST_TABLE_BYTES; the others are made again, since a log
    that goes through its layers in turn would push each out before it is asked for again.
    """

    def __init__(self, model: KdeModel, grid: NDArray[np.float64], n_experts: int) -> None:
        self.model, self.grid, self.n_experts = model, grid, n_experts
        self._of: dict[int, CriticalAlphas] = {}
        self._most = max(1, MOST_TABLE_BYTES // table_bytes(n_experts, len(grid)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_of": {}}  # soon made again

    def __getitem__(self, layer: int) -> CriticalAlphas:
        found = self._of.get(layer)
        if found is None:
            curve = self.model[layer].curves[0]
            found = CriticalAlphas.under(curve, self.grid, self.n_experts)
            if len(self._of) < self._most:
                self._of[layer] = found
        return found


class Shared:
    """What the threads of one process have counted of layers that they are done with.

    A profile of one layer takes megabytes, and threads that each held all layers would take as much
    again for every core. Another process shares nothing with this one: there it is None.
    """

    def __init__(self) -> None:
        self.layers: dict[int, Counted] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def add(self, layer: int, counted: Counted) -> None:
        with self._lock:
            before = self.layers.get(layer)
            self.layers[layer] = counted if before is None else before + counted


class LayerCounts:
    """Rows by layer, rank and critical alpha: sums of integers, the same in any order.

    Args:
        tables: what finds critical alphas.
        kept: whether to count the probability kept too.
        noise: makes what samples rows for noise.
        shared: where layers go that are done with; None keeps them.
    """

    def __init__(
        self,
        tables: Tables,
        kept: bool,
        noise: Callable[[], Noise],
        shared: Shared | None = None,
    ) -> None:
        self._tables, self._kept, self._shared = tables, kept, shared
        self._own: dict[int, Counted] = {}
        self.noise = noise()
        self._table: tuple[int, CriticalAlphas] | None = None  # of the layer at hand

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}

    @property
    def layers(self) -> dict[int, Counted]:
        """What was counted of each layer, rising, here and by whoever shares."""
        self._hand_over()
        layers = self._own if self._shared is None else self._shared.layers
        return dict(sorted(layers.items()))

    def update(self, batch: pa.RecordBatch) -> None:
        layer = layer_of(batch)
        if layer not in self._own:
            self._hand_over()
        if self._table is None or self._table[0] != layer:
            self._table = layer, self._tables[layer]
        self.noise.update(batch)
        tested = self._tables.model[layer].tested(logits_of(batch))
        into = self._own.get(layer)
        self._own[layer] = self._table[1].count(tested, weigh=self._kept, into=into)

    def merge(self, other: Self) -> None:
        for layer, counted in other._own.items():
            before = self._own.get(layer)
            self._own[layer] = counted if before is None else before + counted
        self.noise.merge(other.noise)
        self._hand_over()

    def _hand_over(self) -> None:
        if self._shared is not None:
            for layer, counted in self._own.items():
                self._shared.add(layer, counted)
            self._own = {}
