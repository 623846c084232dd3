"""Sampling: rows drawn at random from all over a log, few enough to decide on again and again."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from bhlog.analysis.fold import WHOLE, Scope, sampled
from bhlog.analysis.log import Log
from bhlog.analysis.replay.decide import Decider
from bhlog.analysis.replay.rows import Rows
from bhlog.analysis.spread import draw, groups_by_layer, quotas, spread

MOST_VALUES = 2_000_000  # logits of a sample: about 90 MB with ranks, probabilities and p-values
MOST_ROWS = 4_000  # rows of a layer in a sample
_OF_A_TOKEN = ("rank", "sequence", "position")


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


def draw_sample(log: Log, decider: Decider, scope: Scope = WHOLE, *, seed: int = 0) -> Sample:
    """Draw at most MOST_ROWS rows of each layer in scope, and MOST_VALUES logits in all."""
    rng = np.random.default_rng(seed)
    by_layer = groups_by_layer(log, scope.layers)
    most = max(1, min(MOST_ROWS, MOST_VALUES // (len(by_layer) * log.n_experts)))
    columns = decider.columns
    if scope.sample < 1:
        columns = (*columns, *(name for name in _OF_A_TOKEN if name not in columns))
    parts, whole = [], True
    for groups in by_layer.values():
        few = sum(group.rows for group in groups) <= most
        chosen = groups if few else spread(groups)
        whole &= len(chosen) == len(groups)
        drawn = []
        for group, quota in zip(chosen, quotas(chosen, most), strict=True):
            batch = log.read(group, columns, scope.where)
            if scope.sample < 1:
                batch = batch.filter(pa.array(sampled(batch, scope.sample)))
            whole &= batch.num_rows <= quota
            if batch.num_rows:
                drawn.append((batch, draw(batch.num_rows, quota, rng)))
        if drawn:
            parts.append(decider.drawn(drawn))
    return Sample(tuple(parts), whole)
