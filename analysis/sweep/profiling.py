"""Profiling: a log counted into a profile, in one pass."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.fold import WHOLE, Scope, fold
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.analysis.nulls import null_model
from bhlog.analysis.replay.settings import bounds_of
from bhlog.analysis.sweep.critical import MOST_ALPHAS, Counted, CriticalAlphas
from bhlog.analysis.sweep.profile import GRID, Profile, rising
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.model import KdeModel


def profile_log(
    log: Log,
    kde: KdeModel | None = None,
    *,
    alphas: Sequence[float] = GRID,
    kept: bool = False,
    scope: Scope = WHOLE,
) -> Profile:
    """Profile of a log under a null model; None takes the run's own.

    Rows without a finite logit are left out: the rule does not decide them.

    Args:
        alphas: the grid.
        kept: whether to count the probability kept too, for probability_kept and alphas_for.
        scope: which rows.

    Raises:
        KdeMismatch: no null model, one for other layers, or one with a curve per expert.
        InvalidOption: alphas are not rising inside (0, 1), there are too many, or the rows are a
            sample.
    """
    if scope.sample < 1:
        raise InvalidOption("a profile counts every row, and its file says so: leave sample out")
    grid = np.asarray(alphas, dtype=np.float64)
    if not rising(grid) or len(grid) > MOST_ALPHAS:
        raise InvalidOption(f"alphas must rise inside (0, 1), at most {MOST_ALPHAS:,} of them")
    model = null_model(log, kde)
    if not model.pooled:
        raise KdeMismatch(
            "a profile needs a null model pooled over experts; this one has a curve per expert, "
            "for which replay answers: bhlog replay RUN --alpha A"
        )
    tables = _Tables(model, grid, log.n_experts)
    total = fold(log, partial(LayerCounts, tables, kept), ("layer", "logits"), scope)
    if not total.layers:
        raise InvalidOption(f"{log.path}: no rows to count{scope.words}")
    found = sorted(total.layers.items())
    return Profile(
        grid,
        {layer: counted.rows for layer, counted in found},
        (log.manifest.run_id,),
        model.sha256,
        scope.where,
        {i: c.kept for i, c in found if c.kept is not None} if kept else None,
        bounds_of(log),
    )


class _Tables:
    """What finds critical alphas, by layer, made when a layer is first asked for."""

    def __init__(self, model: KdeModel, grid: NDArray[np.float64], n_experts: int) -> None:
        self.model, self.grid, self.n_experts = model, grid, n_experts
        self._of: dict[int, CriticalAlphas] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_of": {}}  # soon made again

    def __getitem__(self, layer: int) -> CriticalAlphas:
        if layer not in self._of:
            curve = self.model[layer].curves[0]
            thresholds = curve.threshold_grid(self.grid, self.n_experts)
            self._of[layer] = CriticalAlphas(np.ascontiguousarray(thresholds.T))
        return self._of[layer]


class LayerCounts:
    """Rows by layer, rank and critical alpha: sums of integers, the same in any order.

    Attributes:
        layers: what was counted of each layer.
    """

    def __init__(self, tables: _Tables, kept: bool) -> None:
        self._tables, self._kept = tables, kept
        self.layers: dict[int, Counted] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        layer = layer_of(batch)
        self.layers[layer] = self._tables[layer].count(
            logits_of(batch), weigh=self._kept, into=self.layers.get(layer)
        )

    def merge(self, other: Self) -> None:
        for layer, theirs in other.layers.items():
            mine = self.layers.get(layer)
            self.layers[layer] = theirs if mine is None else mine + theirs
