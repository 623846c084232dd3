"""The decision rule in torch: what replaces a router's top-k while a model runs.

Compares the same float32 thresholds with the same float32 logits as bhlog.capture.contract.rule, so
decisions agree with the offline replay bit for bit. Nothing here waits for the device.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from bhlog.capture.contract.named import Named
from bhlog.capture.contract.null.model import LayerNull


@dataclass(frozen=True, eq=False)
class Choice:
    """Experts of T rows, ready to be returned by a router.

    Attributes:
        experts: (T, K) int64; beyond n_selected the experts next in order, or the number of
            experts as a sentinel, see `select`.
        weights: (T, K) in the dtype of the model's scores, 0 beyond n_selected.
        n_selected: (T,) integers.
        n_rejected: (T,) integers, raw BH count before the bounds.
        decided: (T,) bool, rows with a finite logit; others keep the router's own choice. None
            where the kernel has chosen, whose weights are final.
    """

    experts: Tensor
    weights: Tensor
    n_selected: Tensor
    n_rejected: Tensor
    decided: Tensor | None


@dataclass(frozen=True)
class Weighing:
    """How scores of the chosen experts become their weights.

    Attributes:
        renormalize: whether they are divided by their sum.
        over_chosen: whether weights are the softmax over the chosen experts' scores.
        eps, floor: that sum is at least floor, and eps is added to it.
        scale: factor on the weights, after renormalizing.
    """

    renormalize: bool
    over_chosen: bool = False
    eps: float = 0.0
    floor: float = 0.0
    scale: float = 1.0


class TorchNull:
    """A layer's null model on a device: thresholds of one policy, and p-values where they order.

    Args:
        null: pooled, or with one curve per expert.
        policy: what it decides by.
        n_experts: experts of the layer's router.
    """

    def __init__(self, null: LayerNull, policy: Named, n_experts: int) -> None:
        self._null = null
        self._thresholds = torch.from_numpy(null.thresholds_of(policy, n_experts).copy())
        self._on: dict[torch.device, tuple[Tensor, list[tuple[Tensor, ...]]]] = {}

    def place(self, device: torch.device) -> None:
        """Copy it to a device now."""
        self._at(device)

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
            return order, _last_rank(self._tested(sorted_keys) >= thresholds)
        tested = self._tested(keys)
        # the smallest rank whose threshold the expert reaches, E if none
        reached = torch.searchsorted(-thresholds.T.contiguous(), -tested.T.contiguous()).T
        ranks = torch.arange(keys.shape[1], device=keys.device)
        n_reached = (reached[:, :, None] <= ranks).sum(dim=1)  # (T, E)
        p = torch.stack([_p_value(tested[:, i], *curve) for i, curve in enumerate(curves)], dim=1)
        return p_value_order(keys, p), _last_rank(n_reached >= ranks + 1)

    def _tested(self, keys: Tensor) -> Tensor:
        """LayerNull.tested in torch."""
        return centred(keys) if self.centre else keys

    @property
    def centre(self) -> bool:
        """Whether logits less their row's median are tested."""
        return self._null.centre == "median"

    @property
    def pooled(self) -> bool:
        """Whether all experts have one null distribution, so that logits order them."""
        return self._null.pooled

    def thresholds(self, device: torch.device) -> Tensor:
        """(E,) float32 on a device, if it is pooled."""
        return self._at(device)[0]

    def _at(self, device: torch.device) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        if device not in self._on:
            curves = [
                tuple(
                    torch.as_tensor(value, dtype=torch.float64, device=device)
                    for value in (curve.x0, curve.dx, curve.tail, curve.beyond)
                )
                for curve in self._null.curves
                if not self._null.pooled
            ]
            self._on[device] = (self._thresholds.to(device), curves)
        return self._on[device]


def finite_keys(logits: Tensor) -> Tensor:
    """(T, E) float32 logits with NaN and infinities replaced by -inf, so that they rank last."""
    return logits.detach().float().nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def centred(keys: Tensor) -> Tensor:
    """(T, E) float32 keys less their row's median; see bhlog.capture.contract.null.centre."""
    n_finite = keys.isfinite().sum(dim=-1, keepdim=True)
    falling = keys.sort(dim=-1, descending=True).values
    median = falling.gather(1, (n_finite // 2).clamp(max=keys.shape[1] - 1))
    median = torch.where(n_finite > 0, median, 0.0)
    return (keys - median).clamp(max=torch.finfo(torch.float32).max)


def empirical_order(keys: Tensor, alpha: float, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Order and n_rejected by p-values ranked within the batch; see bhlog.capture.contract.rule.

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


def warn_of_few_rows(rows: int, alpha: float) -> bool:
    """Warn, and tell, if so few rows are ranked among themselves that BH can reject nothing.

    Their p-values are at least 1 / rows, and the largest critical value is alpha. A single row's,
    ranked across its E experts, are k / E, and none is at most k * alpha / E.
    """
    few = rows > 0 and 1 / rows > alpha
    if few:
        warnings.warn(
            f"p-values that rank a forward of {rows} row{'s' * (rows != 1)} are at least "
            f"{1 / rows:.3g}: BH at alpha {alpha:g} rejects nothing there, and tokens get min_k "
            "experts, as in decoding one token at a time; route by a null model: kde=",
            stacklevel=3,
        )
    return few


def p_value_order(keys: Tensor, p: Tensor) -> Tensor:
    """Experts by rising p-value, ties by larger logit, then lower index; non-finite last."""
    by_logit = keys.sort(dim=-1, descending=True, stable=True).indices
    finite_p = torch.where(keys.isfinite(), p, torch.inf)
    by_p = finite_p.gather(1, by_logit).sort(dim=-1, stable=True).indices
    return by_logit.gather(1, by_p)


def select(
    keys: Tensor,
    order: Tensor,
    n_rejected: Tensor,
    scores: Tensor,
    own_experts: Tensor,
    own_weights: Tensor,
    *,
    min_k: int,
    max_k: int,
    skip: bool = False,
) -> Choice:
    """Bound the counts and take the chosen experts' scores as they are; see `weigh`.

    Args:
        keys: (T, E) float32, non-finite logits as -inf.
        order, n_rejected: from TorchNull.order or empirical_order.
        scores: (T, E), the model's score of every expert.
        own_experts, own_weights: (T, top_k), what the router chose by itself: rows with no finite
            logit keep it.
        min_k, max_k: bounds on experts per row.
        skip: whether unused slots hold the number of experts, which skips their compute, rather
            than the experts next in order.
    """
    E, own = keys.shape[1], own_experts.shape[1]
    K = min(E, max(max_k, own))
    decided = keys.isfinite().any(dim=-1)
    n_selected = n_rejected.clamp(min_k, max_k)
    experts = order[:, :K]
    slots = torch.arange(K, device=keys.device)
    chosen = slots < n_selected[:, None]
    weights = torch.where(chosen, scores.gather(1, experts), 0.0)
    fallback = torch.nn.functional.pad(own_weights.to(scores.dtype), (0, K - own))
    # a row without finite logits is ordered by index: fill up with experts it did not choose
    unused = torch.ones_like(keys, dtype=torch.bool).scatter(1, own_experts, False)
    rest = unused.float().sort(dim=-1, descending=True, stable=True).indices[:, : K - own]
    experts = torch.where(decided[:, None], experts, torch.cat([own_experts, rest], dim=1))
    n_selected = torch.where(decided, n_selected, own)
    if skip:
        experts = torch.where(slots < n_selected[:, None], experts, E)
    return Choice(
        experts=experts,
        weights=torch.where(decided[:, None], weights, fallback),
        n_selected=n_selected,
        n_rejected=torch.where(decided, n_rejected, 0),
        decided=decided,
    )


def weigh(choice: Choice, weighing: Weighing) -> Choice:
    """Make the scores of the chosen experts their weights, in rows that were decided."""
    assert choice.decided is not None
    weights = choice.weights
    if weighing.over_chosen:
        slots = torch.arange(weights.shape[1], device=weights.device)
        chosen = slots < choice.n_selected[:, None]
        weights = torch.where(chosen, weights, -torch.inf).softmax(dim=-1)
        weights = torch.where(chosen, weights, 0.0)
    elif weighing.renormalize:
        total = weights.sum(dim=-1, keepdim=True).clamp(min=weighing.floor) + weighing.eps
        weights = weights / torch.where(total > 0, total, 1.0)
    if weighing.scale != 1.0:
        weights = weights * weighing.scale
    if weights is choice.weights:
        return choice
    weights = torch.where(choice.decided[:, None], weights, choice.weights)
    return Choice(choice.experts, weights, choice.n_selected, choice.n_rejected, choice.decided)


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


def _p_value(x: Tensor, x0: Tensor, dx: Tensor, tail: Tensor, beyond: Tensor) -> Tensor:
    """NullCurve.p_value in torch: the same float64 operations in the same order."""
    u = (x.double() - x0) / dx
    last = len(tail) - 1
    cell = u.floor().nan_to_num(nan=0.0).clamp(0, last - 1).long()
    left = tail[cell]
    p = left + (u - cell) * (tail[cell + 1] - left)
    return torch.where(u < 0, 1.0, torch.where(u > last, beyond, p))
