"""Noise: what a rule would do with logits that say nothing about which expert suits which token.

Each expert's logits are shuffled over the tokens of a layer: every expert keeps its distribution,
and what is left is what chance alone gives under the same null model. A rule that takes as many
experts from noise shows no evidence by their number, only by which tokens get more.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.fold import mix
from bhlog.analysis.log import logits_of
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.rule import no_finite_logit

COLUMNS = ("rank", "sequence", "position")
MOST_LOGITS = 1 << 16  # of a layer's sample
LEAST_ROWS = 256  # of it, where there are many experts
NAMES = ("noise_experts", "noise_experts_se", "noise_sd_experts", "noise_rows")
_TYPES = (pl.Float64, pl.Float64, pl.Float64, pl.Int64)


def sample_rows(n_experts: int) -> int:
    """Tokens of a layer's sample: 1,024 for 64 experts."""
    return max(LEAST_ROWS, MOST_LOGITS // n_experts)


class NoiseSample:
    """A sample of the tokens of one layer: the smallest hashes of (rank, sequence, position).

    It is the same however a log is split, and the same tokens at every layer. Rows without a finite
    logit are no part of it.

    Attributes:
        hashes: (N,) uint64, N at most sample_rows(E).
        logits: (N, E) float32.
    """

    def __init__(self, n_experts: int) -> None:
        self.most = sample_rows(n_experts)
        self.hashes = np.zeros(0, dtype=np.uint64)
        self.logits = np.zeros((0, n_experts), dtype=np.float32)

    def update(self, batch: pa.RecordBatch) -> None:
        """See rows of a batch that has COLUMNS and logits."""
        hashes = mix(*(values_of(batch.column(name)) for name in COLUMNS))
        if len(self.hashes) == self.most:
            self._add(hashes, batch, np.flatnonzero(hashes < self.hashes[-1]))
        elif len(hashes) <= self.most or not self._add(
            hashes, batch, np.argpartition(hashes, self.most)[: self.most]
        ):
            self._add(hashes, batch, np.arange(len(hashes)))

    def merge(self, other: Self) -> None:
        """See the rows of another sample."""
        self._keep(other.hashes, other.logits)

    def _add(
        self, hashes: NDArray[np.uint64], batch: pa.RecordBatch, rows: NDArray[np.int64]
    ) -> bool:
        """See some rows of a batch; False and nothing seen where one of them has no finite logit
        and others of the batch could take its place."""
        if not len(rows):
            return True
        logits = logits_of(batch)[rows]
        known = ~no_finite_logit(logits)
        if not known.all():
            if len(rows) == self.most < len(hashes):
                return False
            rows, logits = rows[known], logits[known]
        self._keep(hashes[rows], logits)
        return True

    def _keep(self, hashes: NDArray[np.uint64], logits: NDArray[np.float32]) -> None:
        hashes = np.concatenate([self.hashes, hashes])
        order = np.argsort(hashes, kind="stable")[: self.most]
        self.hashes = hashes[order]
        self.logits = np.concatenate([self.logits, logits])[order]

    def shuffled(self, layer: int) -> NDArray[np.float32]:
        """(N, E) float32: each expert's logits in an order of its own, the same each time."""
        rng = np.random.default_rng([layer, len(self.hashes)])
        return np.ascontiguousarray(rng.permuted(np.ascontiguousarray(self.logits.T), axis=1).T)


def noise_row(n_selected: NDArray[np.int64]) -> dict[str, float | int | None]:
    """The columns of noise from the experts of shuffled rows; see noise_frame."""
    n = len(n_selected)
    if not n:
        return dict.fromkeys(NAMES)
    sd = float(n_selected.std())
    return dict(zip(NAMES, (float(n_selected.mean()), sd / n**0.5, sd, n), strict=True))


def noise_frame(
    layers: Sequence[dict[str, float | int | None]], rows: Sequence[int]
) -> pl.DataFrame:
    """A row for each layer, then one over all, each layer weighted by its rows.

    Columns: noise_experts, its standard error (shuffled rows are independent of each other),
    noise_sd_experts, noise_rows (of the sample; over all the sum). Null where nothing was sampled.
    """
    frame = pl.DataFrame(list(layers), schema=dict(zip(NAMES, _TYPES, strict=True)))
    overall: dict[str, float | int | None] = dict.fromkeys(NAMES)
    if frame["noise_experts"].null_count() == 0:
        mean, se, sd, n = (frame[name].to_numpy() for name in NAMES)
        share = np.asarray(rows) / sum(rows)
        of_all = float(share @ mean)
        spread = float(np.sqrt(share @ (sd**2 + (mean - of_all) ** 2)))
        error = float(np.sqrt(share**2 @ se**2))
        overall = dict(zip(NAMES, (of_all, error, spread, int(n.sum())), strict=True))
    return pl.concat([frame, pl.DataFrame([overall], schema=frame.schema)])
