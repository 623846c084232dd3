"""The decision rule in torch: what replaces a router's top-k while a model runs.

Compares the same float32 thresholds with the same float32 logits as contract.bh, so decisions agree
with the offline replay bit for bit. Nothing here waits for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from capture.contract.kde import LayerNull


@dataclass(frozen=True, eq=False)
class Choice:
    """Experts of T rows, ready to be returned by a router.

    Attributes:
        experts: (T, K) int64; beyond n_selected the experts next in order, or the number of
            experts as a sentinel, see `pad`.
        weights: (T, K) float32, 0 beyond n_selected.
        n_selected: (T,) int64.
        n_rejected: (T,) int64, raw BH count before the bounds.
    """

    experts: Tensor
    weights: Tensor
    n_selected: Tensor
    n_rejected: Tensor


class TorchNull:
    """A layer's null model on a device: thresholds at one alpha, and p-values where they order.

    Args:
        null: pooled, or with one curve per expert.
        alpha: BH level.
        n_experts: experts of the layer's router.
    """

    def __init__(self, null: LayerNull, alpha: float, n_experts: int) -> None:
        self._null = null
        self._thresholds = torch.from_numpy(null.thresholds(alpha, n_experts).copy())
        self._on: dict[torch.device, tuple[Tensor, list[tuple[Tensor, ...]]]] = {}

    def order(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each row from the first choice on, and n_rejected.

        Args:
            keys: (T, E) float32, non-finite logits as -inf.

        Returns:
            (T, E) int64 order and (T,) int64 n_rejected.
        """
        thresholds, curves = self._at(keys.device)
        if self._null.pooled:
            sorted_keys, order = keys.sort(dim=-1, descending=True, stable=True)
            return order, _last_rank(sorted_keys >= thresholds)
        # the smallest rank whose threshold the expert reaches, E if none
        reached = torch.searchsorted(-thresholds.T.contiguous(), -keys.T.contiguous()).T
        ranks = torch.arange(keys.shape[1], device=keys.device)
        n_reached = (reached[:, :, None] <= ranks).sum(dim=1)  # (T, E)
        p = torch.stack([_p_value(keys[:, i], *curve) for i, curve in enumerate(curves)], dim=1)
        return p_value_order(keys, p), _last_rank(n_reached >= ranks + 1)

    def _at(self, device: torch.device) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        if device not in self._on:
            curves = [
                tuple(
                    torch.as_tensor(value, dtype=torch.float64, device=device)
                    for value in (curve.x0, curve.dx, curve.tail)
                )
                for curve in self._null.curves
                if not self._null.pooled
            ]
            self._on[device] = (self._thresholds.to(device), curves)
        return self._on[device]


def finite_keys(logits: Tensor) -> Tensor:
    """(T, E) float32 logits with NaN and infinities replaced by -inf, so that they rank last."""
    wide = logits.detach().float()
    return torch.where(wide.isfinite(), wide, -torch.inf)


def empirical_order(keys: Tensor, alpha: float, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Order and n_rejected by p-values ranked within the batch; see capture.contract.bh.

    Args:
        keys: (T, E) float32, non-finite logits as -inf.
        alpha: BH level.
        keep: (T,) bool, rows that count (not padding); None means all.
    """
    E = keys.shape[1]
    p = empirical_p_values(keys, keep)
    order = p_value_order(keys, p)
    ranks = torch.arange(1, E + 1, device=keys.device, dtype=torch.float64)
    sorted_p = torch.where(keys.isfinite(), p, torch.inf).gather(1, order)
    # k * alpha / E in this order, as in bh.critical_values; E as a tensor, since a device may
    # divide by a plain number through its reciprocal
    critical = ranks * alpha / torch.full_like(ranks, E)
    return order, _last_rank(sorted_p <= critical)


def empirical_p_values(keys: Tensor, keep: Tensor | None = None) -> Tensor:
    """(T, E) float64: the share of kept rows whose logit for the expert is at least as large.

    A batch with a single kept row is ranked across its experts. 1 for non-finite logits.
    """
    T = keys.shape[0]
    pool = keys if keep is None else torch.where(keep[:, None], keys, -torch.inf)
    by_expert = _share_at_least(pool.T.contiguous(), keys.T.contiguous()).T
    n_kept = torch.full((), T, device=keys.device) if keep is None else keep.sum()
    if T == 1:
        return _share_at_least(keys, keys)
    return torch.where(n_kept == 1, _share_at_least(keys, keys), by_expert)


def p_value_order(keys: Tensor, p: Tensor) -> Tensor:
    """Experts by rising p-value, ties by larger logit, then lower index; non-finite last."""
    by_logit = keys.sort(dim=-1, descending=True, stable=True).indices
    finite_p = torch.where(keys.isfinite(), p, torch.inf)
    by_p = finite_p.gather(1, by_logit).sort(dim=-1, stable=True).indices
    return by_logit.gather(1, by_p)


def choose(
    keys: Tensor,
    order: Tensor,
    n_rejected: Tensor,
    scores: Tensor,
    own_experts: Tensor,
    own_weights: Tensor,
    *,
    min_k: int,
    max_k: int,
    renormalize: bool,
    over_chosen: bool = False,
    eps: float = 0.0,
    floor: float = 0.0,
    scale: float = 1.0,
) -> Choice:
    """Bound the counts and weigh the chosen experts; rows with no finite logit keep their own.

    Args:
        keys: (T, E) float32, non-finite logits as -inf.
        order, n_rejected: from TorchNull.order or empirical_order.
        scores: (T, E), the model's score of every expert, or the logit itself if over_chosen.
        own_experts, own_weights: (T, top_k), what the router chose by itself.
        min_k, max_k: bounds on experts per row.
        renormalize: whether the chosen weights are divided by their sum.
        over_chosen: whether weights are the softmax over the chosen experts' scores.
        eps, floor: that sum is at least floor, and eps is added to it.
        scale: factor on the weights, after renormalizing.
    """
    K = max(max_k, own_experts.shape[1])
    E = keys.shape[1]
    K = min(K, E)
    decidable = keys.isfinite().any(dim=-1)
    n_selected = n_rejected.clamp(min_k, max_k)
    experts = order[:, :K]
    weights = scores.gather(1, experts)
    chosen = torch.arange(K, device=keys.device) < n_selected[:, None]
    if over_chosen:
        weights = torch.where(chosen, weights, -torch.inf).softmax(dim=-1).nan_to_num(nan=0.0)
    weights = torch.where(chosen, weights, 0.0)
    if renormalize and not over_chosen:
        total = weights.sum(dim=-1, keepdim=True).clamp(min=floor) + eps
        weights = weights / torch.where(total > 0, total, 1.0)
    if scale != 1.0:
        weights = weights * scale
    own = own_experts.shape[1]
    fallback = torch.nn.functional.pad(own_weights.float(), (0, K - own))
    # a row without finite logits is ordered by index: fill up with experts it did not choose
    unused = torch.ones_like(keys, dtype=torch.bool).scatter(1, own_experts, False)
    rest = unused.float().sort(dim=-1, descending=True, stable=True).indices[:, : K - own]
    own_order = torch.cat([own_experts, rest], dim=1)
    return Choice(
        experts=torch.where(decidable[:, None], experts, own_order),
        weights=torch.where(decidable[:, None], weights.float(), fallback),
        n_selected=torch.where(decidable, n_selected, own),
        n_rejected=torch.where(decidable, n_rejected, 0),
    )


def pad(choice: Choice, n_experts: int) -> Tensor:
    """(T, K) int64 experts whose unused slots hold n_experts, which skips their compute."""
    slots = torch.arange(choice.experts.shape[1], device=choice.experts.device)
    return torch.where(slots < choice.n_selected[:, None], choice.experts, n_experts)


def _last_rank(passes: Tensor) -> Tensor:
    """(T,) int64: the largest rank (from 1) that passes, 0 if none does."""
    ranks = torch.arange(1, passes.shape[1] + 1, device=passes.device)
    return (passes * ranks).amax(dim=-1)


def _share_at_least(pool: Tensor, values: Tensor) -> Tensor:
    """For each value, the share of its row of the pool's finite entries that are as large."""
    sorted_pool = pool.sort(dim=-1).values  # -inf first
    at_least = pool.shape[1] - torch.searchsorted(sorted_pool, values)
    n_finite = pool.isfinite().sum(dim=-1, keepdim=True)
    share = at_least.double() / n_finite.clamp(min=1).double()
    return torch.where(values.isfinite() & (n_finite > 0), share, 1.0)


def _p_value(x: Tensor, x0: Tensor, dx: Tensor, tail: Tensor) -> Tensor:
    """NullCurve.p_value in torch: the same float64 operations in the same order."""
    u = (x.double() - x0) / dx
    last = len(tail) - 1
    cell = u.floor().nan_to_num(nan=0.0).clamp(0, last - 1).long()
    left = tail[cell]
    p = left + (u - cell) * (tail[cell + 1] - left)
    return torch.where(u < 0, 1.0, torch.where(u > last, 0.0, p))
