"""Cross entropy in float32 of logits in any dtype, read once."""

import torch
from torch import Tensor

from bhlog.capture.kernels.loading import kernels

_ROWS = 1024  # rows at once without the kernel, to bound their float32 copy


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(T,) float32, -log softmax(logits)[target] in nats.

    On CUDA with Triton it is one kernel that reads the logits once: torch would write a float32
    copy of them, twice their size, and read it again.

    Args:
        logits: (T, V); the entries of a row next to each other in memory.
        targets: (T,) int64 in [0, V).
    """
    if logits.is_cuda and len(targets) and logits.stride(1) == 1:
        fused = kernels()
        if fused is not None:
            result = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
            with torch.cuda.device(logits.device):
                fused.cross_entropy[(len(targets),)](
                    logits, targets.contiguous(), result, logits.stride(0), logits.shape[1], 4096
                )
            return result
    parts = []
    for i in range(0, len(targets), _ROWS):
        log_p = torch.log_softmax(logits[i : i + _ROWS], dim=-1, dtype=torch.float32)
        parts.append(-log_p.gather(1, targets[i : i + _ROWS, None])[:, 0])
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)
