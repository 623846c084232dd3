"""Summary of decisions: how many experts, how much is kept, how the load is spread."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from analysis.replay.ranked import RankedRows, packed, popcount


class LayerSummary:
    """Counts of one layer under one setting; adding rows and merging commute.

    Attributes:
        selected: (E + 1,) int64, rows by n_selected.
        load: (E,) int64, rows by chosen expert.
        none_rejected: rows with n_rejected = 0.
        kept: sum over rows of the softmax probability of the chosen experts.
        native, logged: sums over rows of (Jaccard, recall) with the native top-k and with the
            logged experts.
    """

    def __init__(self, n_experts: int) -> None:
        self.selected = np.zeros(n_experts + 1, dtype=np.int64)
        self.load = np.zeros(n_experts, dtype=np.int64)
        self.none_rejected = 0
        self.kept = 0.0
        self.native = np.zeros(2)
        self.logged = np.zeros(2)

    def add(
        self,
        rows: RankedRows,
        n_selected: NDArray[np.integer],
        n_rejected: NDArray[np.integer] | None,
        chosen: NDArray[np.bool_],
        *,
        top_k: int,
        by_logit: bool,
        temperature: float = 1.0,
    ) -> None:
        """Count T rows.

        Args:
            n_selected: (T,).
            n_rejected: (T,); None if nothing was tested.
            chosen: (T, E), n_selected of each row.
            by_logit: whether they are the first by falling logit.
            temperature: of the softmax.
        """
        n, bits = n_selected, packed(chosen)
        self.selected += np.bincount(n, minlength=len(self.selected))
        self.load += chosen.sum(axis=0, dtype=np.uint32)
        if n_rejected is not None:
            self.none_rejected += int((n_rejected == 0).sum())
        self.kept += float(rows.kept(chosen, temperature).sum(dtype=np.float64))
        # by falling logit the native experts come first, so counting is enough
        with_native = (
            np.minimum(n, top_k) if by_logit else popcount(bits & rows.packed_first(top_k))
        )
        self.native += overlap_sums(with_native, n, top_k)
        self.logged += overlap_sums(popcount(bits & rows.packed_logged), n, rows.n_logged)

    def merge(self, other: "LayerSummary") -> None:
        """Add the rows of another summary."""
        self.selected += other.selected
        self.load += other.load
        self.none_rejected += other.none_rejected
        self.kept += other.kept
        self.native += other.native
        self.logged += other.logged

    def row(self, *, min_k: int, max_k: int, top_k: int) -> dict[str, Any]:
        """The summary as the columns of summary_frame."""
        n, E = int(self.selected.sum()), len(self.load)
        k = np.arange(E + 1)
        mean = float(self.selected @ k / n)
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
            "max_experts": int(present[-1]),
            "at_min_k": float(self.selected[min_k] / n),
            "at_max_k": float(self.selected[max_k] / n),
            "none_rejected": self.none_rejected / n,
            "probability_kept": self.kept / n,
            "native_jaccard": float(self.native[0] / n),
            "native_recall": float(self.native[1] / n),
            "logged_jaccard": float(self.logged[0] / n),
            "logged_recall": float(self.logged[1] / n),
            "load_entropy": float(-(spread * np.log(spread)).sum() / np.log(E)),
            "load_cv": float(share.std() * E),
            "load_gini": max(0.0, float(2 * (rising @ np.arange(1, E + 1)) / E - (E + 1) / E)),
            "busiest_share": float(share.max()),
            "dead_experts": int((self.load == 0).sum()),
            "flops": mean / top_k,
            "histogram": self.selected.tolist(),
        }


def summary_frame(
    layers: Mapping[int, LayerSummary], *, min_k: int, max_k: int, top_k: int
) -> pl.DataFrame:
    """One row per layer, then one over all layers (layer null).

    Columns: rows; mean, sd, min, median (the lower of two) and max of n_selected (experts per
    token); at_min_k, at_max_k, none_rejected (shares of rows); probability_kept (mean softmax
    probability of the chosen experts); native_jaccard, native_recall, logged_jaccard,
    logged_recall (mean overlap of the chosen experts with the model's top-k and with the logged
    ones); load_entropy (1 is even), load_cv, load_gini (0 is even), busiest_share (of all choices),
    dead_experts (count; summed over layers); flops (expert FLOPs relative to the native top-k);
    histogram (rows by n_selected from 0 to E). Over all layers, load figures are means over layers.
    """
    bounds = {"min_k": min_k, "max_k": max_k, "top_k": top_k}
    rows: list[dict[str, Any]] = [
        {"layer": layer, **part.row(**bounds)} for layer, part in sorted(layers.items())
    ]
    if not rows:
        return pl.DataFrame()
    total = LayerSummary(len(next(iter(layers.values())).load))
    for part in layers.values():
        total.merge(part)
    overall: dict[str, Any] = {"layer": None, **total.row(**bounds)}
    for name in ("load_entropy", "load_cv", "load_gini", "busiest_share"):
        overall[name] = float(np.mean([row[name] for row in rows]))
    overall["dead_experts"] = sum(row["dead_experts"] for row in rows)
    return pl.DataFrame([*rows, overall], infer_schema_length=None)


def overlap_sums(
    both: NDArray[np.integer], a: NDArray[np.integer] | int, b: NDArray[np.integer] | int
) -> NDArray[np.float64]:
    """(2,) sums over rows of Jaccard and of recall (the share of b that is in a).

    Two empty sets are the same, so their Jaccard is 1, and so is the recall of an empty b.

    Args:
        both: (T,) experts in both sets.
        a, b: (T,) sizes of the sets, or one number for all rows.
    """
    both = both.astype(np.float64)
    union = a + b - both
    jaccard = (both + (union == 0)) / np.maximum(union, 1)
    recall = (both + np.equal(b, 0)) / np.maximum(b, 1)
    return np.array([jaccard.sum(), recall.sum()])
