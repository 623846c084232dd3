"""Which code computes the experts of a routed model: ours, where it is known to be right.

Ours computes the pairs of a token and an expert that were selected, and nothing for an unused slot.
transformers dispatches its experts by a name in their config: while a model is routed, each of its
experts modules has a config that names ours and is otherwise the model's own. No config is changed,
so other models that share it go on as they were.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bhlog.capture.changes import Changes
from bhlog.capture.kernels.loading import experts_kernel
from bhlog.capture.routers.family import Router

NAME = "bhlog"
SKIPPED = "transformers, unused slots skipped"
COMPUTED = "transformers, unused slots computed"


class ExpertsConfig:
    """The config of one experts module while it is routed.

    Args:
        config: what it is but for the name of the implementation.
        most_pairs_each: slots a token that intermediate results are held for at once.
        compiled: whether a graph of torch.compile may hold the kernels of a GPU.
    """

    _experts_implementation = NAME

    def __init__(self, config: Any, *, most_pairs_each: int, compiled: bool) -> None:
        self.config = config
        self.most_pairs_each = most_pairs_each
        self.compiled = compiled

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


def obstacle(router: Router) -> str | None:
    """Why our code may not compute a router's experts; None if it may."""
    experts: Any = router.experts
    moe = _library()
    if moe is None or experts is None or not _dispatches(experts.__class__):
        return "they are not of the library's common form"
    if not router.family.sentinel:
        return "they cannot have unused slots"
    if getattr(experts, "_is_expert_parallel", False):
        return "they are spread over devices"
    for name, usual in _USUAL.items():
        if getattr(experts, name, usual) != usual:
            return f"{name} is {getattr(experts, name)}"
    if type(experts)._apply_gate is not moe._default_apply_gate:
        return "their gate is their own"
    if [name for name, _ in experts.named_parameters()] != ["gate_up_proj", "down_proj"]:
        return f"their weights are {', '.join(name for name, _ in experts.named_parameters())}"
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if not (type(gate_up) is type(down) is nn.Parameter and down.dtype in _DTYPES):
        return "their weights are quantized or spread over devices"
    E, H, inner = down.shape if down.dim() == 3 else (0, 0, 0)
    if router.n_experts != E or gate_up.shape != (E, 2 * inner, H) or gate_up.dtype != down.dtype:
        return f"their weights are {tuple(gate_up.shape)} and {tuple(down.shape)}"
    if down.is_cuda and activation(experts.act_fn) is None:
        return f"the activation is {type(experts.act_fn).__name__}"
    return None


def take(router: Router, changes: Changes) -> None:
    """Have our code compute a router's experts until the changes are undone."""
    experts: Any = router.experts
    moe = _library()
    assert moe is not None
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, used_pairs)
    # tried before a forward needs it, and before a graph is made of one
    fused = experts.down_proj.is_cuda and experts_kernel() is not None
    _operator()
    # beside the library's own intermediate results, with its top-k, these take half the memory
    most_pairs_each = 2 * router.top_k
    config = ExpertsConfig(experts.config, most_pairs_each=most_pairs_each, compiled=fused)
    changes.set(experts, "config", config)


def implementation(router: Router) -> str:
    """Which code computes a router's experts while it is routed."""
    if router.block is not None or obstacle(router) is None:  # blocks skip unused slots as well
        return NAME
    return SKIPPED if skips_sentinels(router) else COMPUTED


def warn_of_cost(model: nn.Module, routers: Iterable[Router]) -> None:
    """Say so, once, if routing a model may cost more than the experts that it selects."""
    for router in routers:
        how = implementation(router)
        if how != NAME:
            warnings.warn(
                f"routing {type(model).__name__} may cost more than the experts that it selects: "
                f"{obstacle(router)}, so their code is that of {how}",
                stacklevel=2,
            )
            return


def skips_sentinels(router: Router) -> bool:
    """Whether the library's own code can skip unused slots (see Family.sentinel).

    Its experts do once they think that others of them sit on other devices, from transformers 5.23
    on. If others really do, what carries tokens there knows no unused slots.
    """
    spread = getattr(router.experts, "_is_expert_parallel", None)
    return router.family.sentinel and spread is False


def used_pairs(self: Any, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """An experts implementation: each token's weighted sum over the slots that are used.

    Args:
        self: the experts module.
        hidden: (T, H).
        experts: (T, K) integers; the number of experts in an unused slot.
        weights: (T, K).

    Returns:
        (T, H) like hidden.
    """
    gate_up, down = self.gate_up_proj, self.down_proj
    by = activation(self.act_fn)
    needs_gradient = torch.is_grad_enabled() and any(
        t.requires_grad for t in (hidden, weights, gate_up, down)
    )
    if (
        not needs_gradient
        and by is not None
        and gate_up.is_contiguous()
        and down.is_contiguous()
        and (down.dtype != torch.float64 or not hidden.is_cuda)
    ):
        most_pairs = self.config.most_pairs_each * len(hidden)
        given = hidden.to(down.dtype), experts, weights, gate_up, down, by == "gelu", most_pairs
        y: Tensor
        if torch.compiler.is_compiling():
            if self.config.compiled or not hidden.is_cuda:
                y = torch.ops.bhlog.used_pairs(*given)
                return y.to(hidden.dtype)
        elif hidden.is_cuda and experts_kernel() is not None:
            y = _without_gradient(*given)
            return y.to(hidden.dtype)
    slow: Tensor = in_torch(self, hidden, experts, weights)
    return slow


@torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
def in_torch(self: Any, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """`used_pairs` for every device and with gradients; waits for the device once."""
    return _in_torch(hidden, experts, weights, self.gate_up_proj, self.down_proj, self._apply_gate)


def activation(function: object) -> Literal["silu", "gelu"] | None:
    """Which activation of the kernels a function is: silu, gelu by tanh, or neither."""
    name = type(function).__name__
    if name in ("SiLU", "SiLUActivation") or function is nn.functional.silu:
        return "silu"
    by_tanh = name == "GELU" and getattr(function, "approximate", "") == "tanh"
    return "gelu" if by_tanh or name in ("GELUTanh", "PytorchGELUTanh") else None


_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_USUAL = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def _grouped(rows: Tensor, weight: Tensor, n: list[int], ends: Tensor) -> Tensor:
    """Rows sorted by expert, n[e] of each, times their expert's weight (E, out, in)."""
    if (
        rows.is_cuda
        and rows.dtype == torch.bfloat16
        and hasattr(nn.functional, "grouped_mm")
        and all(size % 8 == 0 for size in weight.shape[1:])
        and len(rows)
    ):
        return nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    each = weight.unbind()  # one gradient of the whole, not one for each expert
    parts = [
        nn.functional.linear(part, w)
        for part, w in zip(torch.split(rows, n), each, strict=True)
        if len(part)
    ]
    return torch.cat(parts) if parts else nn.functional.linear(rows, each[0])


def _in_torch(
    hidden: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    apply_gate: Callable[[Tensor], Tensor],
) -> Tensor:
    (T, K), (E, H, _) = experts.shape, down.shape
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=E + 1)[:E]
    n = counts.tolist()
    used = order[: sum(n)]
    ends = counts.cumsum(0, dtype=torch.int32)
    rows = hidden[used // K].to(down.dtype)
    inner = apply_gate(_grouped(rows, gate_up, n, ends))
    y = _grouped(inner, down, n, ends) * weights.reshape(-1)[used, None]
    if y.is_cuda:  # there adding at an index does so in any order
        return y.new_zeros(T * K, H).index_copy(0, used, y).view(T, K, H).sum(1).to(hidden.dtype)
    total = torch.zeros(T, H, dtype=torch.promote_types(y.dtype, torch.float32))
    return total.index_add_(0, used // K, y.to(total.dtype)).to(hidden.dtype)


def _without_gradient(
    hidden: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gelu: bool,
    most_pairs: int,
) -> Tensor:
    """`used_pairs` on the tensors of a module: by the kernels on CUDA, else in torch."""
    if not hidden.is_cuda:
        return _in_torch(hidden, experts, weights, gate_up, down, _GATES[gelu])
    kernel = experts_kernel()
    assert kernel is not None
    options = {"gelu": gelu, "most_pairs": most_pairs}
    result: Tensor = kernel(hidden, experts, weights, gate_up, down, **options)
    return result


def _gate(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def apply(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return function(gate) * up

    return apply


# as the library's own gate, by whether the activation is gelu
_GATES = (_gate(nn.functional.silu), _gate(partial(nn.functional.gelu, approximate="tanh")))


@cache
def _operator() -> None:
    """Register `_without_gradient` as an operator, for graphs of torch.compile."""
    operator = torch.library.custom_op("bhlog::used_pairs", _without_gradient, mutates_args=())
    operator.register_fake(lambda hidden, *others: hidden.new_empty(hidden.shape))


@cache
def _library() -> Any:
    """transformers' module of experts implementations; None before transformers 5."""
    try:
        from transformers.integrations import moe
    except ImportError:
        return None
    return moe


@cache
def _dispatches(kind: type[nn.Module]) -> bool:
    """Whether a class's forward is the one that transformers' decorator puts there."""
    moe = _library()
    probe = moe.use_experts_implementation(type("Probe", (nn.Module,), {"forward": lambda: None}))
    forward, known = kind.forward, probe.forward
    if getattr(forward, "__code__", None) is not known.__code__:
        return False
    cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
    interface = cells.get("experts_interface")
    return interface is None or interface.cell_contents is moe.ALL_EXPERTS_FUNCTIONS
