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
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.rule import no_finite_logit

COLUMNS = ("rank", "sequence", "position")
MOST_LOGITS = 1 << 16  # of a layer's sample
LEAST_ROWS = 256  # of it, where there are many experts
NAMES = ("noise_experts", "noise_experts_se", "noise_sd_experts", "noise_rows")
_LARGEST = np.uint64(2**64 - 1)
_TYPES = (pl.Float64, pl.Float64, pl.Float64, pl.Int64)


def sample_rows(n_experts: int) -> int:
    """Tokens of a layer's sample: 1,024 for 64 experts."""
    return max(LEAST_ROWS, MOST_LOGITS // n_experts)


def last_hash(log: Log, where: str | None) -> np.uint64:
    """The largest hash that a sample of a log may hold: twice as many rows lie up to it as one has.

    So a stretch of a long log keeps few rows. It is the largest of all where the manifest does not
    say how many rows each layer has, or a condition leaves some out.
    """
    totals = log.manifest.totals
    even = log.manifest.closed and totals.rows == totals.tokens * len(log.layers)
    sure = totals.tokens - totals.nonfinite
    most = 2 * sample_rows(log.n_experts)
    if where is not None or not even or sure <= most:
        return _LARGEST
    return np.uint64(int(_LARGEST) * most // sure)


class NoiseSample:
    """A sample of the tokens of one layer: the smallest hashes of (rank, sequence, position).

    It is the same however a log is split, and the same tokens at every layer. Rows without a finite
    logit are no part of it.

    Args:
        last: the largest hash that is kept.

    Attributes:
        hashes: (N,) uint64, rising, N at most sample_rows(E).
        logits: (N, E) float32.
    """

    def __init__(self, n_experts: int, last: np.uint64 = _LARGEST) -> None:
        self.most, self.last = sample_rows(n_experts), last
        self.hashes = np.zeros(0, dtype=np.uint64)
        self.logits = np.zeros((0, n_experts), dtype=np.float32)

    def update(self, batch: pa.RecordBatch) -> None:
        """See rows of a batch that has COLUMNS and logits."""
        hashes = mix(*(values_of(batch.column(name)) for name in COLUMNS))
        last = self.hashes[-1] if len(self.hashes) == self.most else self.last
        rows = np.flatnonzero(hashes <= last)
        if not len(rows):
            return
        logits = logits_of(batch)
        if len(rows) > self.most:
            smallest = rows[np.argpartition(hashes[rows], self.most)[: self.most]]
            if not no_finite_logit(logits[smallest]).any():
                rows = smallest
        rows = rows[~no_finite_logit(logits[rows])]
        self._keep(hashes[rows], logits[rows])

    def merge(self, other: Self) -> None:
        """See the rows of another sample."""
        self._keep(other.hashes, other.logits)

    def _keep(self, hashes: NDArray[np.uint64], logits: NDArray[np.float32]) -> None:
        hashes = np.concatenate([self.hashes, hashes])
        order = np.argsort(hashes, kind="stable")[: self.most]
        self.hashes = hashes[order]
        self.logits = np.concatenate([self.logits, logits])[order]

    def shuffled(self, layer: int) -> NDArray[np.float32]:
        """(N, E) float32: each expert's logits in an order of its own, the same each time."""
        rng = np.random.default_rng([layer, len(self.hashes)])
        return np.ascontiguousarray(rng.permuted(np.ascontiguousarray(self.logits.T), axis=1).T)


class Noise:
    """The samples of several layers.

    Args:
        n_experts, last: of each NoiseSample.
    """

    def __init__(self, n_experts: int, last: np.uint64 = _LARGEST) -> None:
        self.n_experts, self.last = n_experts, last
        self.layers: dict[int, NoiseSample] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        """See rows of a layer."""
        self._of(layer_of(batch)).update(batch)

    def merge(self, other: Self) -> None:
        """See the rows of other samples."""
        for layer, sample in other.layers.items():
            self._of(layer).merge(sample)

    def _of(self, layer: int) -> NoiseSample:
        if layer not in self.layers:
            self.layers[layer] = NoiseSample(self.n_experts, self.last)
        return self.layers[layer]


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
