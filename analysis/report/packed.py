"""Packed: a profile as the page carries it, exact at the alphas and bounds that it keeps.

Counts are sums along alpha's grid of integers, so a page computes from them what Profile computes,
to the bit. What does not fit is left out by whole alphas and whole bounds, never rounded.
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.sweep.critical import ONE
from bhlog.analysis.sweep.profile import Profile

MOST_CELLS = 2_000_000  # counts of a page, over all its profiles
MOST_BYTES = 900_000  # that they take
MOST_KEPT = 130_000  # sums of probabilities, which compress less
MOST_BOUNDS = 128  # ranks kept one by one; beyond, bounds grow by steps
_ASKED = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of bhlog sweep


@dataclass(frozen=True)
class Named:
    """A profile, and what it is of.

    Attributes:
        name: of the run and the null model, in legends.
        profile: what the page computes from.
        top_k: experts per token under the model's own routing.
        command: the words of `bhlog sweep` before its settings.
        alpha: to begin with; None takes 0.05.
    """

    name: str
    profile: Profile
    top_k: int
    command: str
    alpha: float | None = None


def pack(named: Named, *, share: int = 1, most: int | None = None) -> dict[str, Any]:
    """A profile for JSON, with as many alphas as the page has room for.

    Args:
        share: of how many profiles on the page this is one: they share the room.
        most: counts, over all of them; None is MOST_CELLS.

    Returns:
        What `named` says; rows (by layer); alphas; bounds (ranks at which min_k and max_k may
        lie); min_k and max_k (of the run; None: they differ), counts: base64 of
        deflated (layer, rank, alpha) rows that newly reach a rank; sums: the same summed over the
        ranks up to each bound, None where bounds are all ranks; kept: probability summed so,
        at the alphas `stops`; noise: rows by layer and sums of the shuffled sample, None of an
        older profile; left_out: a sentence on what the page does not carry, or "".
    """
    profile, E = named.profile, named.profile.n_experts
    bounds = bounds_of(E)
    cells = len(profile.layers) * len(bounds) * share
    most = MOST_CELLS if most is None else most
    alphas = _within(profile.alphas, max(16, most // cells), named.alpha)
    counts, sums = [], []
    for layer in profile.layers:
        reached = np.cumsum(profile.counts[layer][:, :-1], axis=1)[:, alphas]
        counts.append(_steps(reached[bounds[1:] - 1]))
        if len(bounds) <= E:
            sums.append(_steps(np.cumsum(reached, axis=0)[bounds[1:] - 1]))
    packed = deflated(np.stack(counts))
    if len(packed) * share > MOST_BYTES and len(alphas) > 64:
        return pack(named, share=share, most=most * 3 // 4)
    stops, kept = _kept(profile, bounds, alphas, cells)
    low, high = (None, None) if profile.bounds is None else profile.bounds.resolve(E)
    return {
        "name": named.name,
        "command": named.command,
        "top_k": named.top_k,
        "alpha": named.alpha,
        "n_experts": E,
        "layers": list(profile.layers),
        "rows": [profile.rows(layer) for layer in profile.layers],
        "one": ONE,
        "alphas": profile.alphas[alphas].tolist(),
        "bounds": bounds.tolist(),
        "min_k": low,
        "max_k": high,
        "counts": packed,
        "sums": deflated(np.stack(sums)) if sums else None,
        "stops": stops.tolist(),
        "kept": kept,
        "noise": _noise(profile, bounds, alphas),
        "left_out": _left_out(profile, bounds, alphas, stops),
    }


def bounds_of(n_experts: int) -> NDArray[np.int64]:
    """Ranks at which bounds may lie, from 0 to all experts."""
    if n_experts <= MOST_BOUNDS:
        return np.arange(n_experts + 1)
    steps = np.geomspace(8, n_experts, 25).round().astype(np.int64)
    return np.unique(np.concatenate([np.arange(9), steps]))


def _within(grid: NDArray[np.float64], most: int, own: float | None = None) -> NDArray[np.int64]:
    """At most about so many places: what people ask for, and as even as can be in log alpha."""
    if len(grid) <= most:
        return np.arange(len(grid))
    asked = [a for a in (*_ASKED, own) if a is not None and a in grid]
    wanted = np.geomspace(grid[0], grid[-1], max(2, most - len(asked)))
    near = np.searchsorted(grid, wanted, side="right") - 1
    return np.unique(np.concatenate([near.clip(0), np.searchsorted(grid, asked)]).astype(np.int64))


def _kept(
    profile: Profile, bounds: NDArray[np.int64], alphas: NDArray[np.int64], cells: int
) -> tuple[NDArray[np.int64], dict[str, str] | None]:
    """Places among `alphas` at which the probability kept is known, and its sums."""
    if profile.kept is None:
        return np.zeros(0, np.int64), None
    stops = _within(profile.alphas[alphas], max(16, MOST_KEPT // cells))
    reached, always = [], []
    for layer in profile.layers:
        by_rank = np.cumsum(profile.kept[layer], axis=0)[bounds[1:] - 1]
        reached.append(_steps(np.cumsum(by_rank[:, :-1], axis=1)[:, alphas[stops]]))
        always.append(by_rank.sum(axis=1))
    return stops, {"reached": deflated(np.stack(reached)), "always": deflated(np.stack(always))}


def _noise(
    profile: Profile, bounds: NDArray[np.int64], alphas: NDArray[np.int64]
) -> dict[str, Any] | None:
    if profile.noise is None:
        return None
    sums = []
    for layer in profile.layers:
        reached = np.cumsum(profile.noise[layer][:, :-1], axis=1)[:, alphas]
        sums.append(_steps(np.cumsum(reached, axis=0)[bounds[1:] - 1]))
    rows = [int(profile.noise[layer][0].sum()) for layer in profile.layers]
    return {"rows": rows, "sums": deflated(np.stack(sums))}


def _steps(rising: NDArray[np.int64]) -> NDArray[np.int64]:
    """Along the last axis, each value less the one before: small numbers deflate well."""
    return np.diff(rising, axis=-1, prepend=0)


def deflated(values: NDArray[np.int64]) -> str:
    """Integers of at least 0, below 2^53, as base64: zlib over their bytes, the lowest first."""
    planes = np.ascontiguousarray(values, dtype="<u8").view(np.uint8).reshape(-1, 8).T
    return base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()


def _left_out(
    profile: Profile,
    bounds: NDArray[np.int64],
    alphas: NDArray[np.int64],
    stops: NDArray[np.int64],
) -> str:
    parts = []
    if len(alphas) < len(profile.alphas):
        parts.append(f"{len(alphas):,} of the profile's {len(profile.alphas):,} alphas")
    if len(bounds) <= profile.n_experts:
        parts.append(f"{len(bounds):,} of {profile.n_experts + 1:,} bounds")
    if 0 < len(stops) < len(alphas):
        parts.append(f"the probability kept at {len(stops):,} alphas")
    return f"To stay small, this page holds {_and(parts)}." if parts else ""


def _and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
