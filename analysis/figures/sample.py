"""Sample: rows drawn from a log with their p-values, few enough to hold in memory and to draw."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.log import Log, logits_of
from bhlog.analysis.replay.decide import COLUMNS, decider_of, p_values_of
from bhlog.analysis.spread import draw, groups_by_layer, quotas, spread
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions

MOST_VALUES = 4_000_000  # logits kept over all layers: about 50 MB with their p-values
MOST_ROWS = 2_000  # rows kept of a layer


@dataclass(frozen=True, eq=False)
class LayerSample:
    """N rows of one layer, drawn at random from row groups that are spread over the log.

    Attributes:
        layer: decoder layer.
        sequence, position: (N,) which token each row is.
        logits: (N, E) float32.
        p: (N, E) float64, NaN where the logit is NaN.
        n_rejected, n_selected: (N,) what BH decides with the options asked for.
    """

    layer: int
    sequence: NDArray[np.uint32]
    position: NDArray[np.uint32]
    logits: NDArray[np.float32]
    p: NDArray[np.float64]
    n_rejected: NDArray[np.uint16]
    n_selected: NDArray[np.uint16]

    @property
    def sorted_p(self) -> NDArray[np.float64]:
        """(N, E) p-values from the smallest on; those of non-finite logits are infinite."""
        p = np.where(np.isfinite(self.logits), self.p, np.inf)
        return np.sort(p, axis=1)


def sample_rows(
    log: Log, options: BhOptions, kde: KdeModel | None = None, *, seed: int = 0
) -> list[LayerSample]:
    """Draw rows of each layer with their p-values and decisions; layers without rows are left out.

    At most MOST_ROWS rows of a layer and MOST_VALUES logits in all, from a few row groups of a
    layer: a long log costs little more than a short one.

    Args:
        options: alpha, bounds, and whether p-values are empirical.
        kde: null model; None takes the run's own.

    Raises:
        InvalidOption, KdeMismatch: see bhlog.analysis.replay.decide.Decider.
    """
    decider = decider_of(log, [options], kde)
    null = None if decider.empirical else kde or log.kde
    rng = np.random.default_rng(seed)
    most = max(1, min(MOST_ROWS, MOST_VALUES // (len(log.layers) * log.n_experts)))
    samples = []
    for layer, groups in groups_by_layer(log).items():
        chosen = spread(groups)
        parts = []
        for group, quota in zip(chosen, quotas(chosen, most), strict=True):
            batch = log.read(group, [*COLUMNS, "sequence", "position"])
            batch = _drawn(batch, quota, rng, whole_forwards=decider.empirical)
            (decisions,) = decider.decide(batch)
            p = p_values_of(batch, None if null is None else null[layer])
            part = (
                values_of(batch.column("sequence")),
                values_of(batch.column("position")),
                logits_of(batch),
                p,
                decisions.n_rejected,
                decisions.n_selected,
            )
            take = draw(len(p), quota, rng)
            parts.append([column[take] for column in part])
        if parts:
            sequence, position, logits, p, n_rejected, n_selected = (
                np.concatenate(column) for column in zip(*parts, strict=True)
            )
            samples.append(
                LayerSample(layer, sequence, position, logits, p, n_rejected, n_selected)
            )
    return samples


def _drawn(
    batch: pa.RecordBatch, quota: int, rng: np.random.Generator, *, whole_forwards: bool
) -> pa.RecordBatch:
    """Rows drawn at random: `quota` of them, or whole forwards that hold at least as many."""
    if not whole_forwards:
        return batch.take(pa.array(draw(batch.num_rows, quota, rng)))
    forward = values_of(batch.column("forward"))
    numbers, rows = np.unique(forward, return_counts=True)
    order = rng.permutation(len(numbers))
    enough = int(np.searchsorted(np.cumsum(rows[order]), quota)) + 1
    return batch.filter(pa.array(np.isin(forward, numbers[order[:enough]])))
