"""Fold: how every offline job that does not need the log's order goes over a log."""

import io
import os
import pickle
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, groupby
from typing import IO, Any, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.log import Log, RowGroup
from bhlog.analysis.workers import elsewhere, in_order
from bhlog.capture.contract.arrays import arrow_of, values_of
from bhlog.capture.contract.errors import InvalidOption

Progress = Callable[[int], None]  # called with the number of rows just read

PIECE_LOGITS = 1 << 18  # read and folded at a time: 1 MiB, which stays in the cache
MOST_STRETCHES = 1 << 12  # of a log, whoever folds them: results are grouped alike
STRETCH_LOGITS = 1 << 23  # at least, unless a shard has fewer: what a task costs is a tenth of it
TOGETHER = 4  # stretches of a task, at most, whose sums are exact
FEWEST_TASKS = 8
MOST_FOOTERS = 256  # that are read to cut a log
_CODEC = "lz4"  # of results that travel: counts are mostly zeros
_PLAIN = (type(None), bool, int, float, str, tuple)
_OF_A_TOKEN = ("rank", "sequence", "position")


class Accumulator(Protocol):
    """A fold over record batches: every offline job is one.

    `update` sees batches of one layer each; `merge` adds what another accumulator saw later in the
    log, so merging in log order gives the same result however the log was split. It pickles.
    """

    def update(self, batch: pa.RecordBatch) -> None: ...

    def merge(self, other: Self) -> None: ...


A = TypeVar("A", bound=Accumulator)
R = TypeVar("R")
T = TypeVar("T")
Stretch = list[tuple[str, list[RowGroup] | None]]  # shards, with some row groups or with all


@dataclass(frozen=True)
class Scope:
    """Which rows of a log a job reads, and how.

    Attributes:
        layers: only these; None means all.
        where: only rows that match this condition in SQL on columns of routing and of tokens, such
            as "phase = 'decode' AND source = 'notes.txt'".
        sample: share of the tokens, 0 < sample <= 1; a token is in at all layers or at none, and
            the same tokens are in each time.
        threads: how many work at once; None means one a core.
        progress: called with the number of rows just read.
        executor: where stretches of the log are folded, in place of threads here; its workers see
            the log under the same path and have this version of bhlog.
    """

    layers: Iterable[int] | None = None
    where: str | None = None
    sample: float = 1.0
    threads: int | None = None
    progress: Progress | None = field(default=None, compare=False)
    executor: Executor | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if not 0 < self.sample <= 1:
            raise InvalidOption(f"sample must be above 0 and at most 1, got {self.sample}")
        if self.threads is not None and self.threads < 1:
            raise InvalidOption(f"threads must be at least 1, got {self.threads}")

    @property
    def narrows(self) -> bool:
        """Whether it may leave rows out."""
        return self.layers is not None or self.where is not None or self.sample < 1

    @property
    def words(self) -> str:
        """What narrows the rows, as the end of a sentence: " where phase = 'decode'"."""
        words = "" if self.where is None else f" where {self.where}"
        return words + (f" at sample {self.sample:g}" if self.sample < 1 else "")

    def but(self, **changes: Any) -> "Scope":
        """The same with other values."""
        return replace(self, **changes)


WHOLE = Scope()


def fold(
    log: Log,
    make: Callable[[], A],
    columns: Sequence[str],
    scope: Scope = WHOLE,
    *,
    whole_groups: bool = False,
    exact: bool = False,
) -> A:
    """Run an accumulator over a log on all cores and return it, merged in log order.

    Memory stays flat: a thread holds one piece of a row group at a time, small enough for the
    cache, and few accumulators wait to be merged.

    Args:
        make: gives a fresh accumulator; one is made per stretch of the log. For an executor it
            must pickle.
        columns: what `update` reads; "layer" is always there.
        scope: which rows, and how they are read.
        whole_groups: whether `update` needs the rows of a row group at once, as empirical p-values
            do.
        exact: whether the sums are the same however rows are grouped, as those of integers are. An
            executor then folds several stretches a task: what a task gives is large, and travels.
    """
    needed = ["layer", *(name for name in columns if name != "layer")]
    if scope.sample < 1:
        needed += [name for name in _OF_A_TOKEN if name not in needed]
    rows = scope.but(executor=None, progress=None)
    work = partial(_fold, make=make, columns=needed, scope=rows, whole_groups=whole_groups)
    total = make()
    constant = [one for one in getattr(make, "args", ()) if not isinstance(one, _PLAIN)]
    stretches = stretches_of(log, scope.layers)
    if exact and (scope.executor or log.executor) is not None:
        n = max(1, min(TOGETHER, len(stretches) // FEWEST_TASKS))
        stretches = [[*chain(*stretches[i : i + n])] for i in range(0, len(stretches), n)]
    with closing(side_by_side(work, [log], stretches, scope, constant=constant)) as parts:
        for part in parts:
            total.merge(part)
    return total


def _fold(
    log: Log,
    stretch: Stretch,
    progress: Progress,
    stopped: threading.Event,
    *,
    make: Callable[[], A],
    columns: Sequence[str],
    scope: Scope,
    whole_groups: bool,
) -> A:
    """The accumulator, after a stretch of a log."""
    part = make()
    piece = max(1, PIECE_LOGITS // log.n_experts)
    layers = log.check_layers(scope.layers)
    for name, groups in stretch:
        shard = log.open_shard("routing", name)
        for group in groups or log.groups_of(name, shard):
            if group.layer not in layers:
                continue
            most = group.rows if whole_groups else piece
            done = 0
            for batch in log.pieces(group, columns, scope.where, most_rows=most, shard=shard):
                if stopped.is_set():
                    return part
                if scope.sample < 1:
                    batch = batch.filter(arrow_of(sampled(batch, scope.sample)))
                if batch.num_rows:
                    part.update(batch)
                progress(min(most, group.rows - done))
                done += most
    return part


def side_by_side(
    work: Callable[..., R],
    logs: Sequence[Log],
    items: Iterable[T],
    scope: Scope,
    *,
    constant: Sequence[object] = (),
) -> Generator[R, None, None]:
    """What `work(*logs, item, progress, stopped)` gives for each item, in their order.

    Threads here do it, or the executor of the scope or of the first log, whose tasks open the logs
    where they run: `work`, the items and what it gives pickle.

    Args:
        work: leaves off when the event `stopped` is set; nobody wants its result then.
        constant: objects of `work` that results may hold, and that need not travel back with them.
    """
    progress = scope.progress or _no_matter
    executor = scope.executor or logs[0].executor
    if executor is None:
        stopped = threading.Event()
        here = partial(_work, work, logs, progress=progress, stopped=stopped)
        yield from in_order(here, items, scope.threads or os.cpu_count() or 1, stopped)
        return
    task = _Elsewhere(work, [log.source for log in logs], constant)
    for packed, size, rows in elsewhere(executor, task, items):
        progress(rows)
        data = pa.decompress(packed, size, codec=_CODEC, asbytes=True)
        done: R = _Unpickler(data, constant).load()
        yield done


def _work(
    work: Callable[..., R],
    logs: Sequence[Log],
    item: T,
    *,
    progress: Progress,
    stopped: threading.Event,
) -> R:
    return work(*logs, item, progress, stopped)


@dataclass
class _Elsewhere:
    """Work, and the logs that it opens where it runs."""

    work: Callable[..., Any]
    sources: Sequence[str]
    constant: Sequence[object]

    @cached_property
    def logs(self) -> list[Log]:
        return [*map(Log, self.sources)]

    def __call__(self, item: Any) -> tuple[bytes, int, int]:
        """What work gives, pickled and compressed, its size before, and how many rows it read."""
        rows: list[int] = []
        file = io.BytesIO()
        done = self.work(*self.logs, item, rows.append, threading.Event())
        _Pickler(file, self.constant).dump(done)
        packed = pa.compress(file.getbuffer(), codec=_CODEC, asbytes=True)
        return packed, file.tell(), sum(rows)


class _Pickler(pickle.Pickler):
    """Writes the number of a constant in place of it: a null model has megabytes."""

    def __init__(self, file: IO[bytes], constant: Sequence[object]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        # some are None elsewhere: what threads of one process share
        known = [(number, one) for number, one in enumerate(constant) if one is not None]
        self._numbers = {id(one): number for number, one in known}

    def persistent_id(self, one: object) -> int | None:
        return self._numbers.get(id(one))


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, constant: Sequence[object]) -> None:
        super().__init__(io.BytesIO(data))
        self._constant = constant

    def persistent_load(self, number: Any) -> object:
        return self._constant[number]


def _no_matter(rows: int) -> None:
    """Progress that nobody asked for."""


def stretches_of(log: Log, layers: Iterable[int] | None = None) -> list[Stretch]:
    """Contiguous stretches of about equal rows, at most MOST_STRETCHES of them.

    They depend on the log alone. Of many shards they hold whole ones, whose row groups are found
    where they are read: the footers of a large log are opened once, by all who fold it.
    """
    listed = {entry.name for entry in log.manifest.shards}
    if len(log.shards) > MOST_FOOTERS and listed >= set(log.shards):
        log.check_layers(layers)
        return [[(name, None) for name in part] for part in cut_shards(log, log.shards)]
    groups = _cut([*log.row_groups(layers)], lambda group: group.rows * log.n_experts)
    return [
        [(name, [*those]) for name, those in groupby(part, lambda group: group.shard)]
        for part in groups
    ]


def cut_shards(log: Log, names: Sequence[str]) -> list[list[str]]:
    """Names of shards in contiguous parts of about equal rows, as the manifest has them."""
    rows = {entry.name: entry.rows for entry in log.manifest.shards}
    return _cut(names, lambda name: rows.get(name, STRETCH_LOGITS) * log.n_experts)


def _cut(items: Sequence[T], logits: Callable[[T], int]) -> list[list[T]]:
    """Contiguous parts of about as many logits."""
    sizes = [max(1, logits(item)) for item in items]
    total, seen = sum(sizes), 0
    most = max(1, min(MOST_STRETCHES, total // STRETCH_LOGITS))
    parts: list[list[T]] = []
    for item, size in zip(items, sizes, strict=True):
        if not parts or seen * most >= len(parts) * total:
            parts.append([])
        parts[-1].append(item)
        seen += size
    return parts


def sampled(batch: pa.RecordBatch, share: float) -> NDArray[np.bool_]:
    """(T,) bool: rows of the tokens in a sample, decided by (rank, sequence, position) alone."""
    mixed = mix(*(values_of(batch.column(name)) for name in _OF_A_TOKEN))
    uniform = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    chosen: NDArray[np.bool_] = uniform < share
    return chosen


def mix(*columns: NDArray[Any]) -> NDArray[np.uint64]:
    """(T,) uint64, even over all values: the same for the same numbers in a row.

    Reference:
        Steele, Lea and Flood (2014), OOPSLA: the finalizer of SplitMix64.
    """
    mixed = np.zeros(len(columns[0]), dtype=np.uint64)
    for part in (column.astype(np.uint64) for column in columns):
        mixed = (mixed ^ part) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed
