"""BH routing of each row in one kernel: from a router's logits to experts and weights.

Imported only where Triton is installed. Experts and counts are those of
bhlog.capture.contract.rule bit for bit; weights are computed in float32 and rounded once, to the
dtype of the router's own.
"""

from typing import Any

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]
from torch import Tensor
from torch.library import triton_op, wrap_triton


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _keys(row, experts, n_experts):  # type: ignore[no-untyped-def]
    """Logits of a row as float32, NaN and infinities as -inf."""
    x = tl.load(row + experts, mask=experts < n_experts, other=float("-inf")).to(tl.float32)
    return tl.where(tl.abs(x) < float("inf"), x, float("-inf"))  # NaN is below nothing


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def selection_kernel(  # type: ignore[no-untyped-def]
    logits,
    thresholds,
    own_experts,
    own_weights,
    experts,
    weights,
    n_selected,
    n_rejected,
    n_experts,
    top_k,
    n_slots,
    min_k,
    max_k,
    TEMPERATURE: tl.constexpr,
    EPS: tl.constexpr,
    FLOOR: tl.constexpr,
    SCALE: tl.constexpr,
    SIGMOID: tl.constexpr,
    OVER_CHOSEN: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SKIP: tl.constexpr,
    CENTRE: tl.constexpr,
    LANES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program per row, a lane per expert: each counts the experts that come before its own."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, LANES)
    inside = expert < n_experts
    key = _keys(logits + row * n_experts, expert, n_experts)
    rank = tl.zeros([LANES], tl.int32)
    for first in range(0, n_experts, CHUNK):
        other = first + tl.arange(0, CHUNK)
        theirs = _keys(logits + row * n_experts, other, n_experts)
        larger = theirs[None, :] > key[:, None]
        tied = (theirs[None, :] == key[:, None]) & (other[None, :] < expert[:, None])
        before = (larger | tied) & (other[None, :] < n_experts)
        rank += tl.sum(before.to(tl.int32), axis=1)
    tested = key
    if CENTRE:  # less the lower median of the finite logits, as capture.contract.null.centre
        n_finite = tl.sum((inside & (key > float("-inf"))).to(tl.int32), axis=0)
        middle = inside & (rank == n_finite // 2) & (key > float("-inf"))
        tested = tl.minimum(key - tl.sum(tl.where(middle, key, 0.0), axis=0), 3.4028234663852886e38)
    passes = inside & (tested >= tl.load(thresholds + rank, mask=inside, other=float("inf")))
    rejected = tl.max(tl.where(passes, rank + 1, 0), axis=0)
    selected = tl.minimum(tl.maximum(rejected, min_k), max_k)
    chosen = inside & (rank < selected)
    largest = tl.max(key, axis=0)
    if SIGMOID:
        score = tl.sigmoid(key / TEMPERATURE)
    else:
        score = tl.exp((key - largest) / TEMPERATURE)
        if OVER_CHOSEN:
            score = tl.where(chosen, score, 0.0)
        score = score / tl.sum(tl.where(inside, score, 0.0), axis=0)
    weight = tl.where(chosen, score, 0.0)
    if RENORMALIZE:
        total = tl.maximum(tl.sum(weight, axis=0), FLOOR) + EPS
        weight = weight / tl.where(total > 0, total, 1.0)
    weight = weight * SCALE
    if not largest > float("-inf"):  # nothing to decide by: the router's own choice
        rejected = 0
        selected = top_k
        rank = expert + top_k
        weight = tl.zeros([LANES], tl.float32)
        for slot in range(0, top_k):
            own = tl.load(own_experts + row * top_k + slot).to(tl.int32)
            rank = tl.where(expert > own, rank - 1, rank)
        for slot in range(0, top_k):
            own = tl.load(own_experts + row * top_k + slot).to(tl.int32)
            rank = tl.where(expert == own, slot, rank)
            own_weight = tl.load(own_weights + row * top_k + slot).to(tl.float32)
            weight = tl.where(expert == own, own_weight, weight)
    tl.store(n_rejected + row, rejected)
    tl.store(n_selected + row, selected)
    place = row * n_slots + rank
    kept = inside & (rank < n_slots)
    chosen_expert = tl.where(rank < selected, expert, n_experts) if SKIP else expert
    tl.store(experts + place, chosen_expert.to(experts.dtype.element_ty), mask=kept)
    tl.store(weights + place, weight.to(weights.dtype.element_ty), mask=kept)


def select_rows(
    logits: Tensor,
    thresholds: Tensor,
    own_experts: Tensor,
    own_weights: Tensor,
    min_k: int,
    max_k: int,
    skip: bool,
    sigmoid: bool,
    temperature: float,
    renormalize: bool,
    over_chosen: bool,
    eps: float,
    floor: float,
    scale: float,
    centre: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Route rows of logits by BH.

    Args:
        logits: (T, E) float32, bfloat16 or float16 on CUDA.
        thresholds: (E,) float32 on the same device.
        own_experts, own_weights: (T, top_k), what rows without a finite logit keep.
        min_k, max_k: bounds on experts a row.
        skip: whether unused slots hold E; else the experts next in order.
        sigmoid: whether scores are sigmoids; else a softmax over all experts.
        temperature: divides the logits for their scores.
        renormalize, over_chosen, eps, floor, scale: see bhlog.capture.routers.routing.Weighing.
        centre: whether logits less their row's median are held against the thresholds.

    Returns:
        (T, K) experts and weights in the dtypes of the router's own, (T,) int32 n_selected and
        n_rejected; K is the larger of max_k and top_k, at most E.
    """
    return _launch(selection_kernel, **locals())


@triton_op("bhlog::select_rows", mutates_args=())  # type: ignore[untyped-decorator, unused-ignore]
def select_rows_in_graph(
    logits: Tensor,
    thresholds: Tensor,
    own_experts: Tensor,
    own_weights: Tensor,
    min_k: int,
    max_k: int,
    skip: bool,
    sigmoid: bool,
    temperature: float,
    renormalize: bool,
    over_chosen: bool,
    eps: float,
    floor: float,
    scale: float,
    centre: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`select_rows` as an operator, for graphs of torch.compile."""
    return _launch(wrap_triton(selection_kernel), **locals())


def _launch(
    kernel: Any,
    logits: Tensor,
    thresholds: Tensor,
    own_experts: Tensor,
    own_weights: Tensor,
    min_k: int,
    max_k: int,
    skip: bool,
    sigmoid: bool,
    temperature: float,
    renormalize: bool,
    over_chosen: bool,
    eps: float,
    floor: float,
    scale: float,
    centre: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, E), own = logits.shape, own_experts.shape[1]
    K = min(E, max(max_k, own))
    experts, weights = own_experts.new_empty(T, K), own_weights.new_empty(T, K)
    n_selected = torch.empty(T, dtype=torch.int32, device=logits.device)
    n_rejected = torch.empty(T, dtype=torch.int32, device=logits.device)
    lanes = max(16, 1 << (E - 1).bit_length())
    kernel[(T,)](
        logits.contiguous(),
        thresholds,
        own_experts.contiguous(),
        own_weights.contiguous(),
        experts,
        weights,
        n_selected,
        n_rejected,
        E,
        own,
        K,
        min_k,
        max_k,
        TEMPERATURE=temperature,
        EPS=eps,
        FLOOR=floor,
        SCALE=scale,
        SIGMOID=sigmoid,
        OVER_CHOSEN=over_chosen,
        RENORMALIZE=renormalize,
        SKIP=skip,
        CENTRE=centre,
        LANES=lanes,
        CHUNK=min(lanes, 32),
        num_warps=max(1, min(4, lanes // 64)),
    )
    return experts, weights, n_selected, n_rejected
