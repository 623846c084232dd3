"""Decide: policies applied to record batches of a log, whatever their p-values come from."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.fold import WHOLE, Scope
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.analysis.nulls import null_model, routed_empirically
from bhlog.analysis.replay.empirical import empirical_p, pools_of, require_whole_forwards
from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.registry import parse_policy
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.model import KdeModel, LayerNull
from bhlog.capture.contract.rule import OPEN, BhOptions, Bounds, Decisions

COLUMNS = ("layer", "logits", "experts", "forward", "rank")  # the last two for empirical p-values
BLOCK_LOGITS = 1 << 18  # decided together: with what is derived from them, they stay in the cache


class Decider:
    """Policies, ready to be applied to batches of a log. It pickles, with its null model.

    Args:
        log: the run.
        policies: what decides.
        kde: null model; None takes the run's own.
        bounds: of policies that have none of their own.
        scope: which rows it will get.
        empirical: whether p-values rank the batch at hand where no null model is given; None is as
            in the run.

    Attributes:
        n_experts: experts per router.
        policies: with the bounds in force as their own.
        columns: what it reads of a log.
        empirical: whether p-values rank whole forwards, which lie in whole row groups.
        pools: whether a policy ranks the tokens of a sequence, of a forward likewise.

    Raises:
        KdeMismatch: a policy tests p-values and there is no null model, or one for other layers.
        InvalidOption: a bound above the number of experts, or empirical p-values of rows that are
            not whole forwards.
    """

    def __init__(
        self,
        log: Log,
        policies: Sequence[Policy],
        kde: KdeModel | None = None,
        *,
        bounds: Bounds = OPEN,
        scope: Scope = WHOLE,
        empirical: bool | None = None,
    ) -> None:
        self.n_experts = log.n_experts
        self.policies = tuple(policy.bounded(log.n_experts, bounds) for policy in policies)
        self.empirical = False
        self._kde: KdeModel | None = None
        if any(policy.tests for policy in policies):
            if empirical is None:
                empirical = routed_empirically(log)
            self.empirical = empirical and kde is None
            if self.empirical:
                instead = "replay with a null model: --kde FILE"
                require_whole_forwards(log, scope, "empirical p-values rank", instead)
            else:
                self._kde = null_model(log, kde)
        self.columns: tuple[str, ...] = COLUMNS if self.empirical else COLUMNS[:3]
        self.pools = any(policy.pools for policy in policies)
        if self.pools:
            who = next(f"{policy} ranks" for policy in policies if policy.pools)
            require_whole_forwards(log, scope, who, "or leave the policy out")
            self.columns = (*COLUMNS, "sequence")
        self._thresholds: dict[int, dict[float, NDArray[np.float32]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thresholds": {}}  # soon computed again

    @property
    def whole_groups(self) -> bool:
        """Whether it needs the rows of a row group at once; see fold."""
        return self.empirical or self.pools

    def rows(self, batch: pa.RecordBatch) -> Iterator[Rows]:
        """The rows of a batch of one layer that has the columns, in order, in blocks."""
        p = empirical_p(batch) if self.empirical else None
        size = max(1, BLOCK_LOGITS // batch.column("logits").type.list_size)
        if self.pools:
            size = batch.num_rows
        for start in range(0, batch.num_rows, size):
            part = None if p is None else p[start : start + size]
            yield self._rows(batch.slice(start, size), part)

    def drawn(self, parts: Sequence[tuple[pa.RecordBatch, NDArray[np.int64]]]) -> Rows:
        """Some rows of batches of one layer, together."""
        p = None
        if self.empirical:
            p = np.concatenate([empirical_p(batch)[rows] for batch, rows in parts])
        batches = [batch.take(pa.array(rows)) for batch, rows in parts]
        return self._rows(pa.concat_batches(batches), p)

    def decide(self, batch: pa.RecordBatch) -> list[Decisions]:
        """What each policy decides for the rows of a batch that has some.

        A row without a finite logit keeps the experts that were logged: the model's own choice.
        """
        blocks = [
            [policy.decide(rows).decisions for policy in self.policies] for rows in self.rows(batch)
        ]
        return [
            Decisions(
                *(
                    np.concatenate([getattr(part, name) for part in parts])
                    for name in ("order", "n_selected", "n_rejected")
                )
            )
            for parts in zip(*blocks, strict=True)
        ]

    def unsure(self, batch: pa.RecordBatch) -> NDArray[np.bool_]:
        """(T,): rows that a policy may decide otherwise on another machine; see Policy.unsure."""
        return np.concatenate(
            [
                np.any([policy.unsure(rows) for policy in self.policies], axis=0)
                for rows in self.rows(batch)
            ]
        )

    def _rows(self, batch: pa.RecordBatch, p: NDArray[np.float64] | None) -> Rows:
        pools = pools_of(batch) if self.pools else None
        return self.rows_of(logits_of(batch), layer_of(batch), p, batch.column("experts"), pools)

    def rows_of(
        self,
        logits: NDArray[np.float32],
        layer: int,
        p: NDArray[np.float64] | None = None,
        logged: pa.ListArray | None = None,
        pools: NDArray[np.int64] | None = None,
    ) -> Rows:
        """Rows of a layer from their (T, E) logits; see Rows for the others."""
        return Rows(
            logits,
            None if self._kde is None else self._kde[layer],
            p=p,
            logged=logged,
            pools=pools,
            thresholds=self._thresholds.setdefault(layer, {}),
        )


def decider_of(
    log: Log, settings: Sequence[BhOptions], kde: KdeModel | None = None, scope: Scope = WHOLE
) -> Decider:
    """What decides as routing does at these settings, all with the same p_values.

    Raises:
        InvalidOption: there is no setting; or see Decider.
        KdeMismatch: see Decider.
    """
    if not settings:
        raise InvalidOption("replay needs at least one alpha")
    policies = []
    for options in settings:
        low, high = options.bounds(log.n_experts)
        policies.append(replace(parse_policy(str(options.named)), min_k=low, max_k=high))
    empirical = settings[0].p_values == "empirical"
    return Decider(log, policies, kde, scope=scope, empirical=empirical)


def p_values_of(batch: pa.RecordBatch, null: LayerNull | None) -> NDArray[np.float64]:
    """(T, E) float64 p-values of a batch of one layer.

    Args:
        batch: with the COLUMNS; whole forwards if null is None.
        null: the layer's null model; None ranks each forward of each rank on its own.
    """
    return empirical_p(batch) if null is None else null.p_value(logits_of(batch))
