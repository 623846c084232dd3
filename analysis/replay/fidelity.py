"""How far a what-if can be trusted: a native run replayed against a BH run of the same text."""

import numpy as np
import polars as pl

from analysis.log import Log
from analysis.replay.replay import COLUMNS, Replay
from capture.contract.errors import InvalidOption

_TOKEN = ["rank", "sequence", "position"]


def fidelity(native: Log, rerun: Log) -> pl.DataFrame:
    """Replay a native run at the settings of a BH run and compare, layer by layer.

    Tokens are matched by rank, sequence and position, and must have the same ids.

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
    rows = []
    for layer in native.layers:
        replayed = _layer(native, layer, rule)
        actual = _layer(rerun, layer, None)
        both = replayed.join(actual, on=_TOKEN, how="inner", suffix="_actual")
        if both.height != actual.height:
            raise InvalidOption(
                f"{actual.height - both.height} of {actual.height} tokens of {rerun.path} are not "
                f"in {native.path}; capture both runs from the same text with the same options"
            )
        if both.filter(pl.col("token_id") != pl.col("token_id_actual")).height:
            raise InvalidOption(f"{native.path} and {rerun.path} hold other texts")
        n, m = both["experts"].list.len(), both["experts_actual"].list.len()
        common = both["experts"].list.set_intersection(both["experts_actual"]).list.len()
        union = n + m - common
        rows.append(
            {
                "layer": layer,
                "tokens": both.height,
                "replayed": n.mean(),
                "actual": m.mean(),
                "gap": n.cast(pl.Float64).mean() - m.cast(pl.Float64).mean(),  # type: ignore[operator]
                "same_count": (n == m).mean(),
                "same_experts": ((n == m) & (common == n)).mean(),
                "jaccard": (common / union).fill_nan(1.0).mean(),
            }
        )
    return pl.DataFrame(rows)


def _layer(log: Log, layer: int, rule: Replay | None) -> pl.DataFrame:
    """Tokens of a layer with their experts: replayed by a rule, or as logged (None)."""
    columns = [*dict.fromkeys([*_TOKEN, "token_id", *COLUMNS])]
    if rule is None:
        columns = [*_TOKEN, "token_id", "experts"]
    frames = []
    for batch in log.batches(columns, layers=[layer]):
        frame = pl.DataFrame(pl.from_arrow(batch.select([*_TOKEN, "token_id", "experts"])))
        if rule is not None:
            decided = rule.decide(batch)
            n = decided.n_selected[0]
            chosen = decided.order[np.arange(decided.order.shape[1]) < n[:, None]]
            experts = pl.Series("experts", np.split(chosen, np.cumsum(n)[:-1]), pl.List(pl.UInt16))
            frame = frame.with_columns(experts)
        frames.append(frame)
    return pl.concat(frames)
