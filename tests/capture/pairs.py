"""Pairs of tokens and experts at random, and the slow way to compute them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def make_case(T: int, E: int, K: int, H: int, inner: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    """x, experts, weights, gate_up, down: some slots unused, one expert idle, one busy."""
    rng = torch.Generator().manual_seed(seed)
    experts = torch.rand(T, E, generator=rng).argsort(dim=1)[:, :K]
    experts[experts == 1] = E  # nobody's
    experts[torch.arange(K) > torch.randint(0, K + 1, (T, 1), generator=rng)] = E
    experts[:, 0] = 0  # everybody's; a second slot of it in a row is summed as well
    return (
        torch.randn(T, H, generator=rng),
        experts,
        torch.rand(T, K, generator=rng),
        torch.randn(E, 2 * inner, H, generator=rng) / H**0.5,
        torch.randn(E, H, inner, generator=rng) / inner**0.5,
    )


def slow_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    act: Callable[[Tensor], Tensor] = nn.functional.silu,
) -> Tensor:
    """Every expert on every token, then the weighted sum of those in a used slot."""
    total = torch.zeros_like(x)
    for e in range(len(down)):
        gate, up = (x @ gate_up[e].T).chunk(2, dim=-1)
        weight = (weights * (experts == e)).sum(dim=1, keepdim=True)
        total += weight * ((act(gate) * up) @ down[e].T)
    return total
