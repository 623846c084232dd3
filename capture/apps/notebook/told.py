"""What a logger tells of its run in JSON: single decisions, and a summary."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.log import Log, layer_of
from bhlog.analysis.replay.decide import p_values_of
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.null.model import KdeModel

MOST_JSON_DECISIONS = 10_000  # the JSON log is for reading; the run holds every decision


def json_decisions(log: Log, every: int) -> list[dict[str, Any]]:
    """Decisions as the JSON log keeps them, in order of token, then layer.

    Args:
        every: keep the positions that are a multiple of it.
    """
    columns = ["sequence", "position", "layer", "token_id", "phase", "experts", "weights",
               "n_selected", "n_rejected", "logits", "forward", "rank"]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for batch, p in _first_tokens(log, columns, every, MOST_JSON_DECISIONS):
        for i, row in enumerate(batch.to_pylist()):
            rows.append(
                {
                    "sample_idx": row["sequence"],
                    "token_idx": row["position"],
                    "layer_idx": row["layer"],
                    "token_id": row["token_id"],
                    "num_selected": row["n_selected"],
                    "num_rejected": row["n_rejected"],
                    "selected_experts": row["experts"],
                    "weights": row["weights"],
                    "logits": row["logits"],
                    "p_values": None if p is None else p[i].tolist(),
                }
            )
    rows.sort(key=lambda r: (r["sample_idx"], r["token_idx"], r["layer_idx"]))
    return rows[:MOST_JSON_DECISIONS]


def summary_of(log: Log) -> dict[str, Any]:
    """Counts over a run; see BHRoutingLogger.get_summary."""
    options = log.manifest.routing.options
    E = log.n_experts
    low, high = options.bounds(E) if options else (0, E)
    counts = np.zeros(E + 1, dtype=np.int64)
    p_values = _Moments()
    columns = ["layer", "logits", "n_selected", "forward", "rank"]
    for batch in log.batches(columns):
        counts += np.bincount(values_of(batch.column("n_selected")), minlength=E + 1)
        p = _p_values(batch, log.kde, options is not None)
        if p is not None:
            p_values.add(p)
    total = int(counts.sum())
    if total == 0:
        return {"total_decisions": 0}
    k = np.arange(E + 1)
    mean = float(counts @ k / total)
    return {
        "total_decisions": total,
        "total_tokens": log.manifest.totals.tokens,
        "experts_selected": {
            "mean": mean,
            "std": float(np.sqrt(counts @ (k - mean) ** 2 / total)),
            "min": int(k[counts > 0].min()),
            "max": int(k[counts > 0].max()),
        },
        "ceiling_hit_rate": float(counts[high] / total),
        "floor_hit_rate": float(counts[low] / total),
        "p_values": p_values.summary(),
    }


class _Moments:
    """Mean, spread and extremes of p-values seen in pieces."""

    def __init__(self) -> None:
        self.n, self.total, self.squares = 0, 0.0, 0.0
        self.low, self.high = np.inf, -np.inf
        self.below = {0.01: 0, 0.05: 0, 0.1: 0}

    def add(self, p: NDArray[np.float64]) -> None:
        p = p[np.isfinite(p)]
        if not len(p):
            return
        self.n += len(p)
        self.total += float(p.sum())
        self.squares += float((p**2).sum())
        self.low, self.high = min(self.low, float(p.min())), max(self.high, float(p.max()))
        for bound in self.below:
            self.below[bound] += int((p < bound).sum())

    def summary(self) -> dict[str, float] | None:
        if not self.n:
            return None
        mean = self.total / self.n
        return {
            "mean": mean,
            "std": float(np.sqrt(max(0.0, self.squares / self.n - mean**2))),
            "min": self.low,
            "max": self.high,
            **{f"share_below_{bound}": n / self.n for bound, n in self.below.items()},
        }


def _p_values(batch: Any, kde: KdeModel | None, bh: bool) -> NDArray[np.float64] | None:
    """(T, E) float64 p-values of a batch of one layer; None for a run that has none."""
    if kde is None and not bh:
        return None
    return p_values_of(batch, None if kde is None else kde[layer_of(batch)])


def _first_tokens(
    log: Log, columns: list[str], every: int, most_rows: int
) -> Iterator[tuple[Any, NDArray[np.float64] | None]]:
    """The first tokens at every `every`-th position: most_rows rows over all layers, or a few more.

    Returns:
        Batches of one layer, each with its (T, E) p-values, ranked within whole forwards.
    """
    missing = dict.fromkeys(log.layers, -(-most_rows // len(log.layers)))
    bh = log.manifest.routing.options is not None
    for batch in log.batches(columns):
        layer = layer_of(batch) if batch.num_rows else log.layers[0]
        kept = np.flatnonzero(values_of(batch.column("position")) % every == 0)[: missing[layer]]
        if len(kept):
            p = _p_values(batch, log.kde, bh)
            yield batch.take(pa.array(kept)), None if p is None else p[kept]
            missing[layer] -= len(kept)
        if not any(missing.values()):
            return
