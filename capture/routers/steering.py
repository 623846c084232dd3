"""What takes the place of a router's own choice: a policy on its logits, weights of the chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bhlog.capture.contract.named import TopK
from bhlog.capture.contract.null.model import LayerNull
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.kernels.loading import Kernels, kernels
from bhlog.capture.routers.counts import Count, counter, most_experts, ranks_that_pass
from bhlog.capture.routers.family import Router
from bhlog.capture.routers.routing import (
    Choice,
    TorchNull,
    Weighing,
    empirical_order,
    finite_keys,
    select,
    weigh,
)


@dataclass(frozen=True, eq=False)
class Steering:
    """How one router is routed by a policy.

    Attributes:
        router: whose choice it replaces.
        null: of its layer; None ranks the batch at hand, or nothing where `count` counts.
        count: what counts experts by their logits; None tests p-values.
        thresholds: (E,) float32, of a pooled null or what stands for them: what kernels compare.
        alpha: the level of BH that decides alike.
        temperature: see BhOptions.
        min_k, max_k: bounds on experts a row; max_k no more than the policy takes of itself.
        renormalize: whether weights are made to sum to 1.
        weighing: how scores become weights.
        skip: whether unused slots hold the number of experts, which skips their compute.
        fused: the kernels that choose on CUDA; None where they cannot.
    """

    router: Router
    null: TorchNull | None
    count: Count | None
    thresholds: Tensor | None
    alpha: float
    temperature: float
    min_k: int
    max_k: int
    renormalize: bool
    weighing: Weighing
    skip: bool
    fused: Kernels | None

    @classmethod
    def of(
        cls, router: Router, options: BhOptions, layer_null: LayerNull | None, *, skip: bool
    ) -> "Steering":
        """The policy of these options and this null model, placed where the router is."""
        E, policy = router.n_experts, options.named
        min_k, max_k = options.bounds(E)
        max_k = max(min_k, min(max_k, most_experts(policy, E)))
        renormalize = options.renormalizes(router.norm_topk_prob)
        alpha = options.level(E)
        null = None if layer_null is None else TorchNull(layer_null, policy, E)
        weight = next(router.module.parameters(), None)
        placed = weight is not None and not weight.is_meta
        fused, thresholds = None, None
        if null is not None and weight is not None and placed:
            null.place(weight.device)  # no forward waits for it, no graph is made anew
            thresholds = null.thresholds(weight.device) if null.pooled else None
        elif isinstance(policy, TopK) and weight is not None and placed:
            thresholds = ranks_that_pass(policy, E).to(weight.device)
        if thresholds is not None and thresholds.is_cuda:
            fused = kernels() if router.scoring in ("softmax", "sigmoid") else None
        return cls(
            router,
            null,
            None if policy.tests else counter(policy),
            thresholds,
            alpha,
            options.temperature,
            min_k,
            max_k,
            renormalize,
            router.weighing(renormalize),
            skip,
            fused,
        )

    @property
    def ranks_rows(self) -> bool:
        """Whether rows of a forward are ranked among themselves."""
        return self.null is None and self.count is None

    def choose(
        self, logits: Tensor, own_experts: Tensor, own_weights: Tensor, keep: Tensor | None
    ) -> Choice:
        """Experts and weights of each row.

        Args:
            logits: (T, E), as the router returned them.
            own_experts, own_weights: (T, top_k), its own choice: rows with no finite logit keep it.
            keep: (T,) bool, rows that are tokens (None: all), which p-values are ranked among.

        Returns:
            Weights in the dtype of own_weights.
        """
        if self.fused is not None and logits.is_cuda and not logits.requires_grad:
            return self._fused(self.fused, logits, own_experts, own_weights)
        keys = finite_keys(logits)
        scored = keys
        if logits.requires_grad:  # the decision has no gradient; weights carry theirs to the router
            scored = torch.where(keys.isfinite(), logits.float(), -torch.inf)
        scores = self.router.scores(
            scored, self.temperature, logits.dtype, renormalize=self.renormalize
        )
        if self.count is not None:
            falling, order = keys.sort(dim=-1, descending=True, stable=True)
            ranked = order, self.count(falling)
        elif self.null is None:
            ranked = empirical_order(keys, self.alpha, keep)
        else:
            ranked = self.null.order(keys)
        choice = select(
            keys,
            *ranked,
            scores,
            own_experts,
            own_weights,
            min_k=self.min_k,
            max_k=self.max_k,
            skip=self.skip,
        )
        choice = weigh(choice, self.weighing)
        return Choice(
            choice.experts.to(own_experts.dtype),
            choice.weights.to(own_weights.dtype),
            choice.n_selected,
            choice.n_rejected,
            choice.decided,
        )

    def _fused(
        self, fused: Kernels, logits: Tensor, own_experts: Tensor, own_weights: Tensor
    ) -> Choice:
        assert self.thresholds is not None
        compiled = torch.compiler.is_compiling()
        rows = fused.select_rows_in_graph if compiled else fused.select_rows
        chosen = rows(
            logits,
            self._thresholds_on(logits.device),
            own_experts,
            own_weights,
            self.min_k,
            self.max_k,
            self.skip,
            self.router.scoring == "sigmoid",
            self.temperature,
            self.weighing.renormalize,
            self.weighing.over_chosen,
            self.weighing.eps,
            self.weighing.floor,
            self.weighing.scale,
            self.null is not None and self.null.centre,
        )
        return Choice(*chosen, decided=None)

    def _thresholds_on(self, device: torch.device) -> Tensor:
        """(E,) float32: those of the null are on every device that asks for them."""
        assert self.thresholds is not None
        return self.thresholds.to(device) if self.null is None else self.null.thresholds(device)
