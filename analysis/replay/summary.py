"""Summary of decisions: how many experts, how much is kept, how the load is spread."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from bhlog.analysis.kernels.tally import (
    KEPT,
    LOGGED_JACCARD,
    LOGGED_RECALL,
    NATIVE_JACCARD,
    NATIVE_RECALL,
    NONE_REJECTED,
    SUMS,
    tally,
)
from bhlog.analysis.replay.policy import Selection
from bhlog.analysis.replay.rows import damaged


class LayerSummary:
    """Counts of one layer under one setting; adding rows and merging commute.

    Attributes:
        selected: (E + 1,) int64, rows by n_selected.
        load: (E,) int64, rows by chosen expert.
        sums: float64, sums over rows; see bhlog.analysis.kernels.tally.
    """

    def __init__(self, n_experts: int) -> None:
        self.selected = np.zeros(n_experts + 1, dtype=np.int64)
        self.load = np.zeros(n_experts, dtype=np.int64)
        self.sums = np.zeros(SUMS)

    @property
    def rows(self) -> int:
        """Rows that were counted."""
        return int(self.selected.sum())

    @property
    def mean_experts(self) -> float:
        """Mean n_selected."""
        return float(self.selected @ np.arange(len(self.selected)) / self.rows)

    @property
    def probability_kept(self) -> float:
        """Mean softmax probability of the chosen experts."""
        return float(self.sums[KEPT] / self.rows)

    def add(self, selection: Selection, *, top_k: int, temperature: float = 1.0) -> None:
        """Count the rows of a selection.

        Args:
            top_k: experts of the native choice.
            temperature: of the softmax.

        Raises:
            CorruptShard: experts are logged that cannot be.
        """
        rows, n_selected, chosen = selection.rows, selection.n_selected, selection.out_of_order
        nothing = np.empty((0, rows.n_experts), dtype=np.bool_)
        try:
            tally(
                rows.logits,
                n_selected if selection.n_rejected is None else selection.n_rejected,
                n_selected,
                rows.cuts,
                nothing if chosen is None else chosen,
                rows.logged_starts,
                rows.logged_experts,
                top_k,
                float(temperature),
                self.selected,
                self.load,
                self.sums,
            )
        except IndexError as error:
            raise damaged(rows.n_experts) from error

    def merge(self, other: "LayerSummary") -> None:
        """Add the rows of another summary."""
        self.selected += other.selected
        self.load += other.load
        self.sums += other.sums

    def row(
        self, *, min_k: int, max_k: int, top_k: int, native_logged: bool = False
    ) -> dict[str, Any]:
        """The summary as the columns of summary_frame."""
        jaccard, recall = NATIVE_JACCARD, NATIVE_RECALL
        if native_logged:
            jaccard, recall = LOGGED_JACCARD, LOGGED_RECALL
        n, E, mean = self.rows, len(self.load), self.mean_experts
        k = np.arange(E + 1)
        present = k[self.selected > 0]
        cumulative = np.cumsum(self.selected)
        share = self.load / max(1, self.load.sum())
        spread = share[share > 0]
        rising = np.sort(share)
        return {
            "rows": n,
            "mean_experts": mean,
            "sd_experts": float(np.sqrt(self.selected @ (k - mean) ** 2 / n)),
            "min_experts": int(present[0]),
            "median_experts": int(np.searchsorted(cumulative, n / 2)),
            "p95_experts": int(np.searchsorted(cumulative, 0.95 * n)),
            "max_experts": int(present[-1]),
            "at_min_k": float(self.selected[min_k] / n),
            "at_max_k": float(self.selected[max_k] / n),
            "none_rejected": float(self.sums[NONE_REJECTED] / n),
            "probability_kept": self.probability_kept,
            "native_jaccard": float(self.sums[jaccard] / n),
            "native_recall": float(self.sums[recall] / n),
            "logged_jaccard": float(self.sums[LOGGED_JACCARD] / n),
            "logged_recall": float(self.sums[LOGGED_RECALL] / n),
            "load_entropy": float(-(spread * np.log(spread)).sum() / np.log(E)),
            "load_cv": float(share.std() * E),
            "load_gini": max(0.0, float(2 * (rising @ np.arange(1, E + 1)) / E - (E + 1) / E)),
            "busiest_share": float(share.max()),
            "dead_experts": int((self.load == 0).sum()),
            "flops": mean / top_k,
            "histogram": self.selected.tolist(),
        }


def summary_frame(
    layers: Mapping[int, LayerSummary],
    *,
    min_k: int,
    max_k: int,
    top_k: int,
    native_logged: bool = False,
) -> pl.DataFrame:
    """One row per layer, then one over all layers (layer null).

    Args:
        min_k, max_k, top_k: bounds in force, and experts of the native choice.
        native_logged: whether the logged experts are the native choice, as in a native run. In
            others it is the top_k largest logits, ties to the lower index.

    Columns: rows; mean, sd, min, median (the lower of two), p95 and max of n_selected (experts per
    token; p95 is the least number that at least 95 % of the rows do not exceed, as a batch is
    planned by more than its mean); at_min_k, at_max_k, none_rejected (shares of rows);
    probability_kept (mean softmax probability of the chosen experts); native_jaccard,
    native_recall, logged_jaccard, logged_recall (mean overlap of the chosen experts with the native
    choice and with the logged ones); load_entropy (1 is even), load_cv, load_gini (0 is even),
    busiest_share (of all choices), dead_experts (count; summed over layers); flops (expert FLOPs
    relative to the native top-k); histogram (rows by n_selected from 0 to E). Over all layers, load
    figures are means over layers.
    """
    bounds = {"min_k": min_k, "max_k": max_k, "top_k": top_k}
    rows: list[dict[str, Any]] = [
        {"layer": layer, **part.row(**bounds, native_logged=native_logged)}
        for layer, part in sorted(layers.items())
    ]
    if not rows:
        return pl.DataFrame()
    total = LayerSummary(len(next(iter(layers.values())).load))
    for part in layers.values():
        total.merge(part)
    overall: dict[str, Any] = {"layer": None, **total.row(**bounds, native_logged=native_logged)}
    for name in ("load_entropy", "load_cv", "load_gini", "busiest_share"):
        overall[name] = float(np.mean([row[name] for row in rows]))
    overall["dead_experts"] = sum(row["dead_experts"] for row in rows)
    return pl.DataFrame([*rows, overall], infer_schema_length=None)
