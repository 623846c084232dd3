"""Hits: how often the experts that are needed would have been resident, for some budget of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bhlog.analysis.cache.touches import Touches, touches
from bhlog.analysis.fold import WHOLE, Scope
from bhlog.analysis.kernels.residents import BELADY, LFU, LRU, count_hits, next_steps
from bhlog.analysis.log import Log
from bhlog.analysis.replay.decide import Decider
from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.registry import parse_policy
from bhlog.analysis.replay.settings import bounds_of
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import OPEN, Bounds
from bhlog.capture.contract.sizes import bytes_of

CACHES = {"lru": LRU, "lfu": LFU, "pinned": None, "belady": BELADY}
LOGGED = "logged"  # the policy of the experts that the run used

ExpertBytes = int | str | Mapping[int, int]


@dataclass(frozen=True)
class Budget:
    """How much is resident.

    Attributes:
        text: as it was given.
        size: experts of each layer, each with a cache of its own; or bytes of one cache over all.
        shared: whether it is bytes.
    """

    text: str
    size: int
    shared: bool

    @classmethod
    def of(cls, given: int | str) -> Self:
        """A budget from a number of experts, or a size such as "4000MiB".

        Raises:
            InvalidOption: it is neither.
        """
        text = str(given).strip()
        plain = text.isdecimal()
        if not plain and not text[:1].isdecimal():
            raise InvalidOption(
                f"budget {text!r}: expected experts a layer, such as 8, or a size such as 4000MiB"
            )
        size = int(text) if plain else bytes_of(text)
        if size < 1:
            raise InvalidOption(f"budget {text!r}: expected at least 1 expert")
        return cls(text, size, not plain)


def replay_caches(
    log: Log,
    budgets: Iterable[int | str],
    *,
    policies: Sequence[Policy | str] = (),
    kde: KdeModel | None = None,
    expert_bytes: ExpertBytes | None = None,
    bounds: Bounds = OPEN,
    scope: Scope = WHOLE,
) -> pl.DataFrame:
    """Hit rates of caches of experts, over a log in the order that its layers ran.

    A step is one layer of one forward pass; its lookups are the different experts that its tokens
    chose together, each once, whether it holds one token or a whole prompt. What a step misses is
    loaded; after it experts are evicted until the budget holds, those of the step itself last.
    Caches start empty, one set of them for each process (rank) of the run.

    lru evicts the least recently looked up; lfu the one with the fewest lookups so far, evicted
    or not, of equal ones the least recent; belady the one whose next lookup is furthest, which
    no cache that loads what it misses can beat where experts are of one size. pinned holds the
    experts with the most lookups in the whole log, from before its start, and loads no others:
    it alone has no cold misses.

    Args:
        budgets: see Budget.
        policies: what decides, or texts such as "bh:0.3"; none takes the logged experts.
        kde: null model of policies that test; None takes the run's own.
        expert_bytes: of an expert, or by layer; a size budget needs it. None is as the run tells,
            if it does.
        bounds: of policies that have none of their own; where open, as in the run.
        scope: which rows: what is left out is not looked up.

    Returns:
        A row for each policy, budget and cache: policy ("logged", or its text), budget, cache,
        lookups, hit_rate, prefill_lookups, prefill_hit_rate, decode_lookups, decode_hit_rate;
        rates are null without lookups. A step is prefill where any of its tokens is.

    Raises:
        InvalidOption: a budget, or bytes that are missing; no rows, a sample of them.
        KdeMismatch: see Decider.
    """
    sizes = [Budget.of(one) for one in budgets]
    if not sizes:
        raise InvalidOption("name at least one budget, such as 8 or 4000MiB")
    bytes_by_layer = _by_layer(log, log.expert_bytes if expert_bytes is None else expert_bytes)
    if bytes_by_layer is None and any(one.shared for one in sizes):
        raise InvalidOption(
            "a budget in bytes needs the bytes of an expert; give them with --expert-bytes SIZE"
        )
    decider, names = None, [LOGGED]
    if policies:
        wanted = [parse_policy(p) if isinstance(p, str) else p for p in policies]
        decider = Decider(log, wanted, kde, bounds=bounds_of(log, bounds), scope=scope)
        names = [str(policy) for policy in wanted]
    found = touches(log, decider, scope)
    rows = []
    for name, ranks in zip(names, found, strict=True):
        for budget in sizes:
            for cache in CACHES:
                counts = np.zeros((2, 2), dtype=np.int64)
                for steps in ranks:
                    counts += cache_hits(steps, budget, cache, log, bytes_by_layer)
                rows.append(
                    {"policy": name, "budget": budget.text, "cache": cache, **_rates(counts)}
                )
    return pl.DataFrame(rows, schema_overrides=_RATES)


_RATES = dict.fromkeys(("hit_rate", "prefill_hit_rate", "decode_hit_rate"), pl.Float64)


def cache_hits(
    steps: Touches,
    budget: Budget,
    cache: str,
    log: Log,
    expert_bytes: Mapping[int, int] | None = None,
) -> NDArray[np.int64]:
    """(2, 2) lookups and hits of one process, of prefill and of decode.

    Args:
        cache: one of CACHES.
        expert_bytes: by layer, for a budget in bytes.
    """
    E, layers = log.n_experts, np.array(sorted(log.layers))
    per_step = np.diff(steps.starts)
    items = np.repeat(np.searchsorted(layers, steps.layers), per_step) * E + steps.experts
    each = np.ones(len(layers), dtype=np.int64)
    if budget.shared:
        assert expert_bytes is not None
        each = np.array([expert_bytes[layer] for layer in layers], dtype=np.int64)
    of_item = np.repeat(each, E)
    width = len(of_item) if budget.shared else E
    counts = np.zeros((2, 2), dtype=np.int64)
    counts[0] = np.bincount(steps.decode, per_step, minlength=2)
    kind = CACHES[cache]
    if kind is None:
        held = _pinned(np.bincount(items, minlength=len(of_item)), of_item, width, budget.size)
        counts[1] = np.bincount(np.repeat(steps.decode, per_step), held[items], minlength=2)
    else:
        following = next_steps(steps.starts, items, len(of_item))
        count_hits(
            steps.starts,
            items,
            steps.decode,
            following,
            of_item,
            width,
            budget.size,
            kind,
            counts[1],
        )
    return counts


def _pinned(
    lookups: NDArray[np.int64], sizes: NDArray[np.int64], width: int, capacity: int
) -> NDArray[np.bool_]:
    """(I,): the items with the most lookups that fit into their cache, ties to the lower one."""
    held = np.zeros(len(sizes), dtype=np.bool_)
    for start in range(0, len(sizes), width):
        free = capacity
        for item in start + np.argsort(-lookups[start : start + width], kind="stable"):
            if sizes[item] <= free:
                held[item] = True
                free -= sizes[item]
    return held


def _rates(counts: NDArray[np.int64]) -> dict[str, int | float | None]:
    """The columns of one row."""
    both = {"": counts.sum(axis=1), "prefill_": counts[:, 0], "decode_": counts[:, 1]}
    return {
        name: value
        for prefix, (lookups, hits) in both.items()
        for name, value in (
            (f"{prefix}lookups", int(lookups)),
            (f"{prefix}hit_rate", float(hits / lookups) if lookups else None),
        )
    }


def _by_layer(log: Log, given: ExpertBytes | None) -> dict[int, int] | None:
    """Bytes of an expert of each layer.

    Raises:
        InvalidOption: they are no sizes, or not of every layer.
    """
    if given is None:
        return None
    if not isinstance(given, Mapping):
        size = bytes_of(str(given))
        return dict.fromkeys(log.layers, size)
    missing = [layer for layer in log.layers if given.get(layer, 0) < 1]
    if missing:
        raise InvalidOption(f"expert_bytes has no size of layer {missing[0]}")
    return {layer: int(given[layer]) for layer in log.layers}
