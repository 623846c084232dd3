"""Counts of experts selected, kept on the device while a model runs."""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bhlog.capture.routers.routing import Choice


@dataclass(eq=False)
class LayerStats:
    """Counts of one layer, kept on the device of the first tokens counted until they are read.

    Attributes:
        selected: (E + 1,) int64, tokens by n_selected.
        load: (E,) int64, tokens by expert.
    """

    selected: Tensor
    load: Tensor
    _placed: bool = False
    _lock: Any = field(default_factory=threading.Lock)  # DataParallel counts in several threads

    @classmethod
    def empty(cls, n_experts: int) -> "LayerStats":
        """No token counted yet."""
        zeros = torch.zeros(n_experts + 1, dtype=torch.int64)
        return cls(selected=zeros, load=zeros[1:].clone())

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return int(self.selected.sum())

    @property
    def mean_experts(self) -> float:
        """Experts per token; NaN before the first token."""
        counts = self.selected.double().cpu()
        total = (counts * torch.arange(len(counts), dtype=torch.float64)).sum()
        return float(total / counts.sum())

    def add(self, choice: Choice, keep: Tensor | None) -> None:
        """Count the rows of a forward that are kept (None: all)."""
        n, E = choice.n_selected, len(self.load)
        weight = torch.ones_like(n) if keep is None else keep.to(n.dtype)
        slots = torch.arange(choice.experts.shape[1], device=n.device)
        chosen = (slots < n[:, None]).to(n.dtype) * weight[:, None]
        experts = choice.experts.clamp(max=E - 1)
        with self._lock:
            if not self._placed:
                self.selected, self.load = self.selected.to(n.device), self.load.to(n.device)
                self._placed = True
            home = self.selected.device
            self.selected.index_add_(0, n.to(home), weight.to(home))
            self.load.index_add_(0, experts.reshape(-1).to(home), chosen.reshape(-1).to(home))
