"""Counts of experts that policies take without a test of p-values, in torch.

They are those of bhlog.analysis.replay: bit for bit where logits are compared (topk, minp); where
probabilities are (threshold, topp, entropy), in all rows but those within BOUNDARY of one.
"""

from collections.abc import Callable
from math import floor, inf, log

import torch
from torch import Tensor

from bhlog.capture.contract.named import Entropy, MinP, Named, Threshold, TopK, TopP

Count = Callable[[Tensor], Tensor]


def counter(policy: Named) -> Count:
    """What counts a policy's experts.

    Returns:
        From (T, E) float32 keys, each row falling, with non-finite logits as -inf, to (T,) int64
        experts before the bounds; rows without a finite logit do not matter.
    """
    if isinstance(policy, TopK):
        k = policy.k
        return lambda keys: torch.full_like(keys[:, 0], k, dtype=torch.int64)
    if isinstance(policy, MinP):
        step = float(policy.step)  # exact in float32
        return lambda keys: (keys >= keys[:, :1] + step).sum(dim=-1)
    if isinstance(policy, Threshold):
        q = policy.q
        return lambda keys: (_probability(keys) >= q).sum(dim=-1)
    if isinstance(policy, Entropy):
        entropy = policy

        def share(keys: Tensor) -> Tensor:
            q, E = _probability(keys), keys.shape[1]
            relative: Tensor = -torch.special.xlogy(q, q).sum(dim=-1) / log(E)
            return (entropy.k * relative).ceil().clamp(1, entropy.most(E)).long()

        return share
    assert isinstance(policy, TopP)
    p = policy.p

    def reach(keys: Tensor) -> Tensor:
        short = (_probability(keys).cumsum(dim=-1) < p).sum(dim=-1)
        return torch.minimum(1 + short, keys.isfinite().sum(dim=-1))

    return reach


def ranks_that_pass(policy: TopK, n_experts: int) -> Tensor:
    """(E,) float32 thresholds by which the step-up rule takes k experts, whatever their logits."""
    ranks = torch.arange(n_experts)
    return torch.where(ranks < policy.k, torch.tensor(-inf), torch.tensor(inf))


def most_experts(policy: Named, n_experts: int) -> int:
    """The most that a policy ever takes of itself, so that no slots are kept for more."""
    if isinstance(policy, TopK):
        return min(policy.k, n_experts)
    if isinstance(policy, Threshold):  # so many probabilities of q sum to 1
        return min(max(1, floor((1 + 1e-9) / policy.q)), n_experts)
    if isinstance(policy, Entropy):
        return policy.most(n_experts)
    return n_experts


def _probability(keys: Tensor) -> Tensor:
    """(T, E) float64 softmax of rows that fall, as bhlog.analysis.replay.rows computes it."""
    unnormalized = (keys.double() - keys[:, :1].double()).exp()
    return unnormalized / unnormalized.sum(dim=-1, keepdim=True)
