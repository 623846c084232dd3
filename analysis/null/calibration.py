"""How well a null model is calibrated on a run.

Logits of bfloat16 models repeat, so p-values come in lumps. Every comparison here takes the middle
of a lump (mid-p), so that the number format does not count as miscalibration.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import betainc

from bhlog.analysis.fold import WHOLE, Scope, fold
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.analysis.sequences import COLUMNS, SequenceSums, ratio_se, scaled
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.histogram import ONE_VALUE, Histogram, HistogramAccumulator
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.null.trim import kept

SMALLEST_P = 2.0**-1000
LARGEST_P = 1 - 2.0**-53
_CHUNK_ROWS = 2048  # looked at together, so that temporaries stay small
P_BINS = 1024  # in which p-values of each expert are counted
LEVELS = (0.05, 0.01, 0.001)  # shares of p-values at most these are shown beside them
LAMBDA = 0.5  # p-values above it are taken to be of the null
_COUNTS = len(LEVELS) + 2  # p-values at most each of LEVELS, above LAMBDA, and all


@dataclass(frozen=True, eq=False)
class PValues:
    """A distribution of p-values as lumps.

    Attributes:
        p: (N,) float64, rising.
        weight: (N,) float64, how many p-values lie at each; their sum is n.
    """

    p: NDArray[np.float64]
    weight: NDArray[np.float64]

    @property
    def n(self) -> float:
        """Number of p-values."""
        return float(self.weight.sum())

    @property
    def mid_cdf(self) -> NDArray[np.float64]:
        """(N,) float64: the share below each p, plus half the share at it."""
        if not len(self.p):
            return np.zeros(0)
        share: NDArray[np.float64] = (np.cumsum(self.weight) - self.weight / 2) / self.n
        return share

    @property
    def ks(self) -> float:
        """Kolmogorov-Smirnov distance from uniform; NaN without p-values."""
        return self.ks_against(self.p)

    def ks_against(self, cdf: NDArray[np.float64]) -> float:
        """Kolmogorov-Smirnov distance from a distribution with this CDF at p."""
        return float(np.abs(self.mid_cdf - cdf).max()) if len(self.p) else float("nan")

    def share_below(self, level: float) -> float:
        """Share of p-values at most level; level itself when calibrated."""
        return float(self.cdf(np.array(level)))

    def cdf(self, p: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of p-values at most p, from lumps spread to their neighbours; NaN without any."""
        if not len(self.p):
            return np.full(p.shape, np.nan)
        return np.interp(p, self.p, self.mid_cdf, left=0.0, right=1.0)


@dataclass(frozen=True, eq=False)
class LayerCheck:
    """P-values of one layer of a run under a null model.

    Attributes:
        layer: decoder layer.
        n_experts: experts per router.
        trimmed: p-values of the logits that the null's own trimming level keeps.
        by_expert: the same, of each expert.
        by_rank: p-values of the row's k-th smallest p-value, by k; no trimming.
        below, below_se: of all logits, the share of p-values at most each of LEVELS, no trimming;
            its standard error clustered by sequence, None from one sequence.
        trimmed_se: the same of the share of `trimmed`.
        pi0, pi0_se: Storey's estimate of the share of all logits that are as the null has them.
        popularity: (E,) float64, share of rows in which an expert is among the top_k logits.
        left_out: logits without a p-value (NaN or infinite), in all rows.
    """

    layer: int
    n_experts: int
    trimmed: PValues
    by_expert: tuple[PValues, ...]
    by_rank: Mapping[int, PValues]
    below: Mapping[float, float]
    below_se: Mapping[float, float | None]
    trimmed_se: Mapping[float, float | None]
    pi0: float
    pi0_se: float | None
    popularity: NDArray[np.float64]
    left_out: int

    def rank_ks(self, k: int) -> float:
        """KS distance of the k-th smallest p-value from the k-th uniform order statistic."""
        found = self.by_rank[k]
        return found.ks_against(betainc(k, self.n_experts - k + 1, found.p))


def check(
    kde: KdeModel,
    log: Log,
    *,
    ranks: Sequence[int] = (1, 2, 4, 8),
    scope: Scope = WHOLE,
) -> list[LayerCheck]:
    """Are the p-values of a run's logits uniform under a null model?

    Args:
        ranks: which order statistics to look at; those above the number of experts are left out.
        scope: which rows, and how they are read.

    Raises:
        KdeMismatch: the null model does not cover the layers or experts.
        InvalidOption: no rows, or no logits.
    """
    log.require_logits()
    wanted = sorted(log.check_layers(scope.layers))
    E, top_k = log.n_experts, log.manifest.model.top_k
    kde.require(wanted, E)
    ranks = [k for k in ranks if 1 <= k <= E]
    folded = fold(
        log,
        partial(_PValueFold, kde, tuple(ranks), min(top_k, E)),
        ["logits", *COLUMNS],
        scope,
    )
    if not folded.rows:
        raise InvalidOption(f"no rows to check in {log.path}{scope.words}")
    return folded.layer_checks(E)


class _PValueFold:
    """Histograms of p-values: by layer and rank in log2 of the odds, by expert in p itself."""

    def __init__(self, kde: KdeModel, ranks: tuple[int, ...], top_k: int) -> None:
        self.kde, self.ranks, self.top_k = kde, ranks, top_k
        self.bits = HistogramAccumulator()
        self.by_rank = HistogramAccumulator(by_expert=True)
        self.by_expert: dict[int, NDArray[np.int64]] = {}
        self.sequences: dict[int, SequenceSums] = {}  # of all p-values, and of those kept, _COUNTS
        self.chosen: dict[int, NDArray[np.int64]] = {}
        self.rows: dict[int, int] = {}
        self.left_out: dict[int, int] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        layer, logits = layer_of(batch), logits_of(batch)
        sums = self.sequences.setdefault(layer, SequenceSums(2, _COUNTS))
        slots = sums.slots(batch)
        bits = np.empty(logits.shape, dtype=np.float32)
        ranked = np.empty((len(logits), len(self.ranks)), dtype=np.float32)
        for start in range(0, len(logits), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            bits[rows], ranked[rows] = self._count(layer, logits[rows], slots[rows])
        self.bits.update(layer, bits)
        self.by_rank.update(layer, ranked)

    def _count(
        self, layer: int, logits: NDArray[np.float32], slots: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Count a few rows; returns _bits of the logits that trimming keeps, and by rank."""
        null, E = self.kde[layer], logits.shape[1]
        finite = np.isfinite(logits)
        p = np.where(finite, null.p_value(logits), np.nan)
        ranked = np.sort(p, axis=1)[:, [k - 1 for k in self.ranks]]
        sums = self.sequences[layer].sums
        np.add.at(sums[0], slots, _counts(p))
        keep = kept(logits, null.curves[0].trim)
        if keep is not None:
            p = np.where(keep, p, np.nan)
        np.add.at(sums[1], slots, _counts(p))
        bins = np.minimum(p * P_BINS, P_BINS - 1) + np.arange(E) * P_BINS
        by_expert = np.bincount(bins[np.isfinite(p)].astype(np.intp), minlength=E * P_BINS)
        keys = np.where(finite, logits, np.float32(-np.inf))
        kth = np.partition(keys, E - self.top_k, axis=1)[:, [E - self.top_k]]
        chosen = np.count_nonzero((keys >= kth) & finite, axis=0)
        left_out = int(finite.size - np.count_nonzero(finite))
        self._add(layer, len(logits), chosen, left_out, by_expert)
        return _bits(p), _bits(ranked)

    def merge(self, other: Self) -> None:
        self.bits.merge(other.bits)
        self.by_rank.merge(other.by_rank)
        for layer in other.rows:
            self._add(
                layer,
                other.rows[layer],
                other.chosen[layer],
                other.left_out[layer],
                other.by_expert[layer],
            )
            self.sequences.setdefault(layer, SequenceSums(2, _COUNTS)).merge(other.sequences[layer])

    def _add(
        self,
        layer: int,
        rows: int,
        chosen: NDArray[np.int64],
        left_out: int,
        by_expert: NDArray[np.int64],
    ) -> None:
        self.by_expert[layer] = self.by_expert.get(layer, 0) + by_expert
        self.rows[layer] = self.rows.get(layer, 0) + rows
        self.chosen[layer] = self.chosen.get(layer, 0) + chosen
        self.left_out[layer] = self.left_out.get(layer, 0) + left_out

    def _shares(self, layer: int, table: int) -> tuple[list[float], list[float | None]]:
        """Shares of p-values at most each of LEVELS, then above LAMBDA, and their standard errors.

        NaN and None without any.
        """
        *counts, n = self.sequences[layer].table(table).T
        if not n.sum():
            return [float("nan")] * len(counts), [None] * len(counts)
        return [float(y.sum() / n.sum()) for y in counts], [ratio_se(y, n) for y in counts]

    def layer_checks(self, n_experts: int) -> list[LayerCheck]:
        """What was found, by layer."""
        centers = (np.arange(P_BINS) + 0.5) / P_BINS
        by_rank = {key[:2]: _from_bits(h) for key, h in self.by_rank.histograms().items()}
        bits = {key.layer: h for key, h in self.bits.histograms().items()}
        return [
            LayerCheck(
                layer=layer,
                n_experts=n_experts,
                trimmed=_from_bits(bits[layer]),
                by_expert=tuple(
                    _without_empty(centers, counts.astype(np.float64))
                    for counts in self.by_expert[layer].reshape(n_experts, P_BINS)
                ),
                by_rank={k: by_rank[layer, i] for i, k in enumerate(self.ranks)},
                below=dict(zip(LEVELS, self._shares(layer, 0)[0], strict=False)),
                below_se=dict(zip(LEVELS, self._shares(layer, 0)[1], strict=False)),
                trimmed_se=dict(zip(LEVELS, self._shares(layer, 1)[1], strict=False)),
                pi0=min(1.0, self._shares(layer, 0)[0][-1] / (1 - LAMBDA)),
                pi0_se=scaled(self._shares(layer, 0)[1][-1], 1 / (1 - LAMBDA)),
                popularity=self.chosen[layer] / self.rows[layer],
                left_out=self.left_out[layer],
            )
            for layer in sorted(self.rows)
        ]


def _counts(p: NDArray[np.float64]) -> NDArray[np.int64]:
    """(T, _COUNTS) of each row: p-values at most each of LEVELS, above LAMBDA, and all."""
    which = (*(p <= level for level in LEVELS), p > LAMBDA, np.isfinite(p))
    return np.stack([np.count_nonzero(some, axis=1) for some in which], axis=1)


def _without_empty(p: NDArray[np.float64], weight: NDArray[np.float64]) -> PValues:
    seen = weight > 0
    return PValues(p[seen], weight[seen])


def _bits(p: NDArray[np.float64]) -> NDArray[np.float32]:
    """log2((1 - p) / p) as float32, on which an even histogram resolves p-values near 0 and near 1.

    A node's width is at most 1.7e-4 in p, at p = 0.5, and falls with p and with 1 - p.
    """
    p = np.clip(p, SMALLEST_P, LARGEST_P)
    return np.log2((1 - p) / p).astype(np.float32)


def _from_bits(histogram: Histogram) -> PValues:
    p = 1 / (1 + np.exp2(histogram.nodes))
    return _without_empty(p[::-1], histogram.counts[::-1] / ONE_VALUE)


def check_frame(checks: Sequence[LayerCheck]) -> pl.DataFrame:
    """One row per layer: distances from uniform, and shares of small p-values beside their level.

    Columns: n p-values, of the logits that the null's own trimming keeps; ks of them; p_0.05,
    p_0.01, p_0.001 the shares of them at most that; all_0.05, ... those of all logits; pi0, the
    share of all logits that are as the null has them, by Storey (2002); ks_expert (median) and
    ks_worst with its expert; ks_rank_k of the k-th smallest p of a row against the k-th uniform
    order statistic. Shares have their standard error beside them, p_0.05_se, clustered by sequence,
    null where there is one.
    """
    rows = []
    for found in checks:
        by_expert = np.array([values.ks for values in found.by_expert])
        known = np.isfinite(by_expert).any()
        rows.append(
            {"layer": found.layer, "n": round(found.trimmed.n), "left_out": found.left_out}
            | {"ks": found.trimmed.ks}
            | _with_errors(
                "p", {level: found.trimmed.share_below(level) for level in LEVELS}, found.trimmed_se
            )
            | _with_errors("all", found.below, found.below_se)
            | {"pi0": found.pi0, "pi0_se": found.pi0_se}
            | {
                "ks_expert": float(np.nanmedian(by_expert)) if known else None,
                "ks_worst": float(np.nanmax(by_expert)) if known else None,
                "worst_expert": int(np.nanargmax(by_expert)) if known else None,
            }
            | {f"ks_rank_{k}": found.rank_ks(k) for k in found.by_rank}
        )
    errors = {name: pl.Float64 for row in rows for name in row if name.endswith("_se")}
    return pl.DataFrame(rows, schema_overrides=errors)


def _with_errors(
    name: str, shares: Mapping[float, float], errors: Mapping[float, float | None]
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for level, share in shares.items():
        found |= {f"{name}_{level}": share, f"{name}_{level}_se": errors[level]}
    return found


def expert_frame(checks: Sequence[LayerCheck]) -> pl.DataFrame:
    """One row per layer and expert: popularity, and what the null makes of the expert's logits."""
    return pl.DataFrame(
        [
            {
                "layer": found.layer,
                "expert": expert,
                "popularity": float(found.popularity[expert]),
                "n": round(values.n),
                "ks": values.ks,
                "mean_p": float(values.p @ values.weight / values.n) if values.n else None,
            }
            | {f"p_{level}": values.share_below(level) for level in LEVELS[:2]}
            for found in checks
            for expert, values in enumerate(found.by_expert)
        ]
    )
