"""Loads: how often each expert is chosen, as placement of experts reads it."""

import json
from functools import partial
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.exports.wanted import Wanted
from bhlog.analysis.fold import fold
from bhlog.analysis.log import layer_of
from bhlog.analysis.replay.decide import Decider, decider_of
from bhlog.analysis.replay.rows import damaged
from bhlog.analysis.replay.settings import settings_of
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.errors import InvalidOption


class Load:
    """Counts of chosen experts by layer: as logged, or as one policy decides.

    Args:
        n_experts: experts per router.
        decider: what decides; None counts what was logged.
    """

    def __init__(self, n_experts: int, decider: Decider | None = None) -> None:
        self.n_experts, self.decider = n_experts, decider
        self.layers: dict[int, NDArray[np.int64]] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        counts = self.layers.setdefault(layer_of(batch), np.zeros(self.n_experts, np.int64))
        if self.decider is None:
            logged = values_of(batch.column("experts").flatten())
            if len(logged) and logged.max() >= self.n_experts:
                raise damaged(self.n_experts)
            counts += np.bincount(logged, minlength=self.n_experts)
            return
        (policy,) = self.decider.policies
        for rows in self.decider.rows(batch):
            counts += policy.decide(rows).chosen.sum(axis=0)

    def merge(self, other: Self) -> None:
        for layer, counts in other.layers.items():
            mine = self.layers.get(layer, 0)
            self.layers[layer] = mine + counts


def load_of(wanted: Wanted) -> dict[int, NDArray[np.int64]]:
    """(E,) times that each expert was chosen, by layer.

    Raises:
        InvalidOption: no rows match, or see Wanted.decided.
        CorruptShard: experts are logged that cannot be.
        KdeMismatch: there is no null model for an alpha.
    """
    log, alpha = wanted.log, wanted.decided()
    decider: Decider | None = None
    columns: tuple[str, ...] = ("experts",)
    if alpha is not None:
        settings = settings_of(log, [alpha], bounds=wanted.bounds)
        decider = decider_of(log, settings, wanted.kde, wanted.scope)
        columns = decider.columns
    make = partial(Load, log.n_experts, decider)
    whole = decider is not None and decider.whole_groups
    found = fold(log, make, columns, wanted.scope, whole_groups=whole)
    if not any(counts.any() for counts in found.layers.values()):
        raise InvalidOption(f"{log.path}: no experts were chosen{wanted.scope.words}")
    return found.layers


def load(wanted: Wanted) -> bytes:
    """{"logical_count": [...]}: (1, decoder layers, E) whole numbers, one step: the whole run.

    Layers without a router have zeros. SGLang reads it: --init-expert-location FILE.json, which
    places experts by EPLB; so does ktransformers' fork of it, for the experts kept on the GPU.
    """
    counts = np.zeros((1, wanted.decoder_layers, wanted.log.n_experts), np.int64)
    for layer, of in load_of(wanted).items():
        counts[0, layer] = of
    return as_json({"logical_count": counts.tolist()})


def hot(wanted: Wanted) -> bytes:
    """{"pin": [[layer, expert], ...], "hot": ..., "cold": ...}: what to keep and what to let go.

    pin has all experts that were chosen, most often first, as streaming engines take it that fill
    memory in that order: turboquant_mlx's hot_experts.json. hot has, by layer, the fewest experts
    that together serve half of the layer's choices, and cold those that were never chosen.
    """
    loads = load_of(wanted)
    pairs = [(-int(n), layer, i) for layer, of in loads.items() for i, n in enumerate(of) if n]
    hottest: dict[str, list[int]] = {}
    for layer, of in sorted(loads.items()):
        order = np.argsort(-of, kind="stable")
        served = np.cumsum(of[order])
        needed = int(np.searchsorted(2 * served, of.sum())) + 1 if of.any() else 0
        hottest[str(layer)] = order[:needed].tolist()
    cold = {str(layer): np.flatnonzero(of == 0).tolist() for layer, of in sorted(loads.items())}
    return as_json(
        {"pin": [[layer, i] for _, layer, i in sorted(pairs)], "hot": hottest, "cold": cold}
    )


def as_json(data: dict[str, Any]) -> bytes:
    """As a file."""
    return (json.dumps(data) + "\n").encode()
