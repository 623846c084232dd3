"""The null model of runs: their logits counted in one pass over the shards, and fitted."""

from collections.abc import Sequence
from functools import partial
from typing import Self

import pyarrow as pa

from bhlog.analysis.fold import WHOLE, Scope, fold
from bhlog.analysis.kernels.patterns import count_patterns
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.fit import FitOptions as FitOptions
from bhlog.capture.contract.null.fit import fit_histograms
from bhlog.capture.contract.null.histogram import HistogramAccumulator
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.null.model import KdeModel, layer_ranges

MOST_COUNTED = 1 << 11  # histograms at a time, up to some 128 kB each


def fit_kde(
    logs: Log | Sequence[Log], options: FitOptions | None = None, *, scope: Scope = WHOLE
) -> KdeModel:
    """Fit a null model from one run or several of the same model, in one pass over their logits.

    Curves by expert are counted and fitted a few layers at a time, so that memory holds
    MOST_COUNTED dense histograms, whatever the number of layers.

    Args:
        logs: the runs.
        options: kernel, bandwidth, trimming; None for the defaults of FitOptions.
        scope: which rows, and how they are read.

    Raises:
        InvalidOption: an option does not fit the runs, a run has no logits, or no row is left to
            fit from.
        KdeMismatch: the runs have other layers or experts than the first.
    """
    options = options or FitOptions()
    logs = [logs] if isinstance(logs, Log) else list(logs)
    if not logs:
        raise InvalidOption("name at least one run")
    wanted, E = sorted(logs[0].check_layers(scope.layers)), logs[0].n_experts
    together = len(wanted)
    if options.null == "expert":
        together = max(1, MOST_COUNTED // (E * len(options.trims)))
    layers: dict[int, LayerNull] = {}
    for start in range(0, len(wanted), together):
        part = tuple(wanted[start : start + together])
        histograms = count_logits(logs, options, scope=scope.but(layers=part)).histograms()
        missing = set(part) - {key.layer for key in histograms}
        if missing:
            raise InvalidOption(
                f"no rows of layers {layer_ranges(missing)} in "
                f"{', '.join(log.path for log in logs)}{scope.words}"
            )
        source = [log.manifest.run_id for log in logs]
        n_curves = len(wanted) * (E if options.null == "expert" else 1)
        layers |= fit_histograms(histograms, options, source=source, n_curves=n_curves)
    return KdeModel(layers, E)


def count_logits(
    logs: Sequence[Log], options: FitOptions, *, scope: Scope = WHOLE
) -> HistogramAccumulator:
    """Count the logits of runs that a fit with these options needs; see fit_kde."""
    if not logs:
        raise InvalidOption("name at least one run")
    model = logs[0].manifest.model
    for log in logs:
        log.require_logits()
        other = log.manifest.model
        if (other.layers, other.n_experts) != (model.layers, model.n_experts):
            raise KdeMismatch(
                f"{log.path} has layers {layer_ranges(other.layers)} of {other.n_experts} experts, "
                f"{logs[0].path} has {layer_ranges(model.layers)} of {model.n_experts}; "
                "fit a null model from runs of one model"
            )
    for trim in options.trims:
        trim.check(model.n_experts)
    total = LogitCounts(options)
    for log in logs:
        counted = fold(log, partial(LogitCounts, options), ["logits"], scope, exact=True)
        total.merge(counted)
    return total.counts


class LogitCounts:
    """The fold that counts what a fit needs."""

    def __init__(self, options: FitOptions) -> None:
        self.counts = options.accumulator(count_patterns)

    def update(self, batch: pa.RecordBatch) -> None:
        self.counts.update(layer_of(batch), logits_of(batch))

    def merge(self, other: Self) -> None:
        self.counts.merge(other.counts)
