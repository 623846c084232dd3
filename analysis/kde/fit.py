"""Fitting null models: from the logs of runs, again from their histograms, and merged."""

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.kde.bandwidth import RULES, choose_bandwidth
from analysis.kde.kernel import KERNELS, empirical_tail, kernel_tail
from analysis.log import Log, Progress, layer_of, logits_of
from capture.contract.errors import InvalidOption, KdeMismatch
from capture.contract.histogram import Histogram, HistogramAccumulator, HistogramKey, Trim
from capture.contract.kde import KdeModel, LayerNull, NullCurve, layer_ranges


@dataclass(frozen=True)
class FitOptions:
    """How a null model is fitted.

    Attributes:
        kernel: "gaussian", "epanechnikov", "tophat", "triangular", or "none" for the empirical
            tail.
        bandwidth: "scott", "silverman", "isj" (improved Sheather-Jones), or a standard deviation
            of the kernel in logits.
        trim_low, trim_high: leave out this many of each row's smallest and largest logits, so
            that the signal does not sit in its own null.
        null: "pooled" for one curve a layer, "expert" for one a layer and expert.
        keep: further trimming levels (low, high) whose histograms stay in the file for refits.
    """

    kernel: str = "gaussian"
    bandwidth: str | float = "scott"
    trim_low: int = 0
    trim_high: int = 0
    null: Literal["pooled", "expert"] = "pooled"
    keep: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise InvalidOption(f"kernel must be {', '.join(KERNELS)}; got {self.kernel!r}")
        if isinstance(self.bandwidth, str):
            if self.bandwidth not in RULES:
                raise InvalidOption(
                    f"bandwidth must be {', '.join(RULES)} or a number of logits, "
                    f"got {self.bandwidth!r}"
                )
        elif not (np.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise InvalidOption(f"bandwidth must be above 0 logits, got {self.bandwidth}")
        if self.null not in ("pooled", "expert"):
            raise InvalidOption(f"null must be 'pooled' or 'expert', got {self.null!r}")
        if min(self.trim_low, self.trim_high) < 0:
            raise InvalidOption(
                f"trim_low and trim_high must be at least 0, got {self.trim_low} and "
                f"{self.trim_high}"
            )

    @property
    def trim(self) -> Trim:
        """The trimming level in force."""
        return Trim(self.trim_low, self.trim_high)

    @property
    def trims(self) -> tuple[Trim, ...]:
        """All trimming levels to count, the one in force first."""
        return tuple(dict.fromkeys((self.trim, *(Trim(*level) for level in self.keep))))

    def accumulator(self) -> HistogramAccumulator:
        """Counts what a fit with these options needs."""
        return HistogramAccumulator(self.trims, by_expert=self.null == "expert")


def fit_kde(
    logs: Log | Sequence[Log],
    options: FitOptions | None = None,
    *,
    layers: Iterable[int] | None = None,
    where: str | None = None,
    sample: float = 1.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> KdeModel:
    """Fit a null model from one run or several of the same model, in one pass over their logits.

    Args:
        logs: the runs.
        options: kernel, bandwidth, trimming; None for the defaults of FitOptions.
        layers, where, threads, progress: which rows, and how they are read; see Log.fold.
        sample: share of tokens to read, 0 < sample <= 1; a token is in at all layers or at none,
            and the same tokens are in at every call.

    Raises:
        InvalidOption: an option does not fit the runs, or no row is left to fit from.
        KdeMismatch: the runs have other layers or experts than the first.
    """
    options = options or FitOptions()
    logs = [logs] if isinstance(logs, Log) else list(logs)
    layers = None if layers is None else tuple(layers)
    histograms = count_logits(
        logs,
        options.accumulator(),
        layers=layers,
        where=where,
        sample=sample,
        threads=threads,
        progress=progress,
    ).histograms()
    wanted = sorted(logs[0].check_layers(layers))
    missing = set(wanted) - {key.layer for key in histograms}
    if missing:
        raise InvalidOption(
            f"no rows of layers {layer_ranges(missing)} in {', '.join(log.path for log in logs)}"
            + (f" where {where}" if where else "")
            + (f" at sample {sample}" if sample < 1 else "")
        )
    return fit_histograms(histograms, options, source=[log.manifest.run_id for log in logs])


def count_logits(
    logs: Sequence[Log],
    accumulator: HistogramAccumulator,
    *,
    layers: Iterable[int] | None = None,
    where: str | None = None,
    sample: float = 1.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> HistogramAccumulator:
    """Count the logits of runs into an accumulator and return it; see fit_kde."""
    if not logs:
        raise InvalidOption("name at least one run")
    if not 0 < sample <= 1:
        raise InvalidOption(f"sample must be above 0 and at most 1, got {sample}")
    model = logs[0].manifest.model
    for log in logs:
        other = log.manifest.model
        if (other.layers, other.n_experts) != (model.layers, model.n_experts):
            raise KdeMismatch(
                f"{log.path} has layers {layer_ranges(other.layers)} of {other.n_experts} experts, "
                f"{logs[0].path} has {layer_ranges(model.layers)} of {model.n_experts}; "
                "fit a null model from runs of one model"
            )
    for trim in accumulator.trims:
        trim.check(model.n_experts)
    columns = ["logits"] if sample == 1 else ["logits", "rank", "sequence", "position"]
    by_thread: dict[int, HistogramAccumulator] = {}
    for log in logs:
        log.fold(
            lambda: _Counting(accumulator, by_thread, sample),
            columns,
            layers=layers,
            where=where,
            threads=threads,
            progress=progress,
        )
    for part in by_thread.values():
        accumulator.merge(part)
    return accumulator


@dataclass
class _Counting:
    """The fold over record batches that feeds HistogramAccumulators.

    Integers add up alike in any order, so batches go to one accumulator per thread rather than one
    per stretch of the log: fewer tables to fill and to merge.
    """

    kind: HistogramAccumulator
    by_thread: dict[int, HistogramAccumulator]
    sample: float

    def update(self, batch: pa.RecordBatch) -> None:
        logits = logits_of(batch)
        if self.sample < 1:
            logits = logits[sampled(batch, self.sample)]
        thread = threading.get_ident()
        if thread not in self.by_thread:
            self.by_thread[thread] = self.kind.empty_copy()
        self.by_thread[thread].update(layer_of(batch), logits)

    def merge(self, other: Self) -> None:
        """Nothing to do: all parts share the accumulators of the threads."""


def sampled(batch: pa.RecordBatch, share: float) -> NDArray[np.bool_]:
    """(T,) bool: rows of the tokens in a sample, decided by (rank, sequence, position) alone.

    Reference:
        Steele, Lea and Flood (2014), OOPSLA: the finalizer of SplitMix64.
    """
    rank, sequence, position = (
        batch.column(name).to_numpy().astype(np.uint64) for name in ("rank", "sequence", "position")
    )
    mixed = np.zeros(len(rank), dtype=np.uint64)
    for part in (rank, sequence, position):
        mixed = (mixed ^ part) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    uniform = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    chosen: NDArray[np.bool_] = uniform < share
    return chosen


def fit_histograms(
    histograms: Mapping[HistogramKey, Histogram], options: FitOptions, *, source: Iterable[str]
) -> KdeModel:
    """Fit a null model from what a HistogramAccumulator counted.

    Args:
        histograms: HistogramAccumulator.histograms(), counted at options.trims.
        source: ids of the runs they were counted from.

    Raises:
        InvalidOption: a layer or expert has no finite logit to fit from.
    """
    curves: dict[tuple[int, int | None], dict[Trim, Histogram]] = {}
    for key, histogram in histograms.items():
        curves.setdefault((key.layer, key.expert), {})[key.trim] = histogram
    sources = tuple(sorted(set(source)))

    def fitted(item: tuple[tuple[int, int | None], dict[Trim, Histogram]]) -> NullCurve:
        (layer, expert), levels = item
        return _fit_curve(layer, expert, levels, options, sources)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(fitted, curves.items()))
    layers: dict[int, list[NullCurve]] = {}
    for (layer, _), curve in zip(curves, done, strict=True):
        layers.setdefault(layer, []).append(curve)
    return KdeModel({layer: LayerNull(layer, tuple(c)) for layer, c in sorted(layers.items())})


def _fit_curve(
    layer: int,
    expert: int | None,
    levels: Mapping[Trim, Histogram],
    options: FitOptions,
    source: tuple[str, ...],
) -> NullCurve:
    histogram = levels[options.trim]
    if histogram.n == 0:
        who = f"layer {layer}" if expert is None else f"expert {expert} of layer {layer}"
        raise InvalidOption(
            f"{who} has no finite logit to fit from ({histogram.left_out:,} were left out)"
        )
    if options.kernel == "none":
        bandwidth, rule = None, "none"
        x0, dx, tail = empirical_tail(histogram)
    else:
        bandwidth = choose_bandwidth(histogram, options.bandwidth)
        rule = options.bandwidth if isinstance(options.bandwidth, str) else "fixed"
        x0, dx, tail = kernel_tail(histogram, options.kernel, bandwidth)
    return NullCurve(
        expert=expert,
        n=histogram.n,
        x0=x0,
        dx=dx,
        tail=tail,
        histogram=histogram,
        trim_low=options.trim_low,
        trim_high=options.trim_high,
        kernel=options.kernel,
        bandwidth=bandwidth,
        rule=rule,
        source=source,
        kept={trim: kept for trim, kept in sorted(levels.items()) if trim != options.trim},
    )


def refit(
    model: KdeModel,
    *,
    kernel: str | None = None,
    bandwidth: str | float | None = None,
    trim_low: int | None = None,
    trim_high: int | None = None,
) -> KdeModel:
    """Fit again from the histograms in a model; no log is read. None keeps what the model has.

    Raises:
        InvalidOption: a bad option, or a trimming level that the file does not keep.
        KdeMismatch: the model was imported, so it has no histograms.
    """
    options = options_of(model)
    if bandwidth is None and options.kernel == "none" and kernel not in (None, "none"):
        bandwidth = FitOptions().bandwidth
    changes = {
        "kernel": kernel,
        "bandwidth": bandwidth,
        "trim_low": trim_low,
        "trim_high": trim_high,
    }
    options = replace(options, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
    histograms = _histograms(model)
    kept = {key.trim for key in histograms}
    if options.trim not in kept:
        raise InvalidOption(
            f"the null model keeps no histogram at trim_low {options.trim_low}, trim_high "
            f"{options.trim_high}; it keeps {_levels(kept)}: fit it again from the run"
        )
    return fit_histograms(histograms, options, source=_sources(model))


def merge(models: Sequence[KdeModel]) -> KdeModel:
    """One model fitted from the logits of all, as if one pass had counted them together.

    Trimming levels that only some of the models keep are dropped. Layers that only some have are
    kept as they are there.

    Raises:
        InvalidOption: the models were fitted with different options: refit them first.
        KdeMismatch: a model was imported, or a layer is pooled in one and per expert in another.
    """
    if not models:
        raise InvalidOption("name at least one null model")
    options = options_of(models[0])
    total: dict[HistogramKey, Histogram] = {}
    for model in models:
        other = options_of(model)
        if other != options:
            raise InvalidOption(
                f"the null models were fitted differently ({_words(options)}; {_words(other)}): "
                "refit one as the other first"
            )
    kept = set.intersection(*({key.trim for key in _histograms(model)} for model in models))
    experts: dict[int, set[int | None]] = {}
    for model in models:
        for layer, null in model.items():
            these = {curve.expert for curve in null.curves}
            if experts.setdefault(layer, these) != these:
                raise KdeMismatch(
                    f"layer {layer} has {len(experts[layer])} curves in one null model and "
                    f"{len(these)} in another"
                )
        for key, histogram in _histograms(model).items():
            if key.trim in kept:
                total[key] = total[key].merge(histogram) if key in total else histogram
    return fit_histograms(total, options, source=[s for m in models for s in _sources(m)])


def options_of(model: KdeModel) -> FitOptions:
    """The options a model was fitted with.

    Raises:
        KdeMismatch: it was imported, or its curves were fitted with different options.
    """
    found = set()
    for layer, curve in model.curves:
        if curve.histogram is None:
            raise KdeMismatch(
                f"layer {layer} was imported from {', '.join(curve.source) or 'elsewhere'} and has "
                "no histogram: fit a null model from a run instead"
            )
        bandwidth: str | float = curve.rule
        if curve.rule == "none":
            bandwidth = FitOptions().bandwidth
        elif curve.rule == "fixed" and curve.bandwidth is not None:
            bandwidth = curve.bandwidth
        found.add(
            FitOptions(
                kernel=curve.kernel,
                bandwidth=bandwidth,
                trim_low=curve.trim_low,
                trim_high=curve.trim_high,
                null="pooled" if curve.expert is None else "expert",
            )
        )
    if len(found) > 1:
        raise KdeMismatch("the curves of the null model were fitted with different options")
    return found.pop()


def _histograms(model: KdeModel) -> dict[HistogramKey, Histogram]:
    return {
        HistogramKey(layer, curve.expert, trim): histogram
        for layer, curve in model.curves
        for trim, histogram in curve.histograms.items()
    }


def _sources(model: KdeModel) -> set[str]:
    return {source for _, curve in model.curves for source in curve.source}


def _levels(trims: Iterable[Trim]) -> str:
    return ", ".join(f"{trim.low}:{trim.high}" for trim in sorted(trims))


def _words(options: FitOptions) -> str:
    return (
        f"{options.kernel} kernel, {options.bandwidth} bandwidth, trim "
        f"{options.trim_low}:{options.trim_high}, {options.null}"
    )
