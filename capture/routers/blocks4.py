"""Blocks of transformers 4, whose gate is a linear layer and whose forward chooses the experts.

There is no router to hook: observing repeats the block's own choice on the gate's logits, and
routing puts another forward on the block, on the instance alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bhlog.capture.changes import Changes

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class GatedBlock:
    """A block, and how it chooses.

    Attributes:
        block: with the experts.
        gate: its linear layer, which gives the logits.
        top_k: experts per token.
        norm_topk_prob: whether it makes the chosen weights sum to 1.
    """

    block: nn.Module
    gate: nn.Module
    top_k: int
    norm_topk_prob: bool

    def attach(self, changes: Changes, hook: Callable[..., Any], *, steer: bool) -> None:
        """See bhlog.capture.routers.family.Router.attach.

        accelerate keeps the block's forward under another name and calls it from its own: then that
        one is replaced.
        """
        if steer:
            name = "_old_forward" if "_old_forward" in vars(self.block) else "forward"
            changes.set(self.block, name, lambda hidden: self._forward(hook, hidden))
            return

        def observe(module: nn.Module, args: Any, logits: Tensor) -> None:
            hook(module, args, self.own_choice(logits))

        changes.after_forward(self.gate, observe, last=True)

    def own_choice(self, logits: Tensor) -> Triple:
        """What the block chooses by these logits, by the operations of its own forward.

        Args:
            logits: (T, E).

        Returns:
            (T, E) logits as given, (T, top_k) weights in their dtype, (T, top_k) int64 experts.
        """
        weights = torch.softmax(logits, dim=1, dtype=torch.float)
        weights, experts = torch.topk(weights, self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(logits.dtype), experts

    def _forward(self, hook: Callable[..., Any], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The block's forward with the experts that hook chooses.

        Args:
            hidden: (B, S, H).

        Returns:
            (B, S, H) output and (T, E) logits.
        """
        block: Any = self.block
        jitter = getattr(block, "jitter_noise", 0.0)
        if block.training and jitter > 0:
            hidden = hidden * torch.empty_like(hidden).uniform_(1.0 - jitter, 1.0 + jitter)
        rows = hidden.reshape(-1, hidden.shape[-1])
        triple = self.own_choice(self.gate(rows))
        logits, weights, experts = hook(self.gate, (rows,), triple) or triple
        output = torch.zeros_like(rows)
        for number, expert in enumerate(block.experts):
            row, slot = torch.where(experts == number)  # an unused slot holds no expert's number
            if len(row):
                answer = expert(rows[row]) * weights[row, slot, None]
                output.index_add_(0, row, answer.to(output.dtype))
        if hasattr(block, "shared_expert"):
            share = torch.sigmoid(block.shared_expert_gate(rows))
            output = output + share * block.shared_expert(rows)
        return output.view(hidden.shape), logits
