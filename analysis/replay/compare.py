"""Compare: what several policies would have chosen, from one pass over a log."""

from collections.abc import Sequence
from typing import Self

import polars as pl
import pyarrow as pa

from bhlog.analysis.fold import Progress, Scope, fold
from bhlog.analysis.log import Log, layer_of
from bhlog.analysis.replay.blocks import Blocks, no_rows
from bhlog.analysis.replay.families import Policy, parse_policy
from bhlog.analysis.replay.match import default_bounds, match_experts
from bhlog.analysis.replay.replay import COLUMNS
from bhlog.analysis.replay.summary import LayerSummary, summary_frame
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.model import KdeModel


def compare(
    log: Log,
    policies: Sequence[Policy | str],
    *,
    kde: KdeModel | None = None,
    experts: float | None = None,
    min_k: int | None = None,
    max_k: int | None = None,
    layers: Sequence[int] | None = None,
    where: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Summaries of a log under several policies, in one pass.

    Args:
        policies: or their texts, such as "bh:0.3".
        kde: null model; None takes the run's own. Only policies that test p-values need one.
        experts: mean experts per token to bring every policy to first; see
            bhlog.analysis.replay.match.match_experts. Texts may then leave the value out: "bh".
        min_k, max_k: bounds of policies that have none of their own; None takes the run's, or 1
            and all experts.
        layers, where: which rows; see Scope.

    Returns:
        One row per policy and layer, and one per policy over all layers (layer null): policy (its
        text), min_k, max_k, and the columns of replay.summary; none_rejected is null for
        policies that test nothing.

    Raises:
        InvalidOption: no policy, a text or bound that is wrong, or no rows.
        KdeMismatch: a policy needs p-values and the run has no null model that serves.
    """
    wanted = [
        parse_policy(p, open_value=experts is not None) if isinstance(p, str) else p
        for p in policies
    ]
    if not wanted:
        raise InvalidOption("name at least one policy, such as bh:0.3")
    min_k, max_k = default_bounds(log, min_k, max_k)
    if experts is not None:
        wanted = match_experts(
            log, wanted, experts, kde=kde, min_k=min_k, max_k=max_k, layers=layers, where=where,
            progress=progress,
        )  # fmt: skip
    bounds = [policy.bounds(log.n_experts, min_k, max_k) for policy in wanted]
    blocks = Blocks(log, wanted, kde, where)
    top_k = log.manifest.model.top_k
    total = fold(
        log,
        lambda: _Summaries(blocks, wanted, bounds, top_k),
        COLUMNS,
        Scope(layers, where, threads=threads, progress=progress),
        whole_groups=blocks.empirical,
    )
    if not total.layers:
        raise InvalidOption(no_rows(log, where))
    frames = []
    for i, (policy, (low, high)) in enumerate(zip(wanted, bounds, strict=True)):
        parts = {layer: summaries[i] for layer, summaries in total.layers.items()}
        frame = summary_frame(parts, min_k=low, max_k=high, top_k=top_k)
        names = [
            pl.lit(str(policy)).alias("policy"),
            pl.lit(low).alias("min_k"),
            pl.lit(high).alias("max_k"),
        ]
        if not policy.tests:
            frame = frame.with_columns(none_rejected=pl.lit(None, pl.Float64))
        frames.append(frame.select(*names, pl.all()))
    return pl.concat(frames)


class _Summaries:
    """A LayerSummary per layer and policy."""

    def __init__(
        self,
        blocks: Blocks,
        policies: Sequence[Policy],
        bounds: Sequence[tuple[int, int]],
        top_k: int,
    ) -> None:
        self.blocks, self.policies, self.bounds, self.top_k = blocks, policies, bounds, top_k
        self.layers: dict[int, list[LayerSummary]] = {}

    def update(self, batch: pa.RecordBatch) -> None:
        E = batch.column("logits").type.list_size
        summaries = self.layers.setdefault(
            layer_of(batch), [LayerSummary(E) for _ in self.policies]
        )
        for rows in self.blocks.of(batch):
            for policy, (low, high), summary in zip(
                self.policies, self.bounds, summaries, strict=True
            ):
                choice = policy.decide(rows, min_k=low, max_k=high)
                summary.add(
                    rows,
                    choice.n_selected,
                    choice.n_rejected,
                    choice.out_of_order,
                    top_k=self.top_k,
                )

    def merge(self, other: Self) -> None:
        for layer, summaries in other.layers.items():
            if layer not in self.layers:
                self.layers[layer] = summaries
            else:
                for mine, theirs in zip(self.layers[layer], summaries, strict=True):
                    mine.merge(theirs)
