"""Blocks: the rows of a log cut into pieces that fit the cache, as policies see them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.analysis.replay.families import Policy, Rows
from bhlog.analysis.replay.ranked import block_rows
from bhlog.analysis.replay.replay import COLUMNS, Replay, p_values_of
from bhlog.analysis.spread import draw, groups_by_layer, quotas, spread
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions

MOST_VALUES = 2_000_000  # logits of a sample: about 90 MB with ranks, probabilities and p-values
MOST_ROWS = 4_000  # rows of a layer in a sample


class Blocks:
    """Turns record batches of a log into Rows.

    Args:
        log: the run.
        policies: what the rows are for; p-values are there only if one of them tests.
        kde: null model; None takes the run's own, or its empirical p-values.
        where: which rows it will get.

    Attributes:
        empirical: whether p-values rank whole batches, which are in whole row groups.

    Raises:
        KdeMismatch: a policy tests p-values and there is no null model, or one for other layers.
        InvalidOption: empirical p-values, but rows are not whole batches.
    """

    def __init__(
        self,
        log: Log,
        policies: Sequence[Policy],
        kde: KdeModel | None,
        where: str | None = None,
    ) -> None:
        self._kde: KdeModel | None = None
        self.empirical = False
        if any(policy.tests for policy in policies):
            options = log.manifest.routing.options or BhOptions()
            if kde is not None:
                options = replace(options, p_values="kde")
            rule = Replay(log, [options], kde, where=where)  # checks all that p-values need
            self.empirical = rule.empirical
            self._kde = None if self.empirical else kde or log.kde
        self._thresholds: dict[int, dict[float, NDArray[np.float32]]] = {}

    def of(self, batch: pa.RecordBatch) -> Iterator[Rows]:
        """The rows of a batch of one layer that has the COLUMNS, in order."""
        p = p_values_of(batch, None) if self.empirical else None
        size = block_rows(batch.column("logits").type.list_size)
        for start in range(0, batch.num_rows, size):
            part = None if p is None else p[start : start + size]
            yield self._rows(batch.slice(start, size), part)

    def drawn(self, parts: Sequence[tuple[pa.RecordBatch, NDArray[np.int64]]]) -> Rows:
        """Some rows of batches of one layer, together."""
        p = None
        if self.empirical:
            p = np.concatenate([p_values_of(batch, None)[rows] for batch, rows in parts])
        batches = [batch.take(pa.array(rows)) for batch, rows in parts]
        return self._rows(pa.concat_batches(batches), p)

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
        parts: Rows of a layer, for each layer that has some.
        whole: whether these are all the rows.
    """

    parts: tuple[Rows, ...]
    whole: bool

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.parts)


def draw_sample(
    log: Log,
    blocks: Blocks,
    *,
    layers: Sequence[int] | None = None,
    where: str | None = None,
    seed: int = 0,
) -> Sample:
    """Draw at most MOST_ROWS rows of each layer and MOST_VALUES logits in all."""
    rng = np.random.default_rng(seed)
    by_layer = groups_by_layer(log, layers)
    most = max(1, min(MOST_ROWS, MOST_VALUES // (len(by_layer) * log.n_experts)))
    parts, whole = [], True
    for groups in by_layer.values():
        few = sum(group.rows for group in groups) <= most
        chosen = groups if few else spread(groups)
        whole &= len(chosen) == len(groups)
        drawn = []
        for group, quota in zip(chosen, quotas(chosen, most), strict=True):
            batch = log.read(group, COLUMNS, where)
            whole &= batch.num_rows <= quota
            if batch.num_rows:
                drawn.append((batch, draw(batch.num_rows, quota, rng)))
        if drawn:
            parts.append(blocks.drawn(drawn))
    return Sample(tuple(parts), whole)


def no_rows(log: Log, where: str | None) -> str:
    """What to say of a log without rows, or without any that match."""
    return f"{log.path}: no rows" + ("" if where is None else f" where {where}")
