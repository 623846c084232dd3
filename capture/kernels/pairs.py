"""Sorting pairs of a token and an expert by expert; imported only where Triton is installed."""

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, unused-ignore]


@dataclass(frozen=True, eq=False)
class SortedPairs:
    """Used pairs by rising expert, and by token within one; everything is int32 on the device.

    Attributes:
        pairs: (T * K,), at each place the pair there, row by row; unset beyond the used ones.
        places: (T * K,), where each pair is; -1 if it is unused.
        tiles: (3 * n_tiles + 1,), for each tile its expert, first place, and the place after the
            expert's last; the last number is how many tiles there are.
        n_tiles: at most so many.
    """

    pairs: torch.Tensor
    places: torch.Tensor
    tiles: torch.Tensor
    n_tiles: int


def sorted_pairs(experts: torch.Tensor, n_experts: int, rows: int) -> SortedPairs:
    """Sort the used pairs, and cut each expert's into tiles of at most so many rows.

    Args:
        experts: (T, K) integers, contiguous; what is outside 0 to n_experts - 1 is unused.
    """
    P = experts.numel()
    n_tiles = min(P, P // rows + n_experts)
    pairs, places, tiles = (
        torch.empty(n, dtype=torch.int32, device=experts.device) for n in (P, P, 3 * n_tiles + 1)
    )
    lanes = max(16, triton.next_power_of_2(n_experts))
    sizes = {"BLOCK": _BLOCK, "LANES": lanes, "ROWS": rows}
    if P <= _BLOCK:
        place_few_kernel[(1,)](experts, pairs, places, tiles, P, n_experts, n_tiles, **sizes)
        return SortedPairs(pairs, places, tiles, n_tiles)
    n_blocks = triton.cdiv(P, _BLOCK)
    counts = torch.zeros(n_experts * n_blocks, dtype=torch.int32, device=experts.device)
    count_kernel[(n_blocks,)](experts, counts, P, n_experts, n_blocks, BLOCK=_BLOCK)
    place_kernel[(n_blocks + triton.cdiv(n_tiles, _TILES),)](
        experts,
        counts,
        counts.cumsum(0, dtype=torch.int32),
        pairs,
        places,
        tiles,
        P,
        n_experts,
        n_blocks,
        n_tiles,
        TILES=_TILES,
        **sizes,
    )
    return SortedPairs(pairs, places, tiles, n_tiles)


_BLOCK, _TILES = 128, 64  # pairs, and tiles, that a program sorts or writes


@triton.jit(do_not_specialize=["n_pairs", "n_blocks"])  # type: ignore[misc, untyped-decorator, unused-ignore]
def count_kernel(experts, counts, n_pairs, n_experts, n_blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """counts[expert, block]: how many of a block's pairs an expert has. One program per block."""
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(experts + pair, mask=pair < n_pairs, other=n_experts).to(tl.int32)
    used = (expert >= 0) & (expert < n_experts)
    tl.atomic_add(counts + expert * n_blocks + block, 1, mask=used, sem="relaxed")


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _place(experts, counts, ends, pairs, places, n_pairs, n_experts, n_blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sort a block's pairs by expert, stably: pairs[place], and places[pair], -1 if unused."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    pair = block * BLOCK + lane
    expert = tl.load(experts + pair, mask=pair < n_pairs, other=n_experts).to(tl.int32)
    used = (expert >= 0) & (expert < n_experts)
    before = (expert[None, :] == expert[:, None]) & (lane[None, :] < lane[:, None])
    end = tl.load(ends + expert * n_blocks + block, mask=used, other=0)
    count = tl.load(counts + expert * n_blocks + block, mask=used, other=0)
    place = end - count + tl.sum(before.to(tl.int32), axis=1)
    tl.store(pairs + place, pair, mask=used)
    tl.store(places + pair, tl.where(used, place, -1), mask=pair < n_pairs)


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _cut(expert, start, end, tile, tiles, n_tiles, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """tiles[i] = (expert, first place, place after the expert's last); behind them their number.

    Expert e has the places from start[e] to end[e]; lanes that are no expert have none.
    """
    n = (end - start + ROWS - 1) // ROWS
    last = tl.cumsum(n, axis=0)
    owner = tl.sum((last[None, :] <= tile[:, None]).to(tl.int32), axis=1)
    mine = expert[None, :] == owner[:, None]
    first = start[None, :] + (tile[:, None] - (last - n)[None, :]) * ROWS
    exists = tile < n_tiles
    tl.store(tiles + 3 * tile, owner, mask=exists)
    tl.store(tiles + 3 * tile + 1, tl.sum(tl.where(mine, first, 0), axis=1), mask=exists)
    tl.store(tiles + 3 * tile + 2, tl.sum(tl.where(mine, end[None, :], 0), axis=1), mask=exists)
    tl.store(tiles + 3 * n_tiles + 0 * tile, tl.sum(n, axis=0) + 0 * tile, mask=tile == 0)


@triton.jit(do_not_specialize=["n_pairs", "n_blocks", "n_tiles"])  # type: ignore[misc, untyped-decorator, unused-ignore]
def place_kernel(  # type: ignore[no-untyped-def]
    experts,
    counts,
    ends,
    pairs,
    places,
    tiles,
    n_pairs,
    n_experts,
    n_blocks,
    n_tiles,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sort pairs by expert, and cut each expert's into tiles of at most ROWS.

    The first n_blocks programs sort a block each, the others write TILES tiles each. `ends` is the
    running sum of `counts`.
    """
    block = tl.program_id(0)
    if block < n_blocks:
        _place(experts, counts, ends, pairs, places, n_pairs, n_experts, n_blocks, BLOCK)
    else:
        expert = tl.arange(0, LANES)
        inside = expert < n_experts
        end = tl.load(ends + (expert + 1) * n_blocks - 1, mask=inside, other=0)
        start = tl.load(ends + expert * n_blocks - 1, mask=inside & (expert > 0), other=0)
        tile = (block - n_blocks) * TILES + tl.arange(0, TILES)
        _cut(expert, start, end, tile, tiles, n_tiles, ROWS)


@triton.jit(do_not_specialize=["n_pairs", "n_tiles"])  # type: ignore[misc, untyped-decorator, unused-ignore]
def place_few_kernel(  # type: ignore[no-untyped-def]
    experts,
    pairs,
    places,
    tiles,
    n_pairs,
    n_experts,
    n_tiles,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`count_kernel` and `place_kernel` for at most BLOCK pairs, in one program."""
    pair = tl.arange(0, BLOCK)
    expert = tl.load(experts + pair, mask=pair < n_pairs, other=-1).to(tl.int32)
    used = (expert >= 0) & (expert < n_experts)
    expert = tl.where(used, expert, LANES)
    before = expert[None, :] < expert[:, None]
    before |= (expert[None, :] == expert[:, None]) & (pair[None, :] < pair[:, None])
    place = tl.sum(before.to(tl.int32), axis=1)
    tl.store(pairs + place, pair, mask=used)
    tl.store(places + pair, tl.where(used, place, -1), mask=pair < n_pairs)
    each = tl.arange(0, LANES)
    start = tl.sum((expert[None, :] < each[:, None]).to(tl.int32), axis=1)
    end = tl.sum((expert[None, :] <= each[:, None]).to(tl.int32), axis=1)
    _cut(each, start, end, pair, tiles, n_tiles, ROWS)
