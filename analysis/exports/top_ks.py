"""Top-ks: a number of experts for each layer, for engines that route by a fixed top-k."""

import json
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.exports.loads import as_json
from bhlog.analysis.exports.wanted import Wanted
from bhlog.analysis.fold import fold
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.analysis.replay.rows import Rows
from bhlog.analysis.replay.settings import bounds_of
from bhlog.analysis.sweep.budget import share_budget
from bhlog.capture.contract.errors import InvalidOption

_ROUNDING = 1e-9  # of a mean of whole numbers


MOST_SCORES = 1 << 28  # bytes: every document of every task has a line


class RankMass:
    """Softmax probability of the k-th largest logit, summed over rows, by layer.

    Args:
        n_experts: experts per router.
    """

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts
        self.rows: dict[int, int] = {}  # those with a finite logit
        self.sums: dict[int, NDArray[np.float64]] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        rows = Rows(logits_of(batch))
        self._add(layer_of(batch), len(rows) - len(rows.undecided), rows.probability.sum(axis=0))

    def merge(self, other: Self) -> None:
        for layer, sums in other.sums.items():
            self._add(layer, other.rows[layer], sums)

    def _add(self, layer: int, rows: int, sums: NDArray[np.float64]) -> None:
        self.rows[layer] = self.rows.get(layer, 0) + rows
        self.sums[layer] = self.sums.get(layer, np.zeros(self.n_experts)) + sums


def topk(wanted: Wanted) -> bytes:
    """{"num_experts_per_tok": [...], "bhlog": {...}}: a k for each decoder layer.

    Together the layers with a router have at least as many experts a token as the budget, spent
    where they keep most of the router's probability (see bhlog.analysis.sweep.budget); places of
    layers without one hold the model's own top-k. vLLM reads such a list out of a config, for
    models whose k differs by layer: --hf-overrides "$(cat FILE)". `bhlog` says what is kept: by
    layer, over all, and with the best k that is the same in every layer at that cost or below; of
    that one also {task: {metric: [score, standard error]}} where bhlog eval made the run and asked
    its benchmarks under that k too (topk:K, or native), null otherwise.

    Raises:
        InvalidOption: no logits, no rows, or bounds that cannot give the budget.
    """
    log, budget = wanted.log, wanted.budget()
    low, high = bounds_of(log, wanted.bounds).resolve(log.n_experts)
    low = max(low, 1)
    if not low <= budget <= high:
        raise InvalidOption(
            f"{budget:.4g} experts a token cannot be had within {low} to {high} in every layer"
        )
    found = fold(log, partial(RankMass, log.n_experts), ("logits",), wanted.scope)
    layers = [layer for layer in sorted(found.sums) if found.rows[layer]]
    if not layers:
        raise InvalidOption(f"{log.path}: no rows with finite logits{wanted.scope.words}")
    kept = np.stack([np.cumsum(found.sums[i] / found.rows[i]) for i in layers])[:, low - 1 : high]
    rows = np.array([found.rows[layer] for layer in layers])
    share = rows / rows.sum()
    ranks = np.tile(np.arange(low, high + 1, dtype=np.float64), (len(layers), 1))
    places = share_budget(ranks, kept, share, budget)
    by_layer = np.take_along_axis(kept, places[:, None], axis=1)[:, 0]
    ks = low + places
    uniform = int(share @ ks + _ROUNDING)  # at that cost or below
    named = "native" if uniform == log.manifest.model.top_k else f"topk-{uniform}"
    whole = [log.manifest.model.top_k] * wanted.decoder_layers
    for layer, k in zip(layers, ks.tolist(), strict=True):
        whole[layer] = k
    return as_json(
        {
            "num_experts_per_tok": whole,
            "bhlog": {
                "layers": layers,
                "mean_experts": float(share @ ks),
                "probability_kept": float(share @ by_layer),
                "probability_kept_by_layer": dict(
                    zip(map(str, layers), by_layer.tolist(), strict=True)
                ),
                "uniform": {
                    "num_experts_per_tok": uniform,
                    "probability_kept": float(share @ kept[:, uniform - low]),
                    "scores": scores_beside(log, named),
                },
            },
        }
    )


def scores_beside(log: Log, named: str) -> dict[str, dict[str, list[float]]] | None:
    """Scores of a setting by task and metric, from the folder of bhlog eval that the run lies in.

    Raises:
        InvalidOption: the file is none of scores.
    """
    path = Path(log.location).parent / "scores" / f"{named}.json"
    if not log.is_local or not path.is_file() or path.stat().st_size > MOST_SCORES:
        return None
    try:
        tasks = json.loads(path.read_bytes())["tasks"]
        return {str(task): dict(found["metrics"]) for task, found in tasks.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidOption(f"{path}: is none of bhlog eval's scores; move it away") from error
