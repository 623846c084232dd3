"""How two null models differ."""

from collections.abc import Sequence
from functools import partial
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.fold import WHOLE, Scope, fold
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.histogram import BIN_WIDTH
from bhlog.capture.contract.null.model import KdeModel, LayerNull, NullCurve, layer_ranges
from bhlog.capture.contract.rule import BhOptions

DRAWN_ROWS = 4096


def compare(
    a: KdeModel,
    b: KdeModel,
    *,
    alpha: float | None = None,
    n_experts: int | None = None,
    log: Log | None = None,
    min_k: int = 0,
    max_k: int | None = None,
    scope: Scope = WHOLE,
) -> pl.DataFrame:
    """How two null models differ, layer by layer, on the layers that both have.

    Columns: layer; ks, the largest |S_a - S_b|; wasserstein, the area between the tails, in
    logits; with alpha, experts_a and experts_b: mean experts per row that BH selects. With curves
    per expert ks and wasserstein are those of the expert that differs most.

    Args:
        alpha: BH level for the mean experts.
        n_experts: experts per router; None takes those of the log, or that a model was fitted for.
        log: rows to decide on. Without one, rows are drawn as if experts were independent, from
            the logits that the first model was fitted from.
        min_k, max_k: bounds on experts per row; the defaults show BH's own count.
        scope: which rows of the log, and how they are read.
    """
    layers = sorted(set(a) & set(b))
    if not layers:
        raise KdeMismatch(
            f"no layer in common: {layer_ranges(a)} in the first, {layer_ranges(b)} in the second"
        )
    rows = []
    for layer in layers:
        pairs = _pairs(a[layer], b[layer])
        differences = [_differences(*pair) for pair in pairs]
        rows.append(
            {
                "layer": layer,
                "ks": max(ks for ks, _ in differences),
                "wasserstein": max(area for _, area in differences),
            }
        )
    frame = pl.DataFrame(rows)
    if alpha is None:
        return frame
    if log is not None:
        log.require_logits()
        layers = sorted(set(layers) & log.check_layers(scope.layers))
        if not layers:
            raise KdeMismatch(f"{log.path} has none of the layers {layer_ranges(a)}")
        n_experts = log.n_experts
    n_experts = n_experts or a.n_experts or b.n_experts
    if n_experts is None:
        raise InvalidOption("mean experts need the number of experts: name a run or n_experts")
    options = BhOptions(alpha=alpha, min_k=min_k, max_k=max_k)
    bounds = options.bounds(n_experts)
    for model in (a, b):
        model.require(layers, n_experts)

    counting = partial(_MeanExperts, (a, b), alpha, n_experts, bounds, layers)
    if log is not None:
        counted = fold(log, counting, ["logits"], scope.but(layers=layers))
    else:
        counted = counting()
        for layer in layers:
            counted.count(layer, _drawn_rows(a[layer], n_experts))
    means = [
        {"layer": layer, "experts_a": float(total[0] / rows), "experts_b": float(total[1] / rows)}
        for layer, (rows, total) in sorted(counted.sums.items())
    ]
    schema = {"layer": pl.Int64, "experts_a": pl.Float64, "experts_b": pl.Float64}
    return frame.join(pl.DataFrame(means, schema), on="layer", how="left", maintain_order="left")


class _MeanExperts:
    """Experts selected under each of several null models, summed by layer."""

    def __init__(
        self,
        models: tuple[KdeModel, ...],
        alpha: float,
        n_experts: int,
        bounds: tuple[int, int],
        layers: Sequence[int],
    ) -> None:
        self.models, self.bounds = models, bounds
        self.thresholds = [
            {layer: model[layer].thresholds(alpha, n_experts) for layer in layers}
            for model in models
        ]
        self.sums: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        self.count(layer_of(batch), logits_of(batch))

    def count(self, layer: int, logits: NDArray[np.float32]) -> None:
        min_k, max_k = self.bounds
        selected = [
            int(
                model[layer]
                .decide(logits, thresholds[layer], min_k=min_k, max_k=max_k)
                .n_selected.sum()
            )
            for model, thresholds in zip(self.models, self.thresholds, strict=True)
        ]
        self._add(layer, len(logits), np.array(selected))

    def merge(self, other: Self) -> None:
        for layer, (rows, total) in other.sums.items():
            self._add(layer, rows, total)

    def _add(self, layer: int, rows: int, total: NDArray[np.int64]) -> None:
        before = self.sums.get(layer, (0, np.zeros_like(total)))
        self.sums[layer] = (before[0] + rows, before[1] + total)


def _pairs(a: LayerNull, b: LayerNull) -> list[tuple[NullCurve, NullCurve]]:
    """Curves to compare: of the same expert, or each expert's with the other's pooled one."""
    if a.pooled and not b.pooled:
        return [(a.curves[0], curve) for curve in b.curves]
    if b.pooled and not a.pooled:
        return [(curve, b.curves[0]) for curve in a.curves]
    if len(a.curves) != len(b.curves):
        raise KdeMismatch(
            f"layer {a.layer} has {len(a.curves)} experts in the first null model, "
            f"{len(b.curves)} in the second"
        )
    return list(zip(a.curves, b.curves, strict=True))


def _differences(a: NullCurve, b: NullCurve) -> tuple[float, float]:
    """Largest difference of two tails, and the area between them in logits."""
    x = np.union1d(a.grid, b.grid)
    d = a.p_value(x) - b.p_value(x)
    size = np.abs(d)
    left, right = size[:-1], size[1:]
    mean = (left + right) / 2
    crossing = d[:-1] * d[1:] < 0
    mean[crossing] = (left**2 + right**2)[crossing] / (2 * (left + right)[crossing])
    return float(size.max()), float(mean @ np.diff(x))


def _drawn_rows(null: LayerNull, n_experts: int) -> NDArray[np.float32]:
    """(DRAWN_ROWS, E) float32: independent logits, from what the null was fitted from."""
    rng = np.random.default_rng(0)
    u = rng.random((DRAWN_ROWS, n_experts))
    columns = []
    for expert in range(n_experts):
        curve = null.curves[0 if null.pooled else expert]
        if curve.histogram is None:
            columns.append(np.interp(u[:, expert], 1 - curve.tail, curve.grid))
            continue
        least = min(curve.histograms, key=lambda trim: trim.low + trim.high)
        histogram = curve.histograms[least]
        below = np.cumsum(histogram.counts) / histogram.counts.sum()
        node = np.searchsorted(below, u[:, expert], side="right")
        columns.append(histogram.lo + BIN_WIDTH * np.minimum(node, len(below) - 1))
    return np.stack(columns, axis=1).astype(np.float32)
