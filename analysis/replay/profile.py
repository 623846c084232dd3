"""Profile: experts at every alpha of a grid, from one pass over a log.

The critical alpha of rank k is the smallest alpha at which a row selects at least k experts. The
profile counts rows by rank and critical alpha, so the share of rows with n_rejected >= k is known
at every alpha of the grid, exactly as replay would count it, and with it the mean number of experts
under any bounds.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from analysis.log import Log, Progress, layer_of, logits_of
from capture.contract.bh import finite_keys, no_finite_logit
from capture.contract.errors import CorruptKde, InvalidOption, KdeMismatch
from capture.contract.kde import KdeModel

# 200 alphas a decade below 0.01, then steps of 0.001: the resolution of alpha_for
GRID = tuple(
    sorted({*np.geomspace(1e-6, 1e-2, 801).round(9).tolist(), *(i / 1000 for i in range(10, 1000))})
)


@dataclass(frozen=True, eq=False)
class Profile:
    """Counts of rows by layer, rank and critical alpha.

    Attributes:
        alphas: (J,) float64, rising.
        counts: by layer, (E, J + 1) int64: rows whose rank k (index k - 1) becomes selected at
            alphas[j]; the last column counts rows in which it never does.
    """

    alphas: NDArray[np.float64]
    counts: dict[int, NDArray[np.int64]]

    @property
    def n_experts(self) -> int:
        """Experts per router."""
        return len(next(iter(self.counts.values())))

    def mean_experts(
        self, alpha: float, *, min_k: int = 1, max_k: int | None = None, layer: int | None = None
    ) -> float:
        """Mean n_selected at an alpha, of one layer or over all (None).

        Exact at the alphas of the grid; between two of them, the value at the lower one.

        Raises:
            InvalidOption: alpha is below the grid, or there is no such layer.
        """
        if not self.alphas[0] <= alpha < 1:
            raise InvalidOption(f"alpha must be from {self.alphas[0]:g} to 1, got {alpha}")
        j = int(np.searchsorted(self.alphas, alpha, side="right")) - 1
        return float(self._curve(min_k, max_k, layer)[j])

    def alpha_for(
        self,
        mean_experts: float,
        *,
        min_k: int = 1,
        max_k: int | None = None,
        layer: int | None = None,
    ) -> float:
        """The smallest alpha of the grid that gives at least this many experts per token.

        Raises:
            InvalidOption: no alpha of the grid reaches it.
        """
        curve = self._curve(min_k, max_k, layer)
        j = int(np.searchsorted(curve, mean_experts, side="left"))
        if j == len(curve):
            raise InvalidOption(
                f"no alpha below 1 gives {mean_experts:g} experts per token: at most "
                f"{curve[-1]:.4g} with min_k {min_k}, max_k {max_k or self.n_experts}"
            )
        return float(self.alphas[j])

    def frame(
        self, alphas: Sequence[float], *, min_k: int = 1, max_k: int | None = None
    ) -> pl.DataFrame:
        """A row per alpha: mean experts of every layer (layer_0, ...) and over all (overall)."""
        rows = []
        for alpha in alphas:
            row = {"alpha": alpha}
            for layer in sorted(self.counts):
                bounds = {"min_k": min_k, "max_k": max_k}
                row[f"layer_{layer}"] = self.mean_experts(alpha, layer=layer, **bounds)  # type: ignore[arg-type]
            row["overall"] = self.mean_experts(alpha, min_k=min_k, max_k=max_k)
            rows.append(row)
        return pl.DataFrame(rows)

    def merge(self, other: "Profile") -> "Profile":
        """The profile of both logs.

        Raises:
            InvalidOption: their grids or experts differ.
        """
        if not np.array_equal(self.alphas, other.alphas) or self.n_experts != other.n_experts:
            raise InvalidOption("profiles with other alphas or experts cannot be merged")
        counts = dict(self.counts)
        for layer, theirs in other.counts.items():
            counts[layer] = counts[layer] + theirs if layer in counts else theirs
        return Profile(self.alphas, counts)

    def save(self, path: str | Path) -> None:
        """Write the profile as Parquet, whole or not at all."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        layers = sorted(self.counts)
        table = pa.table(
            {
                "layer": pa.array(layers, pa.uint16()),
                "alphas": pa.array([self.alphas] * len(layers), pa.list_(pa.float64())),
                "counts": pa.array([self.counts[i].ravel() for i in layers], pa.list_(pa.int64())),
            }
        )
        pq.write_table(table, part, compression="zstd")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a profile.

        Raises:
            CorruptKde: not a profile.
        """
        try:
            table = pq.read_table(path)
            alphas = table["alphas"][0].values.to_numpy()
            counts = {
                layer: counts.values.to_numpy().reshape(-1, len(alphas) + 1)
                for layer, counts in zip(table["layer"].to_pylist(), table["counts"], strict=True)
            }
        except (OSError, pa.ArrowException, KeyError, IndexError, ValueError) as error:
            raise CorruptKde(f"{path}: not a profile ({error})") from error
        return cls(alphas, counts)

    def _curve(self, min_k: int, max_k: int | None, layer: int | None) -> NDArray[np.float64]:
        """(J,) mean n_selected at each alpha of the grid."""
        E = self.n_experts
        max_k = E if max_k is None else max_k
        if not 0 <= min_k <= max_k <= E or max_k < 1:
            raise InvalidOption(f"bounds must be 0 <= min_k <= max_k <= {E}, got {min_k}, {max_k}")
        if layer is not None and layer not in self.counts:
            raise InvalidOption(f"no layer {layer} in the profile; it has {sorted(self.counts)}")
        counts = self.counts[layer] if layer is not None else sum(self.counts.values())
        assert isinstance(counts, np.ndarray)
        rows = int(counts[0].sum())
        reached = np.cumsum(counts, axis=1)[:, :-1]  # rows with n_rejected >= k at each alpha
        return np.asarray(min_k + reached[min_k:max_k].sum(axis=0) / max(1, rows))


def profile_log(
    log: Log,
    kde: KdeModel | None = None,
    *,
    alphas: Sequence[float] = GRID,
    layers: Iterable[int] | None = None,
    where: str | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Profile of a log under a null model; None takes the run's own.

    Rows without a finite logit are left out: the rule does not decide them.

    Raises:
        KdeMismatch: no null model, one for other layers, or one with a curve per expert.
        InvalidOption: alphas are not rising inside (0, 1).
    """
    grid = np.asarray(alphas, dtype=np.float64)
    if not len(grid) or grid[0] <= 0 or grid[-1] >= 1 or np.any(np.diff(grid) <= 0):
        raise InvalidOption("alphas must rise inside (0, 1)")
    kde = kde or log.kde
    if kde is None:
        raise KdeMismatch(
            f"{log.path} has no null model of its own; name one: fit it with "
            f"bhlog kde fit {log.path} --out null.parquet, then give it with --kde"
        )
    kde.require(log.layers, log.n_experts)
    if not kde.pooled:
        raise KdeMismatch("a profile needs a pooled null model; use replay for one per expert")
    wanted = sorted(log.check_layers(layers))
    E = log.n_experts
    # (E, J): thresholds of rank k fall as alpha rises
    thresholds = {
        layer: np.stack([kde[layer].thresholds(a, E) for a in grid], axis=1) for layer in wanted
    }
    total = log.fold(
        lambda: _Counts(thresholds), ("layer", "logits"), layers=layers, where=where,
        progress=progress,
    )  # fmt: skip
    return Profile(grid, dict(sorted(total.counts.items())))


class _Counts:
    """Rows by rank and critical alpha."""

    def __init__(self, thresholds: dict[int, NDArray[np.float32]]) -> None:
        self.thresholds = thresholds
        self.counts: dict[int, NDArray[np.int64]] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        layer, logits = layer_of(batch), logits_of(batch)
        thresholds = self.thresholds[layer]
        E, J = thresholds.shape
        keys = finite_keys(logits[~no_finite_logit(logits)])
        ranked = -np.sort(-keys, axis=1)
        critical = np.empty(ranked.shape, dtype=np.int64)
        for k in range(E):
            # first alpha whose threshold the k-th largest logit reaches
            critical[:, k] = np.searchsorted(-thresholds[k], -ranked[:, k], side="left")
        # selected with any later rank that passes: monotone from above
        critical = np.minimum.accumulate(critical[:, ::-1], axis=1)[:, ::-1]
        cell = critical + np.arange(E) * (J + 1)
        counts = np.bincount(cell.ravel(), minlength=E * (J + 1)).reshape(E, J + 1)
        self.counts[layer] = self.counts.get(layer, 0) + counts

    def merge(self, other: Self) -> None:
        for layer, counts in other.counts.items():
            self.counts[layer] = self.counts.get(layer, 0) + counts
