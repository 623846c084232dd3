"""Overlaps: tokens that two shards of one rank both hold, of which every count doubles."""

from collections.abc import Iterator, Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bhlog.analysis.log import Log

_TOKEN = ["sequence", "position", "forward"]


def shared_tokens(log: Log, spans: Mapping[str, NDArray[np.int64]]) -> Iterator[tuple[str, str]]:
    """(shard, what another one before it holds too) of the shards of one rank.

    Shards whose positions of a sequence cross are read again, two at a time; a position that two
    forwards ran is no token twice.

    Args:
        spans: by name of a shard, see Identity.spans.
    """
    for name, other in _crossing(spans):
        one, before = (pl.from_arrow(log.read_tokens(each, _TOKEN)) for each in (name, other))
        both = pl.DataFrame(one).join(pl.DataFrame(before), on=_TOKEN, how="semi")
        if both.height:
            sequence, position, _ = both.row(0)
            tokens = "1 token is" if both.height == 1 else f"{both.height:,} tokens are"
            yield name, f"{tokens} in {other} too, sequence {sequence} position {position}"


def _crossing(spans: Mapping[str, NDArray[np.int64]]) -> list[tuple[str, str]]:
    """Shards that have positions of a sequence between the first and the last of another's."""
    names = sorted(name for name in spans if len(spans[name]))
    if len(names) < 2:
        return []
    shard = np.repeat(np.arange(len(names)), [len(spans[name]) for name in names])
    sequence, first, last = np.concatenate([spans[name] for name in names]).T
    found: set[tuple[int, int]] = set()
    open_: list[tuple[int, int]] = []  # shard and last position of spans of the sequence at hand
    before = -1
    for i in np.lexsort((first, sequence)).tolist():
        if sequence[i] != before:
            before, open_ = sequence[i], []
        open_ = [(other, end) for other, end in open_ if end >= first[i]]
        found |= {(max(other, shard[i]), min(other, shard[i])) for other, _ in open_}
        open_.append((int(shard[i]), int(last[i])))
    return [(names[a], names[b]) for a, b in sorted(found)]
