"""Replay: the decisions of a log recomputed at other settings, with no model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.condition import condition_columns
from bhlog.analysis.fold import Progress, Scope, fold
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.analysis.replay.ranked import RankedRows, block_rows
from bhlog.analysis.replay.summary import LayerSummary, summary_frame
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.model import KdeModel, LayerNull
from bhlog.capture.contract.rule import (
    BhOptions,
    Renormalize,
    count_rejected,
    decide_by_expert,
    decide_by_p_value,
    empirical_p_values,
    finite_keys,
    no_finite_logit,
    p_value_order,
)

COLUMNS = ("layer", "logits", "experts", "forward", "rank")
_OF_A_FORWARD = {"forward", "layer", "phase", "rank"}  # the same in all rows of a layer's batch


@dataclass(frozen=True, eq=False)
class Replayed:
    """Decisions of T rows of one layer under A settings.

    Attributes:
        logits: (T, E) float32.
        order: (T, E) uint16, experts from the first choice on; the first n_selected are chosen.
        n_selected, n_rejected: (A, T) uint16.
    """

    logits: NDArray[np.float32]
    order: NDArray[np.uint16]
    n_selected: NDArray[np.uint16]
    n_rejected: NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class Selection:
    """The experts of T rows under one setting.

    Attributes:
        n_rejected, n_selected: (T,) int64.
        chosen: (T, E); None where they are the first n_selected by falling logit.
    """

    n_rejected: NDArray[np.int64]
    n_selected: NDArray[np.int64]
    chosen: NDArray[np.bool_] | None


class Replay:
    """The rule under several settings, ready to be applied to batches of a log.

    Args:
        log: the run to replay.
        settings: BH options, one for each replay; all with the same p_values.
        kde: null model; None takes the run's own, or empirical p-values if the settings say so.
        where: which rows it will get; see Scope.

    Attributes:
        columns: what it reads of a log.

    Raises:
        InvalidOption: no setting, a bound above the number of experts, or empirical p-values, but
            rows are not whole batches.
        KdeMismatch: no null model, or one for other layers or experts.
    """

    def __init__(
        self,
        log: Log,
        settings: Sequence[BhOptions],
        kde: KdeModel | None = None,
        *,
        where: str | None = None,
    ) -> None:
        if not settings:
            raise InvalidOption("replay needs at least one alpha")
        self.settings = tuple(settings)
        self.n_experts = log.n_experts
        self._bounds = [options.bounds(self.n_experts) for options in self.settings]
        self.empirical = kde is None and self.settings[0].p_values == "empirical"
        self._kde = kde
        self.columns: tuple[str, ...] = ("layer", "logits", "experts")
        if self.empirical:
            self.columns = COLUMNS
            _require_whole_batches(log, where)
            return
        self._kde = log.null_model(kde)
        self._thresholds = {layer: self._of_settings(self._kde[layer]) for layer in log.layers}

    def _of_settings(self, null: LayerNull) -> list[NDArray[np.float32]]:
        """Thresholds of a layer under each setting."""
        alphas = [options.alpha for options in self.settings]
        if null.pooled:
            return [*null.curves[0].threshold_grid(np.array(alphas), self.n_experts)]
        return [null.thresholds(alpha, self.n_experts) for alpha in alphas]

    def by_logit(self, layer: int) -> bool:
        """Whether experts of the layer rank by logit: one null curve for all of them."""
        return not self.empirical and self._kde is not None and self._kde[layer].pooled

    def decide(self, batch: pa.RecordBatch) -> Replayed:
        """Replay a batch of one layer that has the COLUMNS.

        A row without a finite logit keeps the experts that were logged: the model's own choice.
        """
        logits, layer = logits_of(batch), layer_of(batch)
        if self.empirical:
            order, n_rejected = self._empirical(batch, logits)
        elif self.by_logit(layer):
            keys = finite_keys(logits)
            by_logit = np.argsort(-keys, axis=1, kind="stable")
            sorted_keys = np.take_along_axis(keys, by_logit, axis=1)
            order = by_logit.astype(np.uint16)
            n_rejected = np.stack([count_rejected(sorted_keys, t) for t in self._thresholds[layer]])
        else:
            assert self._kde is not None
            p, E = self._kde[layer].p_value(logits), self.n_experts
            order = p_value_order(finite_keys(logits), p).astype(np.uint16)
            n_rejected = np.stack(
                [
                    decide_by_expert(logits, t, p, min_k=0, max_k=E).n_rejected
                    for t in self._thresholds[layer]
                ]
            )
        n_selected = np.stack(
            [np.clip(n, low, high) for n, (low, high) in zip(n_rejected, self._bounds, strict=True)]
        )
        undecided = np.flatnonzero(no_finite_logit(logits))
        if len(undecided):
            logged = batch.column("experts").take(pa.array(undecided)).to_pylist()
            for row, experts in zip(undecided, logged, strict=True):
                rest = np.setdiff1d(np.arange(self.n_experts), experts)
                order[row] = np.concatenate([experts, rest])
                n_selected[:, row], n_rejected[:, row] = len(experts), 0
        return Replayed(logits, order, n_selected, n_rejected)

    def choices(self, batch: pa.RecordBatch) -> Iterator[tuple[RankedRows, list[Selection]]]:
        """What decide says of a batch, in blocks, without the order of the experts.

        Yields:
            Rows in log order, and their Selection under each setting.
        """
        logits, logged, layer = logits_of(batch), batch.column("experts"), layer_of(batch)
        replayed = None if self.by_logit(layer) else self.decide(batch)
        size = block_rows(self.n_experts)
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            ranked = RankedRows(logits[rows], logged.slice(start, size))
            if replayed is None:
                yield ranked, [*self._selections(ranked, layer)]
            else:
                yield ranked, [*_by_order(replayed, rows)]

    def _selections(self, ranked: RankedRows, layer: int) -> Iterator[Selection]:
        for thresholds, (low, high) in zip(self._thresholds[layer], self._bounds, strict=True):
            yield Selection(*ranked.step_up(thresholds, low, high), None)

    def _empirical(
        self, batch: pa.RecordBatch, logits: NDArray[np.float32]
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        """Order and (A, T) n_rejected, each forward of each rank ranked on its own."""
        T, E = logits.shape
        order = np.empty((T, E), dtype=np.uint16)
        n_rejected = np.empty((len(self.settings), T), dtype=np.uint16)
        for rows in _forwards(batch):
            p = empirical_p_values(logits[rows])
            order[rows] = p_value_order(finite_keys(logits[rows]), p)
            for i, options in enumerate(self.settings):
                decisions = decide_by_p_value(
                    logits[rows], p, alpha=options.alpha, min_k=0, max_k=E
                )
                n_rejected[i, rows] = decisions.n_rejected
        return order, n_rejected


def _by_order(replayed: Replayed, rows: slice) -> Iterator[Selection]:
    """Selections from the order of the experts."""
    order = replayed.order[rows]
    place = np.empty_like(order)
    ranks = np.broadcast_to(np.arange(order.shape[1], dtype=order.dtype), order.shape)
    np.put_along_axis(place, order.astype(np.int64), ranks, axis=1)
    for n_rejected, n_selected in zip(replayed.n_rejected, replayed.n_selected, strict=True):
        n = n_selected[rows].astype(np.int64)
        yield Selection(n_rejected[rows].astype(np.int64), n, place < n[:, None])


def settings_of(
    log: Log,
    alphas: Iterable[float],
    *,
    min_k: int | None = None,
    max_k: int | None = None,
    temperature: float | None = None,
    renormalize: Renormalize | None = None,
) -> tuple[BhOptions, ...]:
    """Options for a replay at these alphas; what is None is as in the run.

    A native run has no BH options of its own: then min_k is 1, max_k is all experts, the
    temperature 1, weights are renormalized as the model does, and p-values come from a null model.
    """
    options = log.manifest.routing.options or BhOptions()
    return tuple(
        replace(
            options,
            alpha=alpha,
            min_k=options.min_k if min_k is None else min_k,
            max_k=options.max_k if max_k is None else max_k,
            temperature=options.temperature if temperature is None else temperature,
            renormalize=options.renormalize if renormalize is None else renormalize,
        )
        for alpha in alphas
    )


def replay(
    log: Log,
    settings: Sequence[BhOptions],
    *,
    kde: KdeModel | None = None,
    layers: Iterable[int] | None = None,
    where: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Summaries of a log replayed at several settings, in one pass.

    Args:
        settings: see settings_of.
        kde: null model; None takes the run's own.
        layers, where: which rows; see Scope.

    Returns:
        One row per setting and layer, and one per setting over all layers (layer null); columns as
        in bhlog.analysis.replay.summary.

    Raises:
        InvalidOption, KdeMismatch: see Replay; or no row matches.
    """
    rule = Replay(log, settings, kde, where=where)
    top_k = log.manifest.model.top_k
    total = fold(
        log,
        lambda: _Summaries(rule, top_k),
        rule.columns,
        Scope(layers, where, threads=threads, progress=progress),
        whole_groups=rule.empirical,
    )
    if not total.layers:
        raise InvalidOption(f"{log.path}: no rows to replay" + (f" where {where}" if where else ""))
    frames = []
    for i, options in enumerate(settings):
        low, high = options.bounds(log.n_experts)
        frame = summary_frame(
            {layer: parts[i] for layer, parts in total.layers.items()},
            min_k=low,
            max_k=high,
            top_k=top_k,
        )
        frames.append(
            frame.select(
                pl.lit(options.alpha).alias("alpha"),
                pl.lit(low).alias("min_k"),
                pl.lit(high).alias("max_k"),
                pl.all(),
            )
        )
    return pl.concat(frames)


class _Summaries:
    """A LayerSummary per layer and setting."""

    def __init__(self, rule: Replay, top_k: int) -> None:
        self.rule, self.top_k = rule, top_k
        self.layers: dict[int, list[LayerSummary]] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        layer, E = layer_of(batch), self.rule.n_experts
        parts = self.layers.setdefault(layer, [LayerSummary(E) for _ in self.rule.settings])
        for ranked, choices in self.rule.choices(batch):
            for options, part, choice in zip(self.rule.settings, parts, choices, strict=True):
                part.add(
                    ranked,
                    choice.n_selected,
                    choice.n_rejected,
                    choice.chosen,
                    top_k=self.top_k,
                    temperature=options.temperature,
                )

    def merge(self, other: Self) -> None:
        for layer, parts in other.layers.items():
            if layer not in self.layers:
                self.layers[layer] = parts
            else:
                for mine, theirs in zip(self.layers[layer], parts, strict=True):
                    mine.merge(theirs)


def p_values_of(batch: pa.RecordBatch, null: LayerNull | None) -> NDArray[np.float64]:
    """(T, E) float64 p-values of a batch of one layer.

    Args:
        batch: with the COLUMNS; whole forwards if null is None.
        null: the layer's null model; None ranks each forward of each rank on its own.
    """
    logits = logits_of(batch)
    if null is not None:
        return null.p_value(logits)
    p = np.empty(logits.shape, dtype=np.float64)
    for rows in _forwards(batch):
        p[rows] = empirical_p_values(logits[rows])
    return p


def _forwards(batch: pa.RecordBatch) -> Iterator[NDArray[np.bool_]]:
    """(T,) bool, the rows of each forward of each rank."""
    forward = batch.column("forward").to_numpy().astype(np.int64)
    group = batch.column("rank").to_numpy().astype(np.int64) << 32 | forward
    for number in np.unique(group):
        yield group == number


def padded_experts(experts: pa.ListArray, width: int) -> NDArray[np.uint16]:
    """(T, width) uint16: the lists of a column side by side, 0 beyond their ends."""
    lengths = experts.value_lengths().to_numpy(zero_copy_only=False)
    result = np.zeros((len(experts), width), dtype=np.uint16)
    result[np.arange(width) < lengths[:, None]] = experts.flatten().to_numpy()
    return result


def _require_whole_batches(log: Log, where: str | None) -> None:
    manifest = log.manifest
    if manifest.sample_every > 1 or manifest.totals.dropped:
        raise InvalidOption(
            f"{log.path}: empirical p-values rank whole batches, but tokens were left out of this "
            "log (sampled or dropped); replay it with a null model: --kde FILE"
        )
    if manifest.totals.rejected:
        raise InvalidOption(
            f"{log.path}: empirical p-values rank whole batches, but drafts that were rejected are "
            "not in this log (assisted decoding); replay it with a null model: --kde FILE"
        )
    cutting = [] if where is None else sorted(set(condition_columns(where)) - _OF_A_FORWARD)
    if cutting:
        raise InvalidOption(
            f"{log.path}: empirical p-values rank whole batches, but a condition on "
            f"{', '.join(cutting)} leaves out parts of them; ask for whole ones by "
            f"{', '.join(sorted(_OF_A_FORWARD))}, or take a null model: --kde FILE"
        )
