"""The interface of earlier notebooks: a patcher for OLMoE and BH routing as a function."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Self
from warnings import warn

import numpy as np
import torch
from torch import Tensor, nn

from bhlog.capture.apps.notebook.logger import BHRoutingLogger
from bhlog.capture.contract.errors import CorruptKde, InvalidOption, KdeMismatch, UnsupportedModel
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.named import Bh
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.null.pickles import curve_of, load_kde_models
from bhlog.capture.contract.rule import BhOptions, Renormalize, critical_values
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.routers.routing import (
    TorchNull,
    Weighing,
    empirical_order,
    empirical_p_values,
    finite_keys,
    select,
    warn_of_few_rows,
    weigh,
)

Kde = KdeModel | Mapping[int, Mapping[str, Any]] | str | Path | None


class OLMoERouterPatcher(RouterPatcher):
    """A RouterPatcher for OLMoE models, with `patch_with_bh`.

    Attributes:
        logger: the logger given to patch_with_bh.
        stats: LayerStats by layer, if collect_stats.

    Raises:
        UnsupportedModel: the model is not an OLMoE.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if getattr(model.config, "model_type", None) != "olmoe":
            raise UnsupportedModel(
                f"{type(model).__name__} is not an OLMoE model; use RouterPatcher, observe or "
                "route for other models"
            )
        self.logger: BHRoutingLogger | None = None

    def patch_with_bh(
        self,
        alpha: float = 0.05,
        temperature: float = 1.0,
        min_k: int = 1,
        max_k: int = 8,
        collect_stats: bool = True,
        logger: BHRoutingLogger | None = None,
        kde: Kde = None,
        renormalize: Renormalize = "model",
    ) -> Self:
        """Route by BH until `unpatch()`; patching again starts afresh.

        Args:
            collect_stats: keep counts per layer in `stats`.
            logger: keeps every decision; None copies and keeps nothing.
            kde: the null model: a file, a folder of older pickles, loaded, or {layer: {"x": ...,
                "cdf": ...}}. Without one (None or {}), p-values rank the logits of the batch at
                hand, which a warning announces.

        Others: see BhOptions.
        """
        self.unpatch()
        null = null_of(kde)
        if null is None:
            _warn_of_the_larger_logits()
            warn(
                "no null model: p-values rank each expert's logits within the batch (empirical), "
                "so decisions depend on the batch; pass kde= for the rule proper",
                stacklevel=2,
            )
        options = BhOptions(
            alpha, min_k, max_k, temperature, renormalize, "empirical" if null is None else "kde"
        )
        routing = Routing("bh", options)
        self.check(routing, null)
        if logger is not None and len(self.group.ranks) > 1:
            raise InvalidOption(
                "a logger writes one process's rows; a model that is spread over several is "
                "logged by bhlog.route"
            )
        writer = None if logger is None else logger.open(self.info, routing, null)
        try:
            self.attach(routing, null, writer=writer, collect_stats=collect_stats)
        except BaseException as error:
            if writer is not None:
                writer.close(error)
            raise
        if logger is not None and self.recorder is not None:
            logger.follow(self.recorder)
        self.logger = logger
        return self

    def unpatch(self) -> None:
        """Restore the model's outputs bit for bit, and complete the logger's run."""
        super().unpatch()
        logger = getattr(self, "logger", None)
        if logger is not None:
            logger.close()


def benjamini_hochberg_routing(
    router_logits: Tensor,
    alpha: float = 0.05,
    temperature: float = 1.0,
    min_k: int = 1,
    max_k: int = 16,
    layer_idx: int = 0,
    kde_models: Kde = None,
    return_stats: bool = False,
    logger: BHRoutingLogger | None = None,
    log_every_n_tokens: int = 100,
    sample_idx: int = 0,
    token_idx: int = 0,
) -> tuple[Any, ...]:
    """Route tokens by BH, as a function of their logits alone.

    Args:
        router_logits: (T, E) or (B, S, E), any float dtype.
        alpha, temperature, min_k, max_k: see BhOptions.
        layer_idx: layer whose null model is used.
        kde_models: the null model, see OLMoERouterPatcher.patch_with_bh; None or {} ranks the
            logits within this call.
        return_stats: also return a dict.
        logger: keeps the decisions of every log_every_n_tokens-th token.
        sample_idx, token_idx: sequence of the first row, and its position; with (B, S, E) logits
            batch row b is sequence sample_idx + b.

    Returns:
        weights (..., E) float32, 0 for experts not selected, summing to 1 in each row; experts
        (..., max_k) int64 by first choice, -1 beyond the count; counts (...) int64; and with
        return_stats a dict of p_values (..., E) float64, critical_values (E,) float64,
        selected_mask (..., E) bool and num_selected (...).

    Raises:
        InvalidOption: an option is out of range.
        KdeMismatch: the null model has no such layer.
    """
    shape, E = router_logits.shape[:-1], router_logits.shape[-1]
    null = null_of(kde_models)
    kind: Any = "empirical" if null is None else "kde"
    options = BhOptions(alpha, min_k, max_k, temperature, True, kind)
    min_k, max_k = options.bounds(E)
    logits = router_logits.reshape(-1, E)
    keys = finite_keys(logits)
    if null is None:
        _warn_of_the_larger_logits()
        warn_of_few_rows(len(keys), alpha)
        order, n_rejected = empirical_order(keys, alpha, None)
    else:
        null.require((layer_idx,), E)
        order, n_rejected = TorchNull(null[layer_idx], Bh(alpha), E).order(keys)
    scores = (keys / temperature).softmax(dim=-1).nan_to_num(nan=0.0)
    # a row without a finite logit has no router to fall back to: its first experts, equal weights
    own = order[:, :max_k]
    even = torch.full(own.shape, 1 / max_k, device=keys.device)
    choice = select(keys, order, n_rejected, scores, own, even, min_k=min_k, max_k=max_k)
    choice = weigh(choice, Weighing(renormalize=True))
    slots = torch.arange(max_k, device=keys.device) < choice.n_selected[:, None]
    weights = torch.zeros_like(keys).scatter_add(1, choice.experts, choice.weights * slots)
    experts = torch.where(slots, choice.experts, -1)
    if logger is not None:
        routing = Routing("bh", options)
        per_sequence = shape[-1] if len(shape) == 2 else max(1, len(logits))
        for start in range(0, len(logits), per_sequence):
            rows = slice(start, start + per_sequence)
            logger.log_decisions(
                logits[rows],
                type(choice)(
                    experts=choice.experts[rows],
                    weights=choice.weights[rows],
                    n_selected=choice.n_selected[rows],
                    n_rejected=choice.n_rejected[rows],
                    decided=None,
                ),
                routing=routing,
                kde=null,
                layer=layer_idx,
                sequence=sample_idx + start // per_sequence,
                position=token_idx,
                every=log_every_n_tokens,
            )
    result = (
        weights.reshape(*shape, E),
        experts.reshape(*shape, max_k),
        choice.n_selected.reshape(shape),
    )
    if not return_stats:
        return result
    if null is None:
        p = empirical_p_values(keys).reshape(router_logits.shape)
    else:
        p = compute_pvalues_kde(router_logits, layer_idx, null)
    selected = torch.zeros_like(keys, dtype=torch.bool).scatter(1, choice.experts, slots)
    stats = {
        "p_values": p,
        "critical_values": torch.from_numpy(critical_values(alpha, E)),
        "selected_mask": selected.reshape(*shape, E),
        "num_selected": result[2],
    }
    return (*result, stats)


def compute_pvalues_kde(logits: Tensor, layer_idx: int, kde_models: Kde) -> Tensor:
    """P-values under a layer's null model: float64, the shape and device of logits.

    Raises:
        KdeMismatch: there is no null model, or it has no such layer.
    """
    null = null_of(kde_models)
    if null is None:
        raise KdeMismatch(
            "there is no null model in kde_models; compute_pvalues_empirical needs none"
        )
    null.require((layer_idx,), logits.shape[-1])
    p = null[layer_idx].p_value(logits.detach().double().cpu().numpy())
    return torch.from_numpy(p).to(logits.device)


def compute_pvalues_empirical(logits: Tensor) -> Tensor:
    """P-values by rank within these rows, float64, the shape of logits (..., E)."""
    _warn_of_the_larger_logits()
    keys = finite_keys(logits.reshape(-1, logits.shape[-1]))
    return empirical_p_values(keys).reshape(logits.shape)


def null_of(given: Kde) -> KdeModel | None:
    """The null model that a notebook passes; None where it passes none.

    Args:
        given: a file, a folder of older pickles, what load_kde_models returns, or {layer: item}
            with items of such a model or of arrays "x" (G,) and "cdf" (G,).

    Raises:
        CorruptKde: a file or an item is no null model.
        KdeMismatch: it is something else.
    """
    if given is None or isinstance(given, KdeModel):
        return given
    if isinstance(given, str | Path):
        return load_kde_models(given)
    if not isinstance(given, Mapping):
        raise KdeMismatch(
            f"the null model is a {type(given).__name__}; pass what load_kde_models returns, or "
            '{layer: {"x": ..., "cdf": ...}}'
        )
    layers = {int(layer): _layer_null(int(layer), item) for layer, item in given.items()}
    return KdeModel(layers) if layers else None


def _layer_null(layer: int, item: Any) -> LayerNull:
    if isinstance(item, LayerNull):
        return item
    name = f"layer {layer} of the null model"
    if not isinstance(item, Mapping):
        raise CorruptKde(f"{name} is a {type(item).__name__}; expected a dict of x and cdf")
    arrays = {str(key): np.asarray(values) for key, values in item.items()}
    return LayerNull(layer, (curve_of(arrays, name, source="a notebook"),))


@cache  # once
def _warn_of_the_larger_logits() -> None:
    warn(
        "empirical p-values count the logits of a batch that are at least as large (>=), the "
        "token's own among them; earlier notebooks counted strictly larger ones (>), so that the "
        "largest had p = 0 and noise was rejected: of 50 tokens of noise at 64 experts and alpha "
        "0.6 they took 5.0 experts a token, where 2.0 are rejected here",
        stacklevel=3,
    )
