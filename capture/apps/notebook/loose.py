"""Loose rows: decisions that came from function calls, to be written as a run of their own."""

import numpy as np
import torch
from torch import Tensor

from bhlog.capture.contract.errors import RouterLogError
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.routers.routing import Choice
from bhlog.capture.writing.stage import Staged
from bhlog.capture.writing.writer import Block


class LooseRows:
    """Decisions that came from function calls, one layer at a time."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[tuple[int, int], tuple[Tensor, ...]]] = {}
        self.setting: tuple[Routing, KdeModel | None] = (Routing(), None)

    def add(
        self, logits: Tensor, choice: Choice, layer: int, sequence: int, position: int, every: int
    ) -> None:
        mine = self.rows.setdefault(layer, {})
        for t in range(len(logits)):
            if (position + t) % every == 0:
                mine[sequence, position + t] = (
                    logits[t].detach().float().cpu(),
                    choice.experts[t].cpu(),
                    choice.weights[t].float().cpu(),
                    choice.n_selected[t].cpu(),
                    choice.n_rejected[t].cpu(),
                )

    def block(self, layers: tuple[int, ...]) -> tuple[Block, int]:
        """The tokens that every layer has, as a block for the writer, and E."""
        tokens = sorted(set.intersection(*(set(rows) for rows in self.rows.values())))
        if not tokens:
            raise RouterLogError("no token was logged at every layer: nothing to save")
        names = ("logits", "experts", "weights", "n_selected", "n_rejected")
        tensors = {
            name: torch.stack(
                [torch.stack([self.rows[layer][t][i] for t in tokens]) for layer in layers]
            )
            for i, name in enumerate(names)
        }
        T = len(tokens)
        tensors["position"] = torch.tensor([position for _, position in tokens])
        tensors["keep"] = torch.ones(T, dtype=torch.bool)
        sequence = np.array([sequence for sequence, _ in tokens], dtype=np.uint32)
        block = Block(
            staged=Staged(tensors, n_bytes=0),
            layers=layers,
            sequence=sequence,
            forward=sequence,
            phase=np.zeros(T, dtype=np.int8),
        )
        return block, tensors["logits"].shape[-1]
