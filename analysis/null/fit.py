"""Fitting null models from the logs of runs, or from histograms counted elsewhere."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from bhlog.analysis.fold import Progress
from bhlog.analysis.kernels.patterns import count_patterns
from bhlog.analysis.log import Log
from bhlog.analysis.null.counting import count_logits
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.bandwidth import check_bandwidth, choose_bandwidth
from bhlog.capture.contract.null.curve import KERNELS
from bhlog.capture.contract.null.histogram import (
    Histogram,
    HistogramAccumulator,
    HistogramKey,
    Trim,
)
from bhlog.capture.contract.null.kernel import MOST_GRID_POINTS, empirical_tail, kernel_tail
from bhlog.capture.contract.null.model import KdeModel, LayerNull, NullCurve, layer_ranges

MOST_LAYER_POINTS = 1 << 22  # grid points of a layer's curves together: 32 MiB


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
        check_bandwidth(self.bandwidth)
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
        by_expert = self.null == "expert"
        return HistogramAccumulator(self.trims, by_expert=by_expert, count=count_patterns)


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
        layers, where, threads, progress: which rows, and how they are read; see Scope.
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
    return fit_histograms(
        histograms,
        options,
        source=[log.manifest.run_id for log in logs],
        n_experts=logs[0].n_experts,
    )


def fit_histograms(
    histograms: Mapping[HistogramKey, Histogram],
    options: FitOptions,
    *,
    source: Iterable[str],
    n_experts: int | None = None,
) -> KdeModel:
    """Fit a null model from what a HistogramAccumulator counted.

    Args:
        histograms: HistogramAccumulator.histograms(), counted at options.trims.
        source: ids of the runs they were counted from.
        n_experts: experts per router of these runs, where known.

    Raises:
        InvalidOption: a layer or expert has no finite logit to fit from.
    """
    curves: dict[tuple[int, int | None], dict[Trim, Histogram]] = {}
    for key, histogram in histograms.items():
        curves.setdefault((key.layer, key.expert), {})[key.trim] = histogram
    sources = tuple(sorted(set(source)))
    most_curves = max(Counter(layer for layer, _ in curves).values(), default=1)
    most_points = min(MOST_GRID_POINTS, MOST_LAYER_POINTS // most_curves)

    def fitted(item: tuple[tuple[int, int | None], dict[Trim, Histogram]]) -> NullCurve:
        (layer, expert), levels = item
        return _fit_curve(layer, expert, levels, options, sources, most_points)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = list(pool.map(fitted, curves.items()))
    layers: dict[int, list[NullCurve]] = {}
    for (layer, _), curve in zip(curves, done, strict=True):
        layers.setdefault(layer, []).append(curve)
    return KdeModel(
        {layer: LayerNull(layer, tuple(c)) for layer, c in sorted(layers.items())}, n_experts
    )


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
    if options.kernel == "none":
        bandwidth, rule = None, "none"
        x0, dx, tail = empirical_tail(histogram)
    else:
        bandwidth = choose_bandwidth(histogram, options.bandwidth)
        rule = options.bandwidth if isinstance(options.bandwidth, str) else "fixed"
        x0, dx, tail = kernel_tail(histogram, options.kernel, bandwidth, most_points)
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
