"""Summary of decisions: how many experts, how much is kept, how the load is spread."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bhlog.analysis.kernels.tally import (
    AT_MAX_K,
    AT_MIN_K,
    BY_SEQUENCE,
    EXPERTS,
    KEPT,
    LOGGED_JACCARD,
    LOGGED_RECALL,
    NATIVE_JACCARD,
    NATIVE_RECALL,
    NONE_REJECTED,
    ROWS,
    SQUARES,
    SUMS,
    tally,
)
from bhlog.analysis.replay.policy import Selection
from bhlog.analysis.replay.rows import damaged
from bhlog.analysis.sequences import ONE, ratio_se, scaled

# of what each column is the mean over rows, in the sums by sequence
MEANS = {
    "mean_experts": EXPERTS,
    "at_min_k": AT_MIN_K,
    "at_max_k": AT_MAX_K,
    "none_rejected": NONE_REJECTED,
    "probability_kept": KEPT,
    "native_jaccard": NATIVE_JACCARD,
    "native_recall": NATIVE_RECALL,
    "logged_jaccard": LOGGED_JACCARD,
    "logged_recall": LOGGED_RECALL,
}
PAIRED = ("mean_experts", "probability_kept", "native_recall")  # compared with the first policy
_WHOLE = {EXPERTS, AT_MIN_K, AT_MAX_K, NONE_REJECTED}  # the others count ONE for 1


_NO_SLOTS = np.zeros(0, dtype=np.int64)
_NO_SUMS = np.zeros((0, BY_SEQUENCE), dtype=np.int64)
_NOT_TOUCHED = np.zeros((0, 0), dtype=np.bool_)


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

    def add(
        self,
        selection: Selection,
        *,
        top_k: int,
        temperature: float = 1.0,
        bounds: tuple[int, int] = (-1, -1),
        slots: NDArray[np.int64] = _NO_SLOTS,
        by_sequence: NDArray[np.int64] = _NO_SUMS,
        forwards: NDArray[np.int64] = _NO_SLOTS,
        touched: NDArray[np.bool_] = _NOT_TOUCHED,
    ) -> None:
        """Count the rows of a selection.

        Args:
            top_k: experts of the native choice.
            temperature: of the softmax.
            bounds: min_k and max_k in force, for the sums by sequence.
            slots: (T,), where a row's sequence is in by_sequence; none are counted by default.
            by_sequence: (G, BY_SEQUENCE), added to.
            forwards: (T,), where a row's forward is in touched; none are marked by default.
            touched: (F, E or more), set for the experts that a forward's rows chose.

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
                *bounds,
                slots,
                float(ONE),
                forwards,
                self.selected,
                self.load,
                self.sums,
                by_sequence,
                touched,
            )
        except IndexError as error:
            raise damaged(rows.n_experts) from error

    def merge(self, other: "LayerSummary") -> None:
        """Add the rows of another summary."""
        self.selected += other.selected
        self.load += other.load
        self.sums += other.sums

    def row(
        self,
        by_sequence: NDArray[np.int64],
        *,
        min_k: int,
        max_k: int,
        top_k: int,
        native_logged: bool = False,
    ) -> dict[str, Any]:
        """The summary as the columns of summary_frame.

        Args:
            by_sequence: (G, BY_SEQUENCE), the same rows; G of 0 or 1 gives no standard error.
        """
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
        row = {
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
        errors = standard_errors(by_sequence, native_logged=native_logged)
        errors["flops"] = scaled(errors["mean_experts"], 1 / top_k)
        found: dict[str, Any] = {}
        for name, value in row.items():
            found[name] = value
            if name in errors:
                found[f"{name}_se"] = errors[name]
        return found


def standard_errors(
    by_sequence: NDArray[np.int64], *, native_logged: bool = False
) -> dict[str, float | None]:
    """Standard errors of MEANS and of sd_experts, clustered by sequence; None from one sequence.

    Args:
        by_sequence: (G, BY_SEQUENCE).
    """
    y, x = _means(by_sequence, native_logged)
    errors = {name: ratio_se(of_one, x) for name, of_one in y.items()}
    mean = float(y["mean_experts"].sum() / max(1.0, x.sum()))
    # sum over rows of (n_selected - mean)^2; the delta method from the variance to its root
    squares = by_sequence[:, SQUARES] - 2 * mean * y["mean_experts"] + mean**2 * x
    sd = float(np.sqrt(max(0.0, squares.sum()) / max(1.0, x.sum())))
    errors["sd_experts"] = (
        scaled(ratio_se(squares, x), 1 / (2 * sd)) if sd else scaled(errors["mean_experts"], 0)
    )
    return errors


def differences(
    by_sequence: NDArray[np.int64], first: NDArray[np.int64], *, native_logged: bool = False
) -> dict[str, float | None]:
    """X_difference and X_difference_se of PAIRED: mean less the mean of another policy.

    Args:
        by_sequence, first: (G, BY_SEQUENCE), of the same rows.
    """
    y, x = _means(by_sequence, native_logged)
    others, _ = _means(first, native_logged)
    found: dict[str, float | None] = {}
    for name in PAIRED:
        of_one = y[name] - others[name]
        found[f"{name}_difference"] = float(of_one.sum() / x.sum())
        found[f"{name}_difference_se"] = ratio_se(of_one, x)
    return found


def _means(
    by_sequence: NDArray[np.int64], native_logged: bool
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    """(G,) sums of what each of MEANS is the mean of, and rows."""
    logged = {NATIVE_JACCARD: LOGGED_JACCARD, NATIVE_RECALL: LOGGED_RECALL} if native_logged else {}
    y = {
        name: by_sequence[:, logged.get(i, i)] / (1 if i in _WHOLE else ONE)
        for name, i in MEANS.items()
    }
    return y, by_sequence[:, ROWS].astype(np.float64)


def summary_frame(
    layers: Mapping[int, LayerSummary],
    sequences: Mapping[int, NDArray[np.int64]],
    every: NDArray[np.int64],
    *,
    min_k: int,
    max_k: int,
    top_k: int,
    native_logged: bool = False,
) -> pl.DataFrame:
    """One row per layer, then one over all layers (layer null).

    Args:
        sequences: (G, BY_SEQUENCE) of each layer, see SequenceSums.
        every: the same over all layers.
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

    Beside them noise_experts, noise_experts_se, noise_sd_experts, noise_rows: the same rule where
    each expert's logits are shuffled over a sample of noise_rows tokens, see bhlog.analysis.noise;
    null where p-values are empirical. And distinct_experts, how many different experts the tokens
    of a forward choose together: a mean over forwards and, in the last row, layers; null where
    forwards are not there whole, see bhlog.analysis.replay.touched.

    mean, sd, the shares and means of rows, and flops have their standard error beside them, X_se,
    clustered by sequence: the ratio estimator. It is null where there is one sequence.
    """
    bounds = {"min_k": min_k, "max_k": max_k, "top_k": top_k}
    rows: list[dict[str, Any]] = [
        {"layer": layer, **part.row(sequences[layer], **bounds, native_logged=native_logged)}
        for layer, part in sorted(layers.items())
    ]
    if not rows:
        return pl.DataFrame()
    total = LayerSummary(len(next(iter(layers.values())).load))
    for part in layers.values():
        total.merge(part)
    overall: dict[str, Any] = {"layer": None}
    overall |= total.row(every, **bounds, native_logged=native_logged)
    for name in ("load_entropy", "load_cv", "load_gini", "busiest_share"):
        overall[name] = float(np.mean([row[name] for row in rows]))
    overall["dead_experts"] = sum(row["dead_experts"] for row in rows)
    errors = [name for name in overall if name.endswith("_se")]
    frame = pl.DataFrame([*rows, overall], infer_schema_length=None)
    return frame.with_columns(pl.col(errors).cast(pl.Float64))
