"""Pair: a routing shard beside its tokens shard, checked row by row."""

import threading
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bhlog.analysis.fold import Progress, Scope, cut_shards, side_by_side
from bhlog.analysis.log import Log
from bhlog.analysis.verify.decided import expert_problems, padded_experts
from bhlog.analysis.verify.statistics import statistics_problem
from bhlog.analysis.verify.token_rows import Identity, identity_of
from bhlog.analysis.verify.weighed import loss_remark, unlike_the_formula
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.errors import CorruptShard
from bhlog.capture.contract.schema import SHARD_NAME, routing_schema, tokens_schema


class Pair:
    """A routing shard beside its tokens shard, and what is wrong with them.

    Attributes:
        rows, tokens, nonfinite: counted in the files.
        problems: (check, detail) of each error.
        remarks: warnings on rows.
        digest: of the identity of its tokens; None before they are read.
        fingerprint: of their text, see Identity.fingerprint.
        spans: of their sequences, see Identity.spans.
    """

    def __init__(self, log: Log, name: str, *, by_logit: bool) -> None:
        self.log, self.name, self.by_logit = log, name, by_logit
        self.halves = name in log.shards, name in log.token_shards
        self.rows = self.tokens = self.nonfinite = 0
        self.problems: list[tuple[str, str]] = []
        self.remarks: list[str] = []
        self.digest: bytes | None = None
        self.fingerprint: int | None = None
        self.spans: NDArray[np.int64] = np.zeros((0, 3), np.int64)

    @property
    def whole(self) -> bool:
        """Whether both files are there and nothing is wrong with them."""
        return all(self.halves) and not self.problems

    def __getstate__(self) -> dict[str, Any]:
        """What was found travels, the log does not."""
        return {name: value for name, value in vars(self).items() if name != "log"}

    @property
    def counts(self) -> tuple[int, int]:
        return self.rows, self.tokens

    def check(self, progress: Progress, stopped: threading.Event) -> None:
        """Read both files through; what one of them lacks is told by the check of files.

        Args:
            stopped: set when nobody waits for it any more.

        Raises:
            CorruptShard: a file cannot be read.
        """
        tokens = None
        if self.halves[1]:
            tokens = self._check_tokens()
        if self.halves[0]:
            self._check_routing(tokens, progress, stopped)

    def _check_tokens(self) -> Identity:
        shard = self.log.open_shard("tokens", self.name)
        self._check_schema(shard, tokens_schema())
        table, start = self.log.read_tokens(self.name), 0
        for index in range(shard.metadata.num_row_groups):
            group = shard.metadata.row_group(index)
            self._check_statistics("tokens", group, table.slice(start, group.num_rows))
            start += group.num_rows
        identity = identity_of(table)
        self.tokens = table.num_rows
        self.digest = identity.digest() if table.num_rows else None
        self.fingerprint, self.spans = identity.fingerprint(), identity.spans()
        self._check_identity("tokens", table, identity)
        odd = loss_remark(table)
        if odd is not None:
            self.remarks.append(odd)
        twice = identity.repeated()
        if twice is not None:
            self._row_error(f"tokens: {twice} is there twice")
        elif identity.revisits():
            self.remarks.append(
                f"{identity.revisits():,} positions of a sequence were run more than once"
            )
        return identity

    def _check_routing(
        self, tokens: Identity | None, progress: Progress, stopped: threading.Event
    ) -> None:
        shard = self.log.open_shard("routing", self.name)
        self._check_schema(shard, routing_schema(self.log.n_experts))
        groups = self.log.groups_of(self.name, shard)
        layers = sorted({group.layer for group in groups})
        if tuple(layers) != self.log.layers:
            found, expected = (", ".join(map(str, ls)) for ls in (layers, self.log.layers))
            self._row_error(f"layers {found}; the manifest says {expected}")
        for layer in layers:
            parts = []
            for group in groups:
                if group.layer != layer:
                    continue
                if stopped.is_set():
                    return
                batch = self.log.read(group, self.log.schema("routing").names, shard=shard)
                metadata = shard.metadata.row_group(group.index)
                self._check_statistics(f"layer {layer}", metadata, batch)
                part = identity_of(batch)
                parts.append(part)
                self._check_identity(f"layer {layer}", batch, part)
                problems, nonfinite = expert_problems(self.log, batch, by_logit=self.by_logit)
                for row, problem in problems:
                    self._row_error(f"layer {layer}: {part.words(row)}: {problem}")
                if not problems and self.log.has_logits:
                    self._check_weights(layer, batch)
                self.rows += batch.num_rows
                self.nonfinite += nonfinite
                progress(batch.num_rows)
            difference = None if tokens is None else Identity.join(parts).difference(tokens)
            if difference is not None:
                self._row_error(f"layer {layer}: {difference}")

    def _check_weights(self, layer: int, batch: pa.RecordBatch) -> None:
        """A remark, for a model may have a formula that the manifest does not tell whole."""
        width = max(1, int(values_of(batch.column("n_selected")).max(initial=0)))
        experts = padded_experts(batch.column("experts"), width)
        unlike = int(unlike_the_formula(self.log, batch, experts).sum())
        if unlike:
            self.remarks.append(
                f"layer {layer}: weights of {unlike:,} rows are not by the model's formula as the "
                "manifest tells it"
            )

    def _check_schema(self, shard: pq.ParquetFile, expected: pa.Schema) -> None:
        found = shard.schema_arrow
        extra = sorted(set(found.names) - set(expected.names))
        if extra:
            self.remarks.append(f"columns that the schema does not have: {', '.join(extra)}")
        version = (found.metadata or {}).get(b"bhlog.schema_version", b"none").decode()
        expected_version = self.log.manifest.schema_version
        if version != str(expected_version):
            detail = f"schema version {version}, expected {expected_version}"
            self.problems.append(("shards", detail))

    def _check_statistics(self, where: str, group: Any, rows: pa.RecordBatch | pa.Table) -> None:
        """The statistics of a row group are of its rows."""
        problem = statistics_problem(group, rows)
        if problem is not None:
            self._row_error(f"{where}: by its footer, {problem} in its rows")

    def _check_identity(
        self, where: str, table: pa.Table | pa.RecordBatch, identity: Identity
    ) -> None:
        rank, _ = rank_and_number(self.name)
        ranks = np.unique(values_of(table.column("rank")))
        if table.num_rows and ranks.tolist() != [rank]:
            self._row_error(f"{where}: rows of rank {ranks.tolist()}, the name says {rank}")
        if identity.unknown_phases:
            self._row_error(f"{where}: unknown phase {identity.unknown_phases[0]!r}")
        if not self.log.manifest.token_ids and (identity.token_id >= 0).any():
            self._row_error(f"{where}: has token ids, the manifest says they are withheld")

    def _row_error(self, problem: str) -> None:
        self.problems.append(("rows", problem))


def pairs_of(log: Log, scope: Scope, *, by_logit: bool) -> Generator[Pair, None, None]:
    """Every pair, read through, in order of names.

    Args:
        by_logit: whether experts must come in order of falling logit.
    """
    names = sorted({*log.shards, *log.token_shards})
    work = partial(_checked, by_logit=by_logit)
    for pairs in side_by_side(work, [log], cut_shards(log, names), scope):
        yield from pairs


def _checked(
    log: Log,
    names: Sequence[str],
    progress: Progress,
    stopped: threading.Event,
    *,
    by_logit: bool,
) -> list[Pair]:
    pairs = [Pair(log, name, by_logit=by_logit) for name in names]
    for pair in pairs:
        try:
            pair.check(progress, stopped)
        except CorruptShard as error:
            pair.problems.append(("shards", str(error)))
    return pairs


def rank_and_number(name: str) -> tuple[int, int]:
    """The rank and the number in a shard's name."""
    match = SHARD_NAME.fullmatch(name)
    assert match is not None
    return int(match["rank"]), int(match["number"])
