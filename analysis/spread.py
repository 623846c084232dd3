"""Spread: row groups from all over a log and rows drawn from them, few enough to hold in memory."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.log import Log, RowGroup

MOST_GROUPS = 8  # row groups read of a layer


def groups_by_layer(log: Log, layers: Iterable[int] | None = None) -> dict[int, list[RowGroup]]:
    """Row groups of each of these layers (None: all), in log order."""
    found: dict[int, list[RowGroup]] = {layer: [] for layer in sorted(log.check_layers(layers))}
    for group in log.row_groups(layers):
        found[group.layer].append(group)
    return found


def spread(groups: Sequence[RowGroup]) -> list[RowGroup]:
    """At most MOST_GROUPS of the groups, evenly spaced."""
    if len(groups) <= MOST_GROUPS:
        return list(groups)
    return [groups[i] for i in np.linspace(0, len(groups) - 1, MOST_GROUPS).astype(int)]


def quotas(groups: Sequence[RowGroup], most: int) -> list[int]:
    """Rows to draw of each group, in proportion to its rows: about `most` in all, or all."""
    available = sum(group.rows for group in groups)
    return [-(-most * group.rows // max(1, available)) for group in groups]


def draw(n: int, quota: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Indices of at most `quota` of n rows, rising."""
    return np.sort(rng.choice(n, min(n, quota), replace=False))
