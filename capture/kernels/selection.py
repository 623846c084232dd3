"""BH selection of each row in one pass over its logits; imported only where Triton is installed."""

import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _keys(row, experts, n_experts):  # type: ignore[no-untyped-def]
    """Logits of a row as float32, NaN and infinities as -inf."""
    x = tl.load(row + experts, mask=experts < n_experts, other=float("-inf")).to(tl.float32)
    return tl.where(tl.abs(x) < float("inf"), x, float("-inf"))  # NaN is below nothing


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def selection_kernel(  # type: ignore[no-untyped-def]
    logits,
    scores,
    thresholds,
    own_experts,
    own_weights,
    experts,
    weights,
    n_selected,
    n_rejected,
    decided,
    n_experts,
    top_k,
    n_slots,
    min_k,
    max_k,
    SKIP: tl.constexpr,
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
    passes = inside & (key >= tl.load(thresholds + rank, mask=inside, other=float("inf")))
    rejected = tl.max(tl.where(passes, rank + 1, 0), axis=0)
    selected = tl.minimum(tl.maximum(rejected, min_k), max_k)
    weight = tl.load(scores + row * n_experts + expert, mask=inside, other=0.0).to(tl.float32)
    weight = tl.where(rank < selected, weight, 0.0)
    finite = tl.max(key, axis=0) > float("-inf")
    if not finite:  # nothing to decide by: the router's own choice
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
    tl.store(decided + row, finite)
    tl.store(n_rejected + row, rejected.to(tl.int64))
    tl.store(n_selected + row, selected.to(tl.int64))
    place = row * n_slots + rank
    kept = inside & (rank < n_slots)
    chosen = tl.where(rank < selected, expert, n_experts) if SKIP else expert
    tl.store(experts + place, chosen.to(tl.int64), mask=kept)
    tl.store(weights + place, weight, mask=kept)
