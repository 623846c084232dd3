"""Fitting null models from histograms: counted in logs, or kept in null models."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.bandwidth import check_bandwidth, choose_bandwidth
from bhlog.capture.contract.null.central import central_curves
from bhlog.capture.contract.null.curve import INSTEAD, KERNELS, NullCurve
from bhlog.capture.contract.null.histogram import (
    Histogram,
    HistogramAccumulator,
    HistogramKey,
    PatternCounter,
)
from bhlog.capture.contract.null.kernel import (
    MOST_GRID_POINTS,
    conformal_tail,
    empirical_tail,
    kernel_tail,
)
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.null.trim import Trim
from bhlog.capture.contract.rule import CENTRED

Layers = Mapping[int, LayerNull]  # by decoder layer, as a KdeModel is

UNSMOOTHED = ("none", "conformal")  # kernels without a bandwidth
MOST_LAYER_POINTS = 1 << 22  # grid points of a layer's curves together: 32 MiB
MOST_MODEL_POINTS = 1 << 26  # and of a model's: 512 MiB


@dataclass(frozen=True)
class FitOptions:
    """How a null model is fitted.

    Attributes:
        kernel: "gaussian", "epanechnikov", "tophat", "triangular", "none" for the empirical tail,
            or "conformal" for (1 + #{logits >= x}) / (n + 1), which no logit is beyond.
        bandwidth: "scott", "silverman" (1.06 sd n^-1/5), "nrd0" (R's default, 0.9 of the smaller
            of sd and IQR / 1.34), "isj" (improved Sheather-Jones; silverman where it has no
            root), or a standard deviation of the kernel in logits.
        trim_low, trim_high: leave out this many of each row's smallest and largest logits, so
            that the signal does not sit in its own null.
        null: "pooled" for one curve a layer, "expert" for one a layer and expert.
        keep: further trimming levels (low, high) whose histograms stay in the file for refits.
        null_from: "kept" for the logits that trimming keeps, "central" for Efron's empirical null:
            a normal curve matched to the centre of all of them, with which there is a local fdr.
        centre: "median" to take each row's median from its logits; see centre.py.
    """

    kernel: str = "gaussian"
    bandwidth: str | float = "scott"
    trim_low: int = 0
    trim_high: int = 0
    null: Literal["pooled", "expert"] = "pooled"
    keep: tuple[tuple[int, int], ...] = ()
    null_from: Literal["kept", "central"] = "kept"
    centre: Literal["none", "median"] = "none"

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise InvalidOption(f"kernel must be {', '.join(KERNELS)}; got {self.kernel!r}")
        check_bandwidth(self.bandwidth)
        if self.null not in ("pooled", "expert"):
            raise InvalidOption(f"null must be 'pooled' or 'expert', got {self.null!r}")
        if min(self.trim_low, self.trim_high) < 0:
            raise InvalidOption(
                f"trim_low and trim_high must be at least 0, got {self.trim_low} and "
                f"{self.trim_high}"
            )
        if self.centre not in CENTRED:
            raise InvalidOption(f"centre must be none or median, got {self.centre!r}")
        if self.null_from not in ("kept", "central"):
            raise InvalidOption(f"null_from must be 'kept' or 'central', got {self.null_from!r}")
        if self.null_from == "central" and (self.trim != Trim() or self.kernel in UNSMOOTHED):
            raise InvalidOption(
                "a central null is matched to the smoothed density of all logits: leave trimming "
                f"out and take a kernel other than {' and '.join(UNSMOOTHED)}"
            )

    @property
    def trim(self) -> Trim:
        """The trimming level in force."""
        return Trim(self.trim_low, self.trim_high)

    @property
    def trims(self) -> tuple[Trim, ...]:
        """All trimming levels to count, the one in force first."""
        return tuple(dict.fromkeys((self.trim, *(Trim(*level) for level in self.keep))))

    def accumulator(self, count: PatternCounter | None = None) -> HistogramAccumulator:
        """Counts what a fit with these options needs; see HistogramAccumulator for `count`."""
        return HistogramAccumulator(
            self.trims, by_expert=self.null == "expert", count=count, centre=self.centre
        )


def fit_histograms(
    histograms: Mapping[HistogramKey, Histogram],
    options: FitOptions,
    *,
    source: Iterable[str],
    n_curves: int | None = None,
) -> dict[int, LayerNull]:
    """Fit the null model of each layer from what a HistogramAccumulator counted.

    Args:
        histograms: HistogramAccumulator.histograms(), counted at options.trims.
        source: ids of the runs they were counted from.
        n_curves: of the whole model, where these are some of its layers; None: these are all.

    Raises:
        InvalidOption: a layer or expert has no finite logit to fit from.
    """
    curves: dict[tuple[int, int | None], dict[Trim, Histogram]] = {}
    for key, histogram in histograms.items():
        curves.setdefault((key.layer, key.expert), {})[key.trim] = histogram
    sources = tuple(sorted(set(source)))
    most_curves = max(Counter(layer for layer, _ in curves).values(), default=1)
    most_points = min(
        MOST_GRID_POINTS,
        MOST_LAYER_POINTS // most_curves,
        MOST_MODEL_POINTS // max(1, n_curves or len(curves)),
    )

    def fitted(item: tuple[tuple[int, int | None], dict[Trim, Histogram]]) -> NullCurve:
        (layer, expert), levels = item
        return _fit_curve(layer, expert, levels, options, sources, most_points)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        items = iter(curves.items())
        first = [fitted(item) for item in islice(items, 1)]  # imports scipy, in one thread alone
        done = [*first, *pool.map(fitted, items)]
    layers: dict[int, list[NullCurve]] = {}
    for (layer, _), curve in zip(curves, done, strict=True):
        layers.setdefault(layer, []).append(curve)
    return {layer: LayerNull(layer, tuple(c)) for layer, c in sorted(layers.items())}


def _fit_curve(
    layer: int,
    expert: int | None,
    levels: Mapping[Trim, Histogram],
    options: FitOptions,
    source: tuple[str, ...],
    most_points: int,
) -> NullCurve:
    histogram = levels[options.trim]
    if histogram.n == 0:
        who = f"layer {layer}" if expert is None else f"expert {expert} of layer {layer}"
        raise InvalidOption(
            f"{who} has no finite logit to fit from ({histogram.left_out:,} were left out) at "
            f"trim_low {options.trim_low}, trim_high {options.trim_high}"
        )
    central, lfdr = None, None
    if options.kernel in UNSMOOTHED:
        bandwidth, rule = None, "none"
        fitted = empirical_tail if options.kernel == "none" else conformal_tail
        x0, dx, tail = fitted(histogram)
    else:
        bandwidth, rule = choose_bandwidth(histogram, options.bandwidth)
        x0, dx, tail = kernel_tail(histogram, options.kernel, bandwidth, most_points)
        if options.null_from == "central":
            try:
                central, x0, dx, tail, lfdr = central_curves(x0, dx, tail, most_points)
            except InvalidOption as error:
                who = f"layer {layer}" if expert is None else f"expert {expert} of layer {layer}"
                raise InvalidOption(f"{who}: {error}") from error
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
        central=central,
        lfdr=lfdr,
        centre=options.centre,
    )


def refit(
    model: Layers,
    *,
    kernel: str | None = None,
    bandwidth: str | float | None = None,
    trim_low: int | None = None,
    trim_high: int | None = None,
    null_from: str | None = None,
) -> dict[int, LayerNull]:
    """Fit again from the histograms in a model; no log is read. None keeps what the model has.

    Raises:
        InvalidOption: a bad option, or a trimming level that the file does not keep.
        KdeMismatch: the model was imported, so it has no histograms.
    """
    options = options_of(model)
    if bandwidth is None and options.kernel in UNSMOOTHED and kernel not in (None, *UNSMOOTHED):
        bandwidth = FitOptions().bandwidth
    changes = {
        "kernel": kernel,
        "bandwidth": bandwidth,
        "trim_low": trim_low,
        "trim_high": trim_high,
        "null_from": null_from,
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


def merge(models: Sequence[Layers]) -> dict[int, LayerNull]:
    """Null models fitted from the logits of all, as if one pass had counted them together.

    Trimming levels that only some of the models keep are dropped. Layers that only some have are
    kept as they are there.

    Raises:
        InvalidOption: the models were fitted with different options: refit them first.
        KdeMismatch: a model was imported, or a layer has other numbers of curves.
    """
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
    sources = [source for model in models for source in _sources(model)]
    return fit_histograms(total, options, source=sources)


def options_of(model: Layers) -> FitOptions:
    """The options a model was fitted with.

    Raises:
        KdeMismatch: it was imported, or its curves were fitted with different options.
    """
    found = set()
    for layer, curve in _curves(model):
        if curve.histogram is None:
            raise KdeMismatch(
                f"layer {layer} was imported from {', '.join(curve.source) or 'elsewhere'} and has "
                "no histogram: fit a null model from a run instead"
            )
        bandwidth: str | float = curve.rule
        if curve.rule == "none":
            bandwidth = FitOptions().bandwidth
        elif curve.rule == INSTEAD:
            bandwidth = "isj"
        elif curve.rule == "fixed" and curve.bandwidth is not None:
            bandwidth = curve.bandwidth
        found.add(
            FitOptions(
                kernel=curve.kernel,
                bandwidth=bandwidth,
                trim_low=curve.trim_low,
                trim_high=curve.trim_high,
                null="pooled" if curve.expert is None else "expert",
                null_from="kept" if curve.central is None else "central",
                centre="median" if curve.centre == "median" else "none",
            )
        )
    if len(found) > 1:
        raise KdeMismatch("the curves of the null model were fitted with different options")
    return found.pop()


def _curves(model: Layers) -> list[tuple[int, NullCurve]]:
    return [(layer, curve) for layer in sorted(model) for curve in model[layer].curves]


def _histograms(model: Layers) -> dict[HistogramKey, Histogram]:
    return {
        HistogramKey(layer, curve.expert, trim): histogram
        for layer, curve in _curves(model)
        for trim, histogram in curve.histograms.items()
    }


def _sources(model: Layers) -> set[str]:
    return {source for _, curve in _curves(model) for source in curve.source}


def _levels(trims: Iterable[Trim]) -> str:
    return ", ".join(f"{trim.low}:{trim.high}" for trim in sorted(trims))


def _words(options: FitOptions) -> str:
    return (
        f"{options.kernel} kernel, {options.bandwidth} bandwidth, trim "
        f"{options.trim_low}:{options.trim_high}, {options.null}"
        + (", from the centre" if options.null_from == "central" else "")
        + (", less the median" if options.centre == "median" else "")
    )
