"""Caches of experts: hit rates of real route traces beside published ones, and what a replay costs.

python -m tests.bench.cache [TRACE.route.csv=BUDGET ...] [--forwards N]

A trace is an engine's CSV (turn,phase,step,layer,slot,expert,...), as BigMoeOnEdge writes it. Its
authors count one lookup for each different expert of a layer's batch, a prompt being one batch.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from bhlog.analysis.cache.hits import CACHES, Budget, cache_hits
from bhlog.analysis.cache.touches import Touches
from bhlog.analysis.engines.formats import read_trace
from bhlog.analysis.engines.writing import write_trace
from bhlog.analysis.run import Run, open_log

COLUMNS = ("layer", "sequence", "position", "experts")


def overlap(run: Run) -> float:
    """The share of a decoded token's experts that the token before it had, over layers."""
    experts: dict[tuple[int, int, int], set[int]] = {}
    for group in run.row_groups():
        batch = run.read(group, COLUMNS, "phase = 'decode'")
        for layer, sequence, position, chosen in zip(*batch.to_pydict().values(), strict=True):
            experts[layer, sequence, position] = set(chosen)
    shared = [
        len(found & experts[layer, sequence, position - 1]) / len(found)
        for (layer, sequence, position), found in experts.items()
        if (layer, sequence, position - 1) in experts
    ]
    return float(np.mean(shared))


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
        found: dict[str, object] = {}
        with tempfile.TemporaryDirectory() as folder:
            write_trace(read_trace("route-trace", path), Path(folder) / "run")
            run = open_log(Path(folder) / "run")
            for row in run.cache(budget).to_dicts():
                names = {
                    "prefill": "prefill_hit_rate",
                    "decode": "decode_hit_rate",
                    "both": "hit_rate",
                }
                found[row["cache"]] = {name: row[column] for name, column in names.items()}
            shared = overlap(run)
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
