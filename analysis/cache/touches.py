"""Touches: which experts each forward pass reads, layer by layer, in the order that they ran."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bhlog.analysis.fold import WHOLE, Scope, fold
from bhlog.analysis.log import Log, layer_of
from bhlog.analysis.replay.decide import Decider
from bhlog.analysis.replay.rows import damaged
from bhlog.analysis.replay.touched import FORWARD, Held, forward_numbers, merged
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.errors import InvalidOption

_COLUMNS = ("experts", *FORWARD, "phase")


@dataclass(frozen=True, eq=False)
class Touches:
    """The steps of one process under one policy; a step is a layer of a forward pass.

    A step reads each expert that any of its tokens chose, once: its lookups. Steps are in the
    order of (forward, layer), a step's experts in rising order.

    Attributes:
        layers: (S,) int64, the layer of each step.
        decode: (S,) int64, 1 where all tokens of the step were decoded, 0 for a prompt.
        starts: (S + 1,) int64, where each step's experts start in `experts`.
        experts: (N,) int64.
    """

    layers: NDArray[np.int64]
    decode: NDArray[np.int64]
    starts: NDArray[np.int64]
    experts: NDArray[np.int64]


def touches(log: Log, decider: Decider | None = None, scope: Scope = WHOLE) -> list[list[Touches]]:
    """What each process of a run touched, for the logged experts, or for each policy of a decider.

    Rows are gathered by forward and layer on all cores; what is held is a bit an expert for each
    step and policy.

    Args:
        decider: None takes the experts that the run used.
        scope: which rows.

    Returns:
        By policy, then by rank.

    Raises:
        InvalidOption: no rows, or a sample of them, which is not what a forward touches.
        CorruptShard: experts are logged that cannot be.
    """
    if scope.sample < 1:
        raise InvalidOption("a sample of tokens does not touch what a forward does; leave it out")
    columns = _COLUMNS if decider is None else (*decider.columns, *_COLUMNS)
    whole = decider is not None and decider.whole_groups
    total = fold(
        log,
        partial(_Gathered, log.n_experts, decider),
        (*dict.fromkeys(columns),),
        scope,
        whole_groups=whole,
    )
    if not total.parts:
        raise InvalidOption(f"{log.path}: no rows{scope.words}")
    return [[*total.by_rank(i)] for i in range(1 if decider is None else len(decider.policies))]


class _Gathered:
    """Steps as the rows of batches give them: numbered by rank, forward and layer, with a bit for
    each expert that each policy chose, and a last one for a prompt."""

    def __init__(self, n_experts: int, decider: Decider | None) -> None:
        self.n_experts, self.decider = n_experts, decider
        self.parts: list[Held] = []

    def update(self, batch: pa.RecordBatch) -> None:
        numbers = forward_numbers(batch) << 16 | layer_of(batch)
        prompt = values_of(pc.not_equal(batch.column("phase").dictionary_decode(), "decode"))
        chosen = [self._logged(batch)] if self.decider is None else self._decided(batch)
        bits = [np.packbits(np.column_stack([one, prompt]), axis=1) for one in chosen]
        self.parts.append(merged([(numbers, np.array(bits))]))

    def merge(self, other: Self) -> None:
        self.parts += other.parts

    def by_rank(self, policy: int) -> Iterator[Touches]:
        """The steps of each process."""
        numbers, bits = merged([(numbers, bits[[policy]]) for numbers, bits in self.parts])
        ranks = numbers.view(np.uint64) >> np.uint64(48)
        for rank in np.unique(ranks):
            mine = ranks == rank
            touched = np.unpackbits(bits[0, mine], axis=1, count=self.n_experts + 1)
            steps, experts = np.nonzero(touched[:, :-1])
            starts = np.searchsorted(steps, np.arange(mine.sum() + 1))
            decode = 1 - touched[:, -1].astype(np.int64)
            yield Touches(numbers[mine] & 0xFFFF, decode, starts, experts)

    def _logged(self, batch: pa.RecordBatch) -> NDArray[np.bool_]:
        column = batch.column("experts")
        experts, n = values_of(column.flatten()), np.diff(values_of(column.offsets))
        if (experts >= self.n_experts).any():
            raise damaged(self.n_experts)
        chosen = np.zeros((len(batch), self.n_experts), dtype=np.bool_)
        chosen[np.repeat(np.arange(len(batch)), n), experts] = True
        return chosen

    def _decided(self, batch: pa.RecordBatch) -> list[NDArray[np.bool_]]:
        assert self.decider is not None
        blocks = [
            [policy.decide(rows).chosen for policy in self.decider.policies]
            for rows in self.decider.rows(batch)
        ]
        return [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
