"""Writing: a trace as a run like any other."""

import math
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.engines.trace import MOST_VALUES, Block, Trace
from bhlog.analysis.replay.parts import replayed_weights
from bhlog.capture.contract.card import write_card
from bhlog.capture.contract.errors import CorruptTrace, InvalidOption, RunExists, one_line
from bhlog.capture.contract.files import make_folder, require_local, seal, sync_folder, write_part
from bhlog.capture.contract.manifest import Manifest, Origin, Routing, ShardEntry, Totals
from bhlog.capture.contract.opening import seal_of
from bhlog.capture.contract.rule import BhOptions, Decisions, finite_keys
from bhlog.capture.contract.schema import shard_name, shard_schema, tokens_schema
from bhlog.capture.contract.shard_rows import decided, identity, table
from bhlog.capture.contract.uris import command_line

_FEWEST = 64  # values that a row counts for, at least: 2^18 rows are a shard, or 64 MiB of logits
_BY_CHANCE = 1e-9  # how seldom rows may partition the experts
_NUMBERS = ("sequence", "position", "forward")


def write_trace(
    trace: Trace, out: str | Path, progress: Callable[[int], None] = lambda rows: None
) -> Manifest:
    """Write a trace as a run, whole or not at all.

    Memory holds a shard's rows, and what the reader does.

    Args:
        out: the run's folder: not there, or empty.
        progress: takes the rows just written.

    Raises:
        RunExists: the folder is not empty.
        CorruptTrace: a row is none that a router can have made.
        InvalidOption: there are no tokens, or the folder cannot be made.
    """
    with _new_folder(Path(out)) as folder:
        rows = _Rows(trace, folder, progress)
        for block in trace.blocks:
            rows.add(block)
        rows.seal()
        if not rows.entries:
            raise InvalidOption(f"{out}: the trace has no tokens to write")
        manifest = rows.manifest()
        write_card(folder)
        manifest.write(folder)
    return manifest


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that gets its name after the block, and is gone if that fails."""
    require_local(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunExists(f"{out}: is there already; choose another folder, or remove it")
    part = out.absolute().with_name(f"{out.absolute().name}.{secrets.token_hex(4)}.part")
    try:
        try:
            for name in ("routing", "tokens"):
                make_folder(part / name)
        except OSError as error:
            raise InvalidOption(f"{out}: cannot be made ({error.strerror})") from error
        yield part
        part.rename(out)
        sync_folder(part.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


class _Rows:
    """The rows of a run: checked, and written a shard at a time."""

    def __init__(self, trace: Trace, folder: Path, progress: Callable[[int], None]) -> None:
        self.trace, self.folder, self.progress = trace, folder, progress
        self.entries: list[ShardEntry] = []
        self.created = _now()
        self.forwards = self.nonfinite = self.tokens = 0
        self.with_ids = False
        self.groups = self.partitions = 0  # groups of E / k rows, and those that have each expert
        self.waiting: list[Block] = []

    def add(self, block: Block) -> None:
        """Take a block, and write a shard once there are enough."""
        model, T = self.trace.model, len(block.position)
        if block.experts is not None and T:
            self._count_partitions(block.experts)
        self.waiting += [block] * (T > 0)
        self.tokens += T
        width = max(_FEWEST, self.trace.logits * model.n_experts)
        if self.tokens * len(model.layers) * width >= MOST_VALUES:
            self.seal()

    def _count_partitions(self, experts: NDArray[Any]) -> None:
        """Count groups of E / k rows that follow one another, and those that have each expert.

        All do where the order of all experts was read as if its first k columns were contiguous.
        """
        E, (L, T, K) = self.trace.model.n_experts, experts.shape
        n = T * K // E
        if E % K == 0 and n and K < E:
            groups = np.sort(experts[:, : n * E // K].reshape(L, n, E), axis=2)
            self.groups += L * n
            self.partitions += int((groups == np.arange(E)).all(axis=2).sum())

    def _require_no_view(self) -> None:
        """Raise CorruptTrace if all groups have each expert, and not by chance."""
        E, K = self.trace.model.n_experts, self.trace.model.top_k
        choices = math.lgamma(E + 1) - math.lgamma(E - K + 1)
        by_chance = self.groups * (math.lgamma(E + 1) - E / K * choices)
        if self.groups == self.partitions and by_chance < math.log(_BY_CHANCE):
            raise CorruptTrace(
                f"{self.waiting[0].where}: the experts of each {E // K} rows are all {E}, once "
                "each: a view of the order of all experts was written as if it were contiguous; "
                "make the top-k ids contiguous before they are written"
            )

    def seal(self) -> None:
        """Write what waits as a pair of shards."""
        if not self.tokens:
            return
        self._require_no_view()
        trace, schema = self.trace, tokens_schema()
        numbers = {name: self._whole(name, np.uint32) for name in _NUMBERS}
        token_id = np.full(self.tokens, -1, dtype=np.int32)
        if self.waiting[0].token_id is not None:
            token_id = self._whole("token_id", np.int32)
        phase = self._joined("decode", 0).astype(np.bool_).astype(np.int8)
        own = identity(0, token_id, phase, **numbers)
        experts, weights, logits = self._decisions()
        used = experts >= 0
        routing = shard_schema("routing", trace.model.n_experts, logits=trace.logits)
        tables = (
            table(
                routing,
                own
                | decided(
                    routing,
                    layer,
                    used[i].sum(axis=1).astype(np.uint16),
                    experts[i][used[i]].astype(np.uint16),
                    weights[i][used[i]].astype(np.float32),
                    None if logits is None else logits[i],
                ),
            )
            for i, layer in enumerate(trace.model.layers)
        )
        name = shard_name(0, len(self.entries))
        parts = [
            write_part(self.folder / "tokens" / name, [table(schema, own)]),
            write_part(self.folder / "routing" / name, tables),
        ]
        seals = [seal_of(seal(part)) for part in parts]
        size, rows = seals[0].bytes + seals[1].bytes, seals[1].rows
        self.entries.append(ShardEntry(name, rows, self.tokens, size, seals[1], seals[0]))
        self.forwards = max(self.forwards, int(numbers["forward"].max()) + 1)
        self.with_ids |= bool((token_id >= 0).any())
        self.progress(rows)
        self.waiting, self.tokens = [], 0

    def _joined(self, name: str, axis: int) -> NDArray[Any]:
        return np.concatenate([getattr(block, name) for block in self.waiting], axis)

    def _whole(self, name: str, dtype: type) -> NDArray[Any]:
        """(T,) whole numbers of the blocks that wait.

        Raises:
            CorruptTrace: one is none, or too large.
        """
        try:
            values = pa.array(self._joined(name, 0)).cast(pa.from_numpy_dtype(dtype))
            return np.asarray(values.to_numpy())
        except pa.ArrowInvalid as error:
            raise CorruptTrace(f"{self.waiting[0].where}: {name}: {one_line(str(error))}") from None

    def _require(self, fine: Any, words: str) -> None:
        """Raise CorruptTrace, with its place, if a row (L, T) is not fine."""
        if not fine.all():
            layer, row = np.argwhere(np.logical_not(fine))[0]
            ends = np.cumsum([len(block.position) for block in self.waiting])
            at = int(np.searchsorted(ends, row, side="right"))
            raise CorruptTrace(
                f"{self.waiting[at].where}: layer {self.trace.model.layers[layer]}, position "
                f"{self._joined('position', 0)[row]}: {words}"
            )

    def _decisions(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float32] | None]:
        """(L, T, K) experts and weights, and (L, T, E) logits if there are any.

        Raises:
            CorruptTrace: they are none that a router can have made.
        """
        model, first = self.trace.model, self.waiting[0]
        E, shape = model.n_experts, (len(model.layers), self.tokens)
        logits = None if first.logits is None else self._joined("logits", 1)
        if first.experts is not None:
            experts = self._joined("experts", 1)
            K = experts.shape[2]
            self._require(np.full(shape, experts.dtype.kind in "iu"), "experts are whole numbers")
            once = np.sort(np.where(experts < 0, E + np.arange(K), experts), axis=2)
            fine = ((experts >= -1) & (experts < E)).all(axis=2)
            fine &= (once[..., 1:] != once[..., :-1]).all(axis=2)
            fine &= ((experts[..., 1:] < 0) | (experts[..., :-1] >= 0)).all(axis=2)
            self._require(fine, f"expected experts below {E}, each once, unused slots at the end")
        weights: NDArray[np.float32] | None = None
        if first.weights is not None:
            with np.errstate(over="ignore"):
                weights = self._joined("weights", 1).astype(np.float32)
            fine = (np.isfinite(weights) & (weights >= 0) | (experts < 0)).all(axis=2)
            self._require(fine, "a weight is NaN, infinite or negative")
        if logits is None:
            if weights is None:
                self.trace.noted["weights"] = "not in the trace: equal"
                n = np.maximum((experts >= 0).sum(axis=2, keepdims=True), 1)
                weights = np.broadcast_to(np.float32(1) / n.astype(np.float32), experts.shape)
            return experts, weights, None
        if first.experts is not None:
            self._require((experts >= 0).all(axis=2), "logits come with an expert in each slot")
        pairs = [
            self._by_logit(
                logits[i],
                None if first.experts is None else experts[i],
                None if weights is None else weights[i],
            )
            for i in range(len(model.layers))
        ]
        chosen, weighed = (np.stack(parts) for parts in zip(*pairs, strict=True))
        return chosen, weighed, logits

    def _by_logit(
        self,
        logits: NDArray[np.float32],
        experts: NDArray[Any] | None,
        weights: NDArray[np.float32] | None,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """(T, K) experts of a layer, or its largest logits, by falling logit, and their weights.

        Where two are equal the lower one is first.
        """
        model, keys = self.trace.model, finite_keys(logits)
        self.nonfinite += int((~np.isfinite(logits)).any(axis=1).sum())
        if experts is None:
            chosen = np.argsort(-keys, axis=1, kind="stable")[:, : model.top_k]
        else:
            rising = np.argsort(experts, axis=1)
            of_slot = np.take_along_axis(keys, experts.astype(np.int64), axis=1)
            falling = np.argsort(-np.take_along_axis(of_slot, rising, 1), axis=1, kind="stable")
            slots = np.take_along_axis(rising, falling, axis=1)
            chosen = np.take_along_axis(experts, slots, axis=1)
            if weights is not None:
                return chosen.astype(np.int32), np.take_along_axis(weights, slots, axis=1)
        n = np.full(len(chosen), chosen.shape[1], dtype=np.uint16)
        decisions = Decisions(chosen.astype(np.uint16), n, n)
        return chosen.astype(np.int32), replayed_weights(logits, decisions, BhOptions(), model)

    def manifest(self) -> Manifest:
        """Of the run, once all is written."""
        entries, trace = self.entries, self.trace
        program, *words = sys.argv or [""]
        return Manifest(
            run_id=secrets.token_hex(16),
            created=self.created,
            closed=_now(),
            model=trace.model,
            routing=Routing(),
            token_ids=self.with_ids,
            versions={"bhlog": version("bhlog")},
            totals=Totals(
                rows=sum(entry.rows for entry in entries),
                tokens=sum(entry.tokens for entry in entries),
                shards=len(entries),
                forwards=self.forwards,
                nonfinite=self.nonfinite,
            ),
            shards=tuple(entries),
            options={"engine": trace.engine, **trace.noted},
            logits=trace.logits,
            origin=Origin(command_line([Path(program).name, *words])),
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
