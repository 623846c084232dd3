"""Null models from null models, without a log: fitted again, and merged."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from bhlog.analysis.null.fit import FitOptions, fit_histograms
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.histogram import Histogram, HistogramKey, Trim
from bhlog.capture.contract.null.model import KdeModel


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
    return fit_histograms(histograms, options, source=_sources(model), n_experts=model.n_experts)


def merge(models: Sequence[KdeModel]) -> KdeModel:
    """One model fitted from the logits of all, as if one pass had counted them together.

    Trimming levels that only some of the models keep are dropped. Layers that only some have are
    kept as they are there.

    Raises:
        InvalidOption: the models were fitted with different options: refit them first.
        KdeMismatch: a model was imported, or they are for other numbers of experts.
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
    n_experts = {model.n_experts for model in models} - {None}
    if len(n_experts) > 1:
        raise KdeMismatch(
            "the null models are for routers of "
            f"{' and '.join(map(str, sorted(filter(None, n_experts))))} experts: merge those of "
            "one model"
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
    return fit_histograms(
        total,
        options,
        source=[source for model in models for source in _sources(model)],
        n_experts=next(iter(n_experts), None),
    )


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
