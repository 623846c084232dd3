"""Settings: what a replay is asked for, where it is not as in the run."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from bhlog.analysis.log import Log
from bhlog.capture.contract.named import Bh
from bhlog.capture.contract.rule import OPEN, BhOptions, Bounds, Renormalize

Alpha = float | Mapping[int, float] | Bh  # or one for each layer


def settings_of(
    log: Log,
    alphas: Iterable[Alpha],
    *,
    bounds: Bounds = OPEN,
    temperature: float | None = None,
    renormalize: Renormalize | None = None,
) -> tuple[BhOptions, ...]:
    """Options for a replay at these alphas; what is None, and open in bounds, is as in the run.

    A native run has no BH options of its own: then min_k is 1, max_k is all experts, the
    temperature 1, weights are renormalized as the model does, and p-values come from a null model.
    """
    options = log.manifest.routing.options or BhOptions()
    bounds = bounds_of(log, bounds)
    return tuple(
        replace(
            options,
            **_named(alpha),
            min_k=1 if bounds.min_k is None else bounds.min_k,
            max_k=bounds.max_k,
            temperature=options.temperature if temperature is None else temperature,
            renormalize=options.renormalize if renormalize is None else renormalize,
        )
        for alpha in alphas
    )


def _named(alpha: Alpha) -> dict[str, Any]:
    """The level, or the policy of levels by layer."""
    if isinstance(alpha, Mapping):
        alpha = Bh.of_layers(alpha)
    if isinstance(alpha, Bh):
        return {"policy": str(alpha)} if alpha.by_layer else _named(alpha.alpha)
    return {"alpha": alpha, "policy": None}


def bounds_of(log: Log, bounds: Bounds = OPEN) -> Bounds:
    """These bounds, those of the run where they are open; a native run has none.

    Raises:
        InvalidOption: together they leave no number of experts.
    """
    options = log.manifest.routing.options
    return bounds if options is None else bounds.filled(Bounds(options.min_k, options.max_k))


def bounds_words(log: Log, bounds: Bounds = OPEN) -> str:
    """The bounds in force in words, for the title of a table: "1 to 16 experts a token, as in the
    run".

    Raises:
        InvalidOption: a bound is above the number of experts.
    """
    low, high = bounds_of(log, bounds).resolve(log.n_experts)
    words = f"{low} to {high} experts a token"
    given = {"min_k": bounds.min_k, "max_k": bounds.max_k}
    open_ = [name for name, bound in given.items() if bound is None]
    if log.manifest.routing.options is None:
        return words + (": a native run has no bounds of its own" if open_ else "")
    if not open_:
        return words
    return f"{words}, as in the run" if len(open_) == 2 else f"{words}, {open_[0]} as in the run"
