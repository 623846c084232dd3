"""The kernels, where this machine can run them."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Kernel = Any  # a triton.JITFunction: kernel[grid](*arguments)


@dataclass(frozen=True)
class Kernels:
    """Triton functions, and functions that run some; each module says what its own takes."""

    cross_entropy: Kernel
    select_rows: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    select_rows_in_graph: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


@cache
def kernels() -> Kernels | None:
    """The kernels, tried once on the current CUDA device; None where Triton cannot build them."""
    if importlib.util.find_spec("triton") is None:
        return None
    from bhlog.capture.kernels.row_loss import cross_entropy_kernel
    from bhlog.capture.kernels.selection import select_rows, select_rows_in_graph

    try:
        _try(cross_entropy_kernel)
    except Exception as error:  # whatever a build on this machine may lack
        first = (str(error).splitlines() or [""])[0]
        warnings.warn(f"no Triton kernels, a little slower: {first}", stacklevel=2)
        return None
    return Kernels(cross_entropy_kernel, select_rows, select_rows_in_graph)


@cache
def experts_kernel() -> Kernel | None:
    """capture.kernels.products.experts_of_used_pairs, tried once; None where it cannot be built."""
    if kernels() is None or torch.cuda.get_device_capability() < (8, 0):
        return None
    from bhlog.capture.kernels.products import experts_of_used_pairs

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    slots = torch.zeros(1, 1, device="cuda")
    weights = torch.zeros(1, 32, 16, **options), torch.zeros(1, 16, 16, **options)
    try:
        experts_of_used_pairs(
            torch.zeros(1, 16, **options), slots.long(), slots, *weights, most_pairs=1
        )
    except Exception as error:  # as above
        first = (str(error).splitlines() or [""])[0]
        warnings.warn(f"no Triton kernel for experts, they take longer: {first}", stacklevel=2)
        return None
    return experts_of_used_pairs


def _try(cross_entropy_kernel: Callable[..., Any]) -> None:
    logits = torch.zeros(1, 2, device="cuda")
    target = torch.zeros(1, dtype=torch.int64, device="cuda")
    cross_entropy_kernel[(1,)](logits, target, torch.empty(1, device="cuda"), 2, 2, 4096)  # type: ignore[index]
