"""The kernels, where this machine can run them."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Kernel = Any  # a triton.JITFunction: kernel[grid](*arguments)


@dataclass(frozen=True)
class Kernels:
    """Triton functions; each module says what its own takes."""

    cross_entropy: Kernel
    selection: Kernel


@cache
def kernels() -> Kernels | None:
    """The kernels, tried once on the current CUDA device; None where Triton cannot build them."""
    if importlib.util.find_spec("triton") is None:
        return None
    from bhlog.capture.kernels.cross_entropy import cross_entropy_kernel
    from bhlog.capture.kernels.selection import selection_kernel

    try:
        _try(cross_entropy_kernel)
    except Exception as error:  # whatever a build on this machine may lack
        first = (str(error).splitlines() or [""])[0]
        warnings.warn(f"no Triton kernels, a little slower: {first}", stacklevel=2)
        return None
    return Kernels(cross_entropy_kernel, selection_kernel)


def _try(cross_entropy_kernel: Callable[..., Any]) -> None:
    logits = torch.zeros(1, 2, device="cuda")
    target = torch.zeros(1, dtype=torch.int64, device="cuda")
    cross_entropy_kernel[(1,)](logits, target, torch.empty(1, device="cuda"), 2, 2, 4096)  # type: ignore[index]
