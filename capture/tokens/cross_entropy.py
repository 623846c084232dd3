"""Cross entropy in float32 of logits in any dtype, read once."""

import importlib.util
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

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
        kernel = _kernel()
        if kernel is not None:
            result = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
            with torch.cuda.device(logits.device):
                kernel[(len(targets),)](
                    logits, targets.contiguous(), result, logits.stride(0), logits.shape[1], 4096
                )
            return result
    parts = []
    for i in range(0, len(targets), _ROWS):
        log_p = torch.log_softmax(logits[i : i + _ROWS], dim=-1, dtype=torch.float32)
        parts.append(-log_p.gather(1, targets[i : i + _ROWS, None])[:, 0])
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)


@cache
def _kernel() -> Any:
    """The kernel, tried once; None where Triton is missing or has no compiler to work with."""
    if importlib.util.find_spec("triton") is None:
        return None
    from capture.tokens.cross_entropy_kernel import cross_entropy_kernel

    logits = torch.zeros(1, 2, device="cuda")
    result = torch.empty(1, device="cuda")
    try:
        target = torch.zeros(1, dtype=torch.int64, device="cuda")
        cross_entropy_kernel[(1,)](logits, target, result, 2, 2, 4096)
    except Exception as error:  # whatever a build on this machine may lack
        first = (str(error).splitlines() or [""])[0]
        warnings.warn(f"token losses without Triton, a little slower: {first}", stacklevel=2)
        return None
    return cross_entropy_kernel
