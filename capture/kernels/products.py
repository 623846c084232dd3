"""The experts of used pairs alone; imported only where Triton is installed.

Pairs of a token and an expert are sorted by expert on the device, and the products read from there
how many there are: no count travels to the host, so a call costs what its used pairs cost, and a
CUDA graph can hold it.
"""

import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]

from bhlog.capture.kernels.pairs import sorted_pairs


@triton.jit(do_not_specialize=["n_tiles", "n_slots"])  # type: ignore[misc, untyped-decorator, unused-ignore]
def gate_up_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    pairs,
    tiles,
    result,
    n_tiles,
    n_slots,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    GELU: tl.constexpr,
):
    """result[place] = act(gate) * up of the pair there: (places, OUT) of x (T, WIDTH).

    weight is (E, 2 OUT, WIDTH), gate before up. Each tile's columns come in turn from gate and from
    up, so that one product holds both. Programs take tiles in turn until there are no more.
    """
    across: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    n = tl.load(tiles + 3 * n_tiles) * across
    for tile in range(tl.program_id(0), n, tl.num_programs(0)):
        down = tile // across
        expert = tl.load(tiles + 3 * down).to(tl.int64)
        row = tl.load(tiles + 3 * down + 1) + tl.arange(0, ROWS)
        full = row < tl.load(tiles + 3 * down + 2)
        pair = tl.load(pairs + row, mask=full, other=0)
        token = (pair // n_slots).to(tl.int64)
        both = tl.arange(0, 2 * COLUMNS)
        column = (tile % across) * COLUMNS + both // 2
        k = tl.arange(0, DEPTH)
        a = x + token[:, None] * WIDTH + k[None, :]
        b = weight + expert * (2 * OUT * WIDTH)
        b += ((both % 2) * OUT + column)[None, :] * WIDTH + k[:, None]
        total = tl.zeros([ROWS, 2 * COLUMNS], tl.float32)
        for first in range(0, WIDTH, DEPTH):
            if WIDTH % DEPTH == 0 and OUT % COLUMNS == 0:
                left = tl.load(a + first)
                right = tl.load(b + first)
            else:
                rest = first + k < WIDTH
                left = tl.load(a + first, mask=rest[None, :], other=0.0)
                right = tl.load(b + first, mask=rest[:, None] & (column < OUT)[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
        gate, up = tl.split(tl.reshape(total, [ROWS, COLUMNS, 2]))
        inside = gate
        if GELU:  # by tanh, which is a sigmoid of twice as much
            inside = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        value = gate / (1 + tl.exp(-inside)) * up
        out = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
        place = result + row.to(tl.int64)[:, None] * OUT + out[None, :]
        tl.store(
            place, value.to(result.dtype.element_ty), mask=full[:, None] & (out < OUT)[None, :]
        )


@triton.jit(do_not_specialize=["n_tiles"])  # type: ignore[misc, untyped-decorator, unused-ignore]
def down_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    tiles,
    result,
    n_tiles,
    WIDTH: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BULK: tl.constexpr,
):
    """result[place] = weight of its expert, (E, OUT, WIDTH), times x[place].

    BULK: x (places, WIDTH) and weight (E * OUT, WIDTH) are tensor descriptors, for the copy engine.
    """
    across: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    n = tl.load(tiles + 3 * n_tiles) * across
    for tile in tl.range(tl.program_id(0), n, tl.num_programs(0), flatten=BULK):
        down = tile // across
        expert = tl.load(tiles + 3 * down)
        start = tl.load(tiles + 3 * down + 1)
        row = start + tl.arange(0, ROWS)
        full = row < tl.load(tiles + 3 * down + 2)
        first_column = (tile % across) * COLUMNS
        column = first_column + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        if BULK:
            for first in range(0, WIDTH, DEPTH):
                right = weight.load([expert * OUT + first_column, first])
                total = tl.dot(x.load([start, first]), right.T, total)
        else:
            k = tl.arange(0, DEPTH)
            a = x + tl.where(full, row, 0).to(tl.int64)[:, None] * WIDTH + k[None, :]
            b = weight + expert.to(tl.int64) * (OUT * WIDTH)
            b += column[None, :] * WIDTH + k[:, None]
            for first in range(0, WIDTH, DEPTH):
                if WIDTH % DEPTH == 0 and OUT % COLUMNS == 0:
                    left = tl.load(a + first)
                    right = tl.load(b + first)
                else:
                    rest = first + k < WIDTH
                    left = tl.load(a + first, mask=rest[None, :], other=0.0)
                    right = tl.load(
                        b + first, mask=rest[:, None] & (column < OUT)[None, :], other=0.0
                    )
                total = tl.dot(left, right, total, input_precision=PRECISION)
        tl.store(
            result + row.to(tl.int64)[:, None] * OUT + column[None, :],
            total.to(result.dtype.element_ty),
            mask=full[:, None] & (column < OUT)[None, :],
        )


@triton.jit(do_not_specialize=["n_slots"])  # type: ignore[misc, untyped-decorator, unused-ignore]
def combine_kernel(y, places, weights, result, n_slots, WIDTH, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """result[t] = sum of weight * y[place] over the slots of t, in float32 in their order."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(0, n_slots):
        place = tl.load(places + t * n_slots + slot).to(tl.int64)
        if place >= 0:
            weight = tl.load(weights + t * n_slots + slot).to(tl.float32)
            total += weight * tl.load(y + place * WIDTH + column, mask=inside).to(tl.float32)
    tl.store(result + t * WIDTH + column, total.to(result.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: tiles of rows x columns, read depth at a time.

    Attributes:
        rows: pairs of one expert; columns: of the down product, half as many of the gate's.
        programs: per multiprocessor.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int


def tiles_for(x: torch.Tensor, pairs_each: float) -> Tiles:
    """What is fast for at most so many pairs an expert, as measured on an H100."""
    if x.element_size() > 2:
        cut = Tiles(16 if pairs_each <= 16 else 32, 64, 32, 4, 2, 4)
    elif pairs_each <= 16:
        cut = Tiles(16, 128, 128, 4, 3, 2)
    elif pairs_each <= 64:
        cut = Tiles(64, 256, 64, 4, 4, 1)
    else:
        cut = Tiles(128, 256, 64, 8, 4, 1)
    stage = (cut.rows + cut.columns) * cut.depth * x.element_size()
    memory = _device(x.device).shared_memory_per_block_optin
    return replace(cut, stages=max(1, min(cut.stages, memory // stage)))


def experts_of_used_pairs(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    gelu: bool = False,
    most_pairs: int,
) -> torch.Tensor:
    """Each token's weighted sum of its experts, down(act(gate) * up), in a few launches.

    Products are summed in float32 and rounded twice to x's dtype, behind the gate and behind the
    down product; the sum over slots is float32 too. The same input gives the same bits.

    Args:
        x: (T, H).
        experts: (T, K) integers; what is outside 0 to E - 1 marks an unused slot.
        weights: (T, K).
        gate_up, down: (E, 2 I, H), gate before up, and (E, H, I), contiguous, in x's dtype.
        gelu: whether the activation is gelu, by tanh, instead of silu.
        most_pairs: slots to hold intermediate results for; more are computed in several parts.

    Returns:
        (T, H) like x.
    """
    (T, H), K, inner = x.shape, experts.shape[1], down.shape[2]
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    if experts.numel() == 0:
        return result.zero_()
    x, experts, weights = x.contiguous(), experts.contiguous(), weights.contiguous()
    part = min(T, max(1, most_pairs // K))
    hidden, y = x.new_empty(part * K, inner), x.new_empty(part * K, H)
    with torch.cuda.device(x.device):
        for first in range(0, T, part):
            now = slice(first, first + part)
            given = x[now], experts[now], weights[now], gate_up, down, gelu
            _part(*given, hidden, y, result[now])
    return result


def _part(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gelu: bool,
    hidden: torch.Tensor,
    y: torch.Tensor,
    result: torch.Tensor,
) -> None:
    (T, K), (E, H, inner) = experts.shape, down.shape
    cut = tiles_for(x, T * K / E)
    order = sorted_pairs(experts, E, cut.rows)
    programs = (_device(x.device).multi_processor_count * cut.programs,)
    common = {
        "ROWS": cut.rows,
        "DEPTH": cut.depth,
        "PRECISION": "ieee",
        "num_warps": cut.warps,
        "num_stages": cut.stages,
    }
    gate_up_kernel[programs](
        x,
        gate_up,
        order.pairs,
        order.tiles,
        hidden,
        order.n_tiles,
        K,
        WIDTH=H,
        OUT=inner,
        COLUMNS=cut.columns // 2,
        GELU=gelu,
        **common,
    )
    operands: tuple[Any, Any] = hidden, down
    bulk = cut.rows >= 128 and _has_copy_engine(x.device) and inner * x.element_size() % 16 == 0
    if bulk:
        from triton.tools.tensor_descriptor import (  # type: ignore[import-not-found, unused-ignore]
            TensorDescriptor,
        )

        operands = (
            TensorDescriptor.from_tensor(hidden, [cut.rows, cut.depth]),
            TensorDescriptor.from_tensor(down.view(E * H, inner), [cut.columns, cut.depth]),
        )
    down_kernel[programs](
        *operands,
        order.tiles,
        y,
        order.n_tiles,
        WIDTH=inner,
        OUT=H,
        COLUMNS=cut.columns,
        BULK=bulk,
        **common,
    )
    block = min(2048, triton.next_power_of_2(H))
    combine_kernel[(T, triton.cdiv(H, block))](y, order.places, weights, result, K, H, BLOCK=block)


@cache
def _device(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


@cache
def _has_copy_engine(device: torch.device) -> bool:
    described = importlib.util.find_spec("triton.tools.tensor_descriptor")  # not in older Triton
    return described is not None and _device(device).major == 9
