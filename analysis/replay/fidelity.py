"""How far a what-if can be trusted: a native run replayed against a BH run of the same text."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from bhlog.analysis.fold import PIECE_LOGITS, Progress
from bhlog.analysis.log import Log
from bhlog.analysis.replay.replay import COLUMNS, Replay
from bhlog.capture.contract.errors import InvalidOption

_TOKEN = ["rank", "sequence", "position"]
_EMPTY = pl.DataFrame(
    schema={
        "rank": pl.UInt16,
        "sequence": pl.UInt32,
        "position": pl.UInt32,
        "token_id": pl.Int32,
        "experts": pl.List(pl.UInt16),
    }
)


def fidelity(native: Log, rerun: Log, *, progress: Progress | None = None) -> pl.DataFrame:
    """Replay a native run at the settings of a BH run and compare, layer by layer.

    Tokens are matched by rank, sequence and position, and must have the same ids. Both logs are
    read side by side; what is held is the tokens by which one is ahead of the other, few for runs
    of the same text in the same order.

    Returns:
        One row per layer: layer, tokens, replayed and actual (mean experts per token), gap
        (replayed - actual), same_count and same_experts (shares of tokens), jaccard (mean overlap
        of the two sets of experts).

    Raises:
        InvalidOption: the second run is not BH-routed, the models differ, or the texts do.
    """
    options = rerun.manifest.routing.options
    if options is None:
        raise InvalidOption(f"{rerun.path}: routed natively; the second run must be BH-routed")
    if native.layers != rerun.layers or native.n_experts != rerun.n_experts:
        raise InvalidOption(f"{native.path} and {rerun.path} come from models of other shape")
    rule = Replay(native, [options], rerun.kde)
    return pl.DataFrame([_compare(native, rerun, layer, rule, progress) for layer in native.layers])


def _compare(
    native: Log, rerun: Log, layer: int, rule: Replay, progress: Progress | None
) -> dict[str, Any]:
    """A layer's row of fidelity."""
    sums = np.zeros(6)  # tokens, replayed, actual, same count, same experts, Jaccard
    for both in _matched(
        _pieces(native, layer, rule, progress), _pieces(rerun, layer, None, progress), native, rerun
    ):
        sums += _sums(both)
    tokens, replayed, actual, same_count, same_experts, jaccard = sums.tolist()
    if not tokens:
        raise InvalidOption(f"{rerun.path}: no tokens to compare in layer {layer}")
    return {
        "layer": layer,
        "tokens": int(tokens),
        "replayed": replayed / tokens,
        "actual": actual / tokens,
        "gap": (replayed - actual) / tokens,
        "same_count": same_count / tokens,
        "same_experts": same_experts / tokens,
        "jaccard": jaccard / tokens,
    }


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
            raise InvalidOption(f"{native.path} and {rerun.path} hold other texts")
        if both.height:
            yield both
            mine = mine.join(both, on=_TOKEN, how="anti")
            theirs = theirs.join(both, on=_TOKEN, how="anti")
    if theirs.height:
        raise InvalidOption(
            f"{theirs.height:,} of {seen[1]:,} tokens of {rerun.path} are not in {native.path}; "
            "capture both runs from the same text with the same options"
        )


def _sums(both: pl.DataFrame) -> np.ndarray:
    """(6,): tokens, experts of both, tokens with the same number and the same ones, Jaccard."""
    n, m = both["experts"].list.len(), both["experts_actual"].list.len()
    common = both["experts"].list.set_intersection(both["experts_actual"]).list.len()
    union = n + m - common
    same = (n == m) & (common == n)
    jaccard = (common / union).fill_nan(1.0)  # two empty sets agree
    return np.array([both.height, n.sum(), m.sum(), (n == m).sum(), same.sum(), jaccard.sum()])


def _pieces(
    log: Log, layer: int, rule: Replay | None, progress: Progress | None
) -> Iterator[pl.DataFrame]:
    """Tokens of a layer with their experts: replayed by a rule, or as logged (None)."""
    columns = [*_TOKEN, "token_id", "experts"]
    needed = columns if rule is None else [*dict.fromkeys([*columns, *COLUMNS])]
    whole = rule is not None and rule.empirical
    for name in log.shards:
        shard = log.open_shard("routing", name)
        for group in log.groups_of(name, shard):
            if group.layer != layer:
                continue
            most = group.rows if whole else max(1, PIECE_LOGITS // log.n_experts)
            for batch in log.pieces(group, needed, most_rows=most, shard=shard):
                frame = pl.DataFrame(pl.from_arrow(batch.select(columns)))
                if rule is not None:
                    frame = frame.with_columns(_replayed(rule, batch))
                if progress is not None:
                    progress(batch.num_rows)
                yield frame


def _replayed(rule: Replay, batch: pa.RecordBatch) -> pl.Series:
    """The experts that the rule chooses, a list a row."""
    decided = rule.decide(batch)
    n = decided.n_selected[0]
    offsets = pa.array(np.concatenate([[0], np.cumsum(n)]), pa.int32())
    chosen = decided.order[np.arange(decided.order.shape[1]) < n[:, None]]
    return pl.Series("experts", pa.ListArray.from_arrays(offsets, pa.array(chosen)))
