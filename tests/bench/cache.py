"""Caches of experts: hit rates of real route traces beside published ones, and what a replay costs.

python -m tests.bench.cache [TRACE.route.csv=BUDGET ...] [--forwards N]

A trace is an engine's CSV (turn,phase,step,layer,slot,expert,...), as BigMoeOnEdge writes it. Its
authors count one lookup for each different expert of a layer's batch, a prompt being one batch.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bhlog.analysis.cache.hits import CACHES, Budget, cache_hits
from bhlog.analysis.cache.touches import Touches


def read_trace(path: Path) -> tuple[Touches, dict[int, int], float]:
    """A trace's steps, bytes of an expert by layer, and the share of a decoded token's experts that
    the token before it had, over layers."""
    sizes: dict[int, int] = {}
    experts: dict[tuple[int, ...], set[int]] = defaultdict(set)
    tokens: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# layer="):
            facts = dict(fact.split("=") for fact in line[2:].split())
            sizes[int(facts["layer"])] = int(facts["expert_bytes"])
        elif line[:1].isdigit():
            turn, phase, step, layer, _, expert = map(int, line.split(",")[:6])
            experts[turn, phase, step if phase else 0, layer].add(expert)  # in the file's order
            tokens[turn, phase, step, layer].add(expert)
    steps = [sorted(found) for found in experts.values()]
    touched = Touches(
        np.array([key[3] for key in experts]),
        np.array([key[1] for key in experts]),
        np.cumsum([0, *map(len, steps)]),
        np.concatenate([np.array(step) for step in steps]),
    )
    shared = [
        len(found & tokens[turn, phase, step - 1, layer]) / len(found)
        for (turn, phase, step, layer), found in tokens.items()
        if phase and (turn, phase, step - 1, layer) in tokens
    ]
    return touched, sizes, float(np.mean(shared))


def drawn(forwards: int, layers: int, n_experts: int, k: int) -> Touches:
    """Steps of decoding whose experts are drawn at Zipf's frequencies, each layer its own order."""
    rng = np.random.default_rng(0)
    weight = np.log(1 / np.arange(1, n_experts + 1))
    ranked = np.stack([rng.permutation(n_experts) for _ in range(layers)])
    noise = rng.gumbel(size=(forwards, layers, n_experts))
    top = np.argsort(-(weight + noise), axis=2)[:, :, :k]
    experts = np.sort(np.take_along_axis(ranked[None], top, axis=2), axis=2)
    S = forwards * layers
    return Touches(
        np.tile(np.arange(layers), forwards),
        np.ones(S, dtype=np.int64),
        np.arange(S + 1) * k,
        experts.reshape(-1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", nargs="*", metavar="TRACE=BUDGET")
    parser.add_argument("--forwards", type=int, default=10_000)
    asked = parser.parse_args()
    for text in asked.traces:
        path, _, budget = text.rpartition("=")
        steps, sizes, shared = read_trace(Path(path))
        log = SimpleNamespace(n_experts=128, layers=tuple(sizes))
        found: dict[str, object] = {}
        for cache in CACHES:
            counts = cache_hits(steps, Budget.of(budget), cache, log, sizes)
            (prompt, decode), both = (counts[1] / counts[0]).tolist(), counts.sum(axis=1)
            found[cache] = {"prefill": prompt, "decode": decode, "both": float(both[1] / both[0])}
        about = {"trace": Path(path).name, "budget": budget, "adjacent_overlap": shared}
        print(json.dumps(about | found))
    L, E, k = 16, 64, 8
    steps, log = (
        drawn(asked.forwards, L, E, k),
        SimpleNamespace(n_experts=E, layers=tuple(range(L))),
    )
    seconds: dict[str, float] = {}
    for budget in ("16", "256B"):  # a byte an expert: 256 of 1,024 over all layers
        for cache in CACHES:
            cache_hits(drawn(2, L, E, k), Budget.of(budget), cache, log, dict.fromkeys(range(L), 1))
            start = time.perf_counter()
            cache_hits(steps, Budget.of(budget), cache, log, dict.fromkeys(range(L), 1))
            seconds[f"{cache} {budget}"] = time.perf_counter() - start
    print(json.dumps({"forwards": asked.forwards, "layers": L, "experts": E, "k": k} | seconds))


if __name__ == "__main__":
    main()
