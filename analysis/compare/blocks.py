"""Blocks: the rows of a log cut into pieces that fit the cache, as policies see them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.log import Log, RowGroup, layer_of, logits_of
from analysis.policy import Policy, Rows
from analysis.replay.replay import Replay, p_values_of
from capture.contract.bh import BhOptions
from capture.contract.kde import KdeModel

COLUMNS = ("layer", "logits", "experts", "forward", "rank")
BLOCK_ROWS = 2048

MOST_VALUES = 2_000_000  # logits of a sample: about 50 MB with ranks, probabilities and p-values
MOST_ROWS = 4_000  # rows of a layer in a sample
MOST_GROUPS = 8  # row groups that a layer's sample comes from


class Blocks:
    """Turns record batches of a log into Rows.

    Args:
        log: the run.
        policies: what the rows are for; p-values are there only if one of them tests.
        kde: null model; None takes the run's own, or its empirical p-values.

    Raises:
        KdeMismatch: a policy tests p-values and there is no null model, or one for other layers.
        InvalidOption: empirical p-values of a log that does not hold whole batches.
    """

    def __init__(self, log: Log, policies: Sequence[Policy], kde: KdeModel | None) -> None:
        self._kde: KdeModel | None = None
        self._empirical = False
        if any(policy.tests for policy in policies):
            options = log.manifest.routing.options or BhOptions()
            if kde is not None:
                options = replace(options, p_values="kde")
            rule = Replay(log, [options], kde)  # checks all that p-values need
            self._empirical = rule.empirical
            self._kde = None if self._empirical else kde or log.kde
        self._thresholds: dict[int, dict[float, NDArray[np.float32]]] = {}

    def of(self, batch: pa.RecordBatch) -> Iterator[Rows]:
        """The rows of a batch of one layer that has the COLUMNS, in order."""
        p = p_values_of(batch, None) if self._empirical else None
        for start in range(0, batch.num_rows, BLOCK_ROWS):
            rows = np.arange(start, min(start + BLOCK_ROWS, batch.num_rows))
            yield self._rows(batch.slice(start, len(rows)), None if p is None else p[rows])

    def drawn(self, batch: pa.RecordBatch, rows: NDArray[np.int64]) -> Rows:
        """Some rows of a batch."""
        p = p_values_of(batch, None)[rows] if self._empirical else None
        return self._rows(batch.take(pa.array(rows)), p)

    def _rows(self, batch: pa.RecordBatch, p: NDArray[np.float64] | None) -> Rows:
        layer = layer_of(batch)
        return Rows(
            logits_of(batch),
            None if self._kde is None else self._kde[layer],
            p=p,
            logged=batch.column("experts"),
            thresholds=self._thresholds.setdefault(layer, {}),
        )


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows drawn at random from row groups spread over the log, as many of each layer.

    Attributes:
        parts: Rows of one layer each.
        whole: whether these are all the rows.
    """

    parts: tuple[Rows, ...]
    whole: bool

    def __len__(self) -> int:
        return sum(len(rows.logits) for rows in self.parts)


def draw(
    log: Log,
    blocks: Blocks,
    *,
    layers: Sequence[int] | None = None,
    where: str | None = None,
    seed: int = 0,
) -> Sample:
    """Draw at most MOST_ROWS rows of each layer and MOST_VALUES logits in all."""
    rng = np.random.default_rng(seed)
    by_layer: dict[int, list[RowGroup]] = {}
    for group in log.row_groups(layers):
        by_layer.setdefault(group.layer, []).append(group)
    most = max(1, min(MOST_ROWS, MOST_VALUES // (max(1, len(by_layer)) * log.n_experts)))
    parts, whole = [], True
    for groups in by_layer.values():
        places = np.unique(np.linspace(0, len(groups) - 1, MOST_GROUPS).astype(int))
        chosen = [groups[place] for place in places]
        available = sum(group.rows for group in chosen)
        whole &= len(chosen) == len(groups)
        for group in chosen:
            batch = log.read(group, COLUMNS, where)
            quota = -(-most * group.rows // max(1, available))
            if batch.num_rows > quota:
                whole = False
            take = np.sort(rng.permutation(batch.num_rows)[:quota])
            if len(take):
                parts.append(blocks.drawn(batch, take))
    return Sample(tuple(parts), whole)
