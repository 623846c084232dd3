"""The interface of earlier notebooks: a patcher for OLMoE and BH routing as a function."""

from pathlib import Path
from typing import Any, Self
from warnings import warn

import torch
from torch import Tensor, nn

from bhlog.capture.apps.notebook.logger import BHRoutingLogger
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch, UnsupportedModel
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.null.pickles import load_kde_models
from bhlog.capture.contract.rule import BhOptions, Renormalize, critical_values
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.routers.routing import (
    TorchNull,
    Weighing,
    empirical_order,
    empirical_p_values,
    finite_keys,
    select,
    weigh,
)


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
        kde: KdeModel | str | Path | None = None,
        renormalize: Renormalize = "model",
    ) -> Self:
        """Route by BH until `unpatch()`; patching again starts afresh.

        Args:
            collect_stats: keep counts per layer in `stats`.
            logger: keeps every decision; None copies and keeps nothing.
            kde: the null model: a file, a folder of older pickles, or loaded. Without one,
                p-values rank the logits of the batch at hand, which a warning announces.

        Others: see BhOptions.
        """
        self.unpatch()
        null = load_kde_models(kde) if isinstance(kde, str | Path) else kde
        if null is None:
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
    kde_models: KdeModel | None = None,
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
        kde_models: the null model; None ranks the logits within this call.
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
    options = BhOptions(alpha, min_k, max_k, temperature, True, _p_value_kind(kde_models))
    min_k, max_k = options.bounds(E)
    logits = router_logits.reshape(-1, E)
    keys = finite_keys(logits)
    if kde_models is None:
        order, n_rejected = empirical_order(keys, alpha, None)
    else:
        kde_models.require((layer_idx,), E)
        order, n_rejected = TorchNull(kde_models[layer_idx], alpha, E).order(keys)
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
                kde=kde_models,
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
    if kde_models is None:
        p = compute_pvalues_empirical(router_logits)
    else:
        p = compute_pvalues_kde(router_logits, layer_idx, kde_models)
    selected = torch.zeros_like(keys, dtype=torch.bool).scatter(1, choice.experts, slots)
    stats = {
        "p_values": p,
        "critical_values": torch.from_numpy(critical_values(alpha, E)),
        "selected_mask": selected.reshape(*shape, E),
        "num_selected": result[2],
    }
    return (*result, stats)


def compute_pvalues_kde(logits: Tensor, layer_idx: int, kde_models: KdeModel) -> Tensor:
    """P-values under a layer's null model: float64, the shape and device of logits.

    Raises:
        KdeMismatch: the null model has no such layer.
    """
    kde_models.require((layer_idx,), logits.shape[-1])
    p = kde_models[layer_idx].p_value(logits.detach().double().cpu().numpy())
    return torch.from_numpy(p).to(logits.device)


def compute_pvalues_empirical(logits: Tensor) -> Tensor:
    """P-values by rank within these rows, float64, the shape of logits (..., E)."""
    keys = finite_keys(logits.reshape(-1, logits.shape[-1]))
    return empirical_p_values(keys).reshape(logits.shape)


def _p_value_kind(kde_models: KdeModel | None) -> Any:
    if kde_models is not None and not isinstance(kde_models, KdeModel):
        raise KdeMismatch(
            f"kde_models is a {type(kde_models).__name__}; pass what load_kde_models returns"
        )
    return "empirical" if kde_models is None else "kde"
