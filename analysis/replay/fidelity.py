"""How far a what-if can be trusted: a native run replayed against a routed run of the same text."""

import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from bhlog.analysis.fold import PIECE_LOGITS, WHOLE, Progress, Scope, sampled, side_by_side
from bhlog.analysis.log import Log
from bhlog.analysis.replay.decide import Decider, decider_of
from bhlog.analysis.sequences import COLUMNS, ONE, SequenceSums, ratio_se
from bhlog.analysis.texts import TOKEN, other_texts, tokens_missing
from bhlog.capture.contract.arrays import arrow_of
from bhlog.capture.contract.errors import InvalidOption

_TOKEN = list(TOKEN)
_SUMS = ("tokens", "replayed", "actual", "gap", "same_count", "same_experts", "jaccard")
_EMPTY = pl.DataFrame(
    schema={
        "rank": pl.UInt16,
        "sequence": pl.UInt32,
        "position": pl.UInt32,
        "token_id": pl.Int32,
        "experts": pl.List(pl.UInt16),
    }
)


def fidelity(native: Log, rerun: Log, *, scope: Scope = WHOLE) -> pl.DataFrame:
    """Replay a native run at the settings of a routed run and compare, layer by layer.

    Tokens are matched by rank, sequence and position, and must have the same ids. Both logs are
    read side by side; what is held is the tokens by which one is ahead of the other, few for runs
    of the same text in the same order.

    Args:
        scope: which rows of both; layers are read side by side.

    Returns:
        One row per layer: layer, tokens, replayed and actual (mean experts per token), gap
        (replayed - actual), same_count and same_experts (shares of tokens), jaccard (mean overlap
        of the two sets of experts); beside each mean its standard error, X_se, clustered by
        sequence, null where there is one.

    Raises:
        InvalidOption: the second run is routed natively, the models differ, or the texts do.
    """
    options = rerun.manifest.routing.options
    if options is None:
        raise InvalidOption(f"{rerun.path}: routed natively; expected a run that a policy routed")
    if native.layers != rerun.layers or native.n_experts != rerun.n_experts:
        raise InvalidOption(f"{native.path} and {rerun.path} come from models of other shape")
    layers = sorted(native.check_layers(scope.layers))
    decider = decider_of(native, [options], rerun.kde, scope)
    compare = partial(_compare, decider=decider, scope=scope.but(executor=None, progress=None))
    with closing(side_by_side(compare, [native, rerun], layers, scope)) as found:
        rows = [*found]
    errors = {name: pl.Float64 for name in rows[0] if name.endswith("_se")}
    return pl.DataFrame(rows, schema_overrides=errors)


def _compare(
    native: Log,
    rerun: Log,
    layer: int,
    progress: Progress,
    stopped: threading.Event,
    *,
    decider: Decider,
    scope: Scope,
) -> dict[str, Any]:
    """A layer's row of fidelity."""
    scope = scope.but(progress=progress)
    sums = SequenceSums(1, len(_SUMS))
    for both in _matched(
        _pieces(native, layer, decider, scope), _pieces(rerun, layer, None, scope), native, rerun
    ):
        if stopped.is_set():
            return {}
        _add(sums, both)
    table = sums.table(0) / np.array([1, 1, 1, 1, 1, 1, ONE])
    tokens = table[:, 0]
    if not len(table):
        raise InvalidOption(f"{rerun.path}: no tokens to compare in layer {layer}{scope.words}")
    row: dict[str, Any] = {"layer": layer, "tokens": int(tokens.sum())}
    for name, values in zip(_SUMS[1:], table.T[1:], strict=True):
        row[name] = float(values.sum() / tokens.sum())
        row[f"{name}_se"] = ratio_se(values, tokens)
    return row


def _matched(
    replayed: Iterator[pl.DataFrame], actual: Iterator[pl.DataFrame], native: Log, rerun: Log
) -> Iterator[pl.DataFrame]:
    """Tokens that are in both streams, as soon as both have given them.

    Raises:
        InvalidOption: a token of the second is not in the first, or has another id there.
    """
    mine, theirs = _EMPTY, _EMPTY
    seen = [0, 0]
    more = [True, True]
    while any(more):
        # the one that is behind, or the one that is left
        side = 0 if more[0] and (seen[0] <= seen[1] or not more[1]) else 1
        piece = next((replayed, actual)[side], None)
        if piece is None:
            more[side] = False
            continue
        seen[side] += piece.height
        if side == 0:
            mine = pl.concat([mine, piece])
        else:
            theirs = pl.concat([theirs, piece])
        both = mine.join(theirs, on=_TOKEN, suffix="_actual")
        if both.filter(pl.col("token_id") != pl.col("token_id_actual")).height:
            raise other_texts(native.path, rerun.path)
        if both.height:
            yield both
            mine = mine.join(both, on=_TOKEN, how="anti")
            theirs = theirs.join(both, on=_TOKEN, how="anti")
    if theirs.height:
        raise tokens_missing(theirs.height, seen[1], rerun.path, native.path)


def _add(sums: SequenceSums, both: pl.DataFrame) -> None:
    """Count tokens, experts of both, tokens with the same number and the same ones, Jaccard."""
    mine, theirs = both["experts"], both["experts_actual"]
    common = mine.list.set_intersection(theirs).list.len().cast(pl.Int64).to_numpy()
    n, m = (experts.list.len().cast(pl.Int64).to_numpy() for experts in (mine, theirs))
    union = n + m - common
    jaccard = np.where(union > 0, common / np.maximum(union, 1), 1.0)  # two empty sets agree
    same = (n == m) & (common == n)
    shares = (jaccard * ONE).astype(np.int64)
    values = np.stack([np.ones_like(n), n, m, n - m, n == m, same, shares], axis=1)
    slots = sums.slots(both.select(COLUMNS).to_arrow().combine_chunks().to_batches()[0])
    np.add.at(sums.sums[0], slots, values)


def _pieces(log: Log, layer: int, decider: Decider | None, scope: Scope) -> Iterator[pl.DataFrame]:
    """Tokens of a layer with their experts: as decided again, or as logged (None)."""
    columns = [*_TOKEN, "token_id", "experts"]
    needed = columns if decider is None else [*dict.fromkeys([*columns, *decider.columns])]
    whole = decider is not None and decider.whole_groups
    for name in log.shards:
        shard = log.open_shard("routing", name)
        for group in log.groups_of(name, shard):
            if group.layer != layer:
                continue
            most = group.rows if whole else max(1, PIECE_LOGITS // log.n_experts)
            for batch in log.pieces(group, needed, scope.where, most_rows=most, shard=shard):
                if scope.sample < 1:
                    batch = batch.filter(arrow_of(sampled(batch, scope.sample)))
                if scope.progress is not None:
                    scope.progress(batch.num_rows)
                if not batch.num_rows:
                    continue
                frame = pl.DataFrame(pl.from_arrow(batch.select(columns)))
                if decider is not None:
                    frame = frame.with_columns(_decided(decider, batch))
                yield frame


def _decided(decider: Decider, batch: pa.RecordBatch) -> pl.Series:
    """The experts that are chosen, a list a row."""
    (decisions,) = decider.decide(batch)
    offsets = arrow_of(np.concatenate([[0], np.cumsum(decisions.n_selected)]).astype(np.int32))
    chosen = np.arange(decisions.order.shape[1]) < decisions.n_selected[:, None]
    return pl.Series(
        "experts", pa.ListArray.from_arrays(offsets, arrow_of(decisions.order[chosen]))
    )
