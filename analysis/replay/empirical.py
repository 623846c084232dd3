"""Empirical p-values: logits ranked among those of their forward, which must be there whole."""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.condition import condition_columns
from bhlog.analysis.fold import Scope
from bhlog.analysis.log import Log, RowGroup, logits_of
from bhlog.analysis.replay.touched import forward_numbers
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.rule import empirical_p_values

_OF_A_FORWARD = {"forward", "layer", "phase", "rank"}  # the same in all rows of a layer's batch
_ANY = (0, (1 << 48) - 1)  # of a row group without statistics


def empirical_p(batch: pa.RecordBatch) -> NDArray[np.float64]:
    """(T, E) float64 p-values of a batch of one layer, each forward of each rank ranked alone."""
    logits = logits_of(batch)
    p = np.empty(logits.shape, dtype=np.float64)
    forward = forward_numbers(batch)
    for number in np.unique(forward):
        rows = forward == number
        p[rows] = empirical_p_values(logits[rows])
    return p


def require_whole_forwards(log: Log, scope: Scope, who: str, instead: str) -> None:
    """Check that the rows of a scope are whole forwards, each of them in one row group a layer.

    Args:
        who: who ranks, and the verb, for the error.
        instead: what to do where they are not.

    Raises:
        InvalidOption: they are not.
    """
    missing = not_whole(log, scope)
    if missing is not None:
        raise InvalidOption(f"{log.path}: {who} whole batches, but {missing}; {instead}")


def pools_of(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """(T,): a number for each sequence of each forward of each rank, the same in all its rows."""
    forward = np.unique(forward_numbers(batch), return_inverse=True)[1].astype(np.int64)
    return np.asarray(forward << 32 | values_of(batch.column("sequence")).astype(np.int64))


def not_whole(log: Log, scope: Scope) -> str | None:
    """Why forwards are not there whole, each in one row group a layer; None if they are."""
    return missing_rows(log, scope) or _split(log, scope)


def missing_rows(log: Log, scope: Scope) -> str | None:
    """Why rows of forwards are missing in a scope; None if there are none."""
    totals = log.manifest.totals
    cutting = (
        [] if scope.where is None else sorted({*condition_columns(scope.where)} - _OF_A_FORWARD)
    )
    if log.manifest.sample_every > 1 or totals.dropped:
        return "tokens were left out of this log (sampled or dropped)"
    if totals.rejected:
        return "drafts that were rejected are not in this log (assisted decoding)"
    if scope.sample < 1:
        return "a sample leaves out parts of them; take all rows"
    if cutting:
        return (
            f"a condition on {', '.join(cutting)} leaves out parts of them; ask for whole ones by "
            f"{', '.join(sorted(_OF_A_FORWARD))}"
        )
    return None


def _split(log: Log, scope: Scope) -> str | None:
    """Which forward has rows of one layer in several row groups, as other tools write them."""
    spans: dict[int, list[tuple[int, int, RowGroup]]] = {}
    wanted = log.check_layers(scope.layers)
    for name in log.shards:
        shard = log.open_shard("routing", name)
        at = {column: shard.metadata.schema.names.index(column) for column in ("rank", "forward")}
        for group in log.groups_of(name, shard):
            if group.layer in wanted:
                found = shard.metadata.row_group(group.index)
                rank, forward = (found.column(at[column]).statistics for column in at)
                low, high = _ANY
                if rank is not None and forward is not None:
                    low, high = rank.min << 32 | forward.min, rank.max << 32 | forward.max
                spans.setdefault(group.layer, []).append((low, high, group))
    for layer, parts in spans.items():
        twice = _twice(log, [*_overlapping(parts)])
        if twice is not None:
            return (
                f"rows of forward {twice & 0xFFFFFFFF} at layer {layer} lie in several row groups"
            )
    return None


def _overlapping(parts: Sequence[tuple[int, int, RowGroup]]) -> Iterator[RowGroup]:
    """Row groups that may hold a forward which another one holds too."""
    ordered = sorted(parts, key=lambda part: part[:2])
    highest = -1
    for i, (low, high, group) in enumerate(ordered):
        after = ordered[i + 1][0] if i + 1 < len(ordered) else high + 1
        highest, before = max(highest, high), highest
        if low <= before or after <= highest:
            yield group


def _twice(log: Log, groups: Sequence[RowGroup]) -> int | None:
    """A forward that several of the row groups hold, as rank << 32 | forward."""
    seen: set[int] = set()
    for group in groups:
        here = {*forward_numbers(log.read(group, ("rank", "forward"))).tolist()}
        if here & seen:
            return int(min(here & seen))
        seen |= here
    return None
