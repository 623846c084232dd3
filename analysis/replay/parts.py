"""Parts: the shards of a replay, each written by a thread here or by a task of an executor."""

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from bhlog.analysis.fold import Progress, Scope, cut_shards, side_by_side
from bhlog.analysis.log import Log, logits_of
from bhlog.analysis.replay.decide import COLUMNS, Decider
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.files import open_part, seal
from bhlog.capture.contract.manifest import ModelInfo, Seal
from bhlog.capture.contract.opening import seal_of
from bhlog.capture.contract.rule import (
    BhOptions,
    Decisions,
    finite_keys,
    no_finite_logit,
    softmax_weights,
)
from bhlog.capture.contract.schema import list_type
from bhlog.capture.contract.store import Store

_KEYS = ("layer", "sequence", "position", "rank")
_COLUMNS = (*dict.fromkeys([*_KEYS, *COLUMNS, "weights"]),)
_PIECE_LOGITS = 1 << 20  # of a row group, decided at a time
_MOST_FILES = 256  # open at a time
SCHEMA = pa.schema(
    [
        pa.field("layer", pa.uint16(), nullable=False),
        pa.field("sequence", pa.uint32(), nullable=False),
        pa.field("position", pa.uint32(), nullable=False),
        pa.field("rank", pa.uint16(), nullable=False),
        pa.field("experts", list_type(pa.uint16()), nullable=False),
        pa.field("weights", list_type(pa.float32()), nullable=False),
        pa.field("n_selected", pa.uint16(), nullable=False),
        pa.field("n_rejected", pa.uint16(), nullable=False),
    ]
)


Seals = dict[str, dict[str, Seal]]  # by setting and name of the shard


@dataclass(frozen=True)
class Parts:
    """The shards of several settings, and where they go; pickles.

    Attributes:
        names: of the folder of each setting.
        place: the folder that holds those, or its URI.
    """

    decider: Decider
    settings: Sequence[BhOptions]
    names: Sequence[str]
    place: str

    def write_all(self, log: Log, scope: Scope) -> Seals:
        """Write the shards of every setting, several at once; their seals by setting and name.

        This is no fold: rows go into their file in the order of the log, and a fold may cut a
        shard.

        Raises:
            InvalidOption: workers of an executor write to a folder that is not this machine's.
        """
        # each thread holds a file open for each setting
        most = max(1, _MOST_FILES // len(self.names))
        threads = min(scope.threads or os.cpu_count() or 1, most)
        items = cut_shards(log, log.shards)
        found: Seals = {name: {} for name in self.names}
        with closing(side_by_side(self.write, [log], items, scope.but(threads=threads))) as parts:
            for seals in parts:
                _add(found, seals)
        if (scope.executor or log.executor) is not None and not self.is_remote:
            for setting, sealed in found.items():
                self._require(setting, sealed)
        return found

    @property
    def is_remote(self) -> bool:
        """Whether they go to an object store."""
        return "://" in self.place

    def write(
        self, log: Log, names: Sequence[str], progress: Progress, stopped: threading.Event
    ) -> Seals:
        """Write some shards of every setting."""
        if not self.is_remote and not Path(self.place).is_dir():
            raise InvalidOption(
                f"{self.place}: no such folder there; decisions go to a folder that all machines "
                "share, or to a URI"
            )
        found: Seals = {name: {} for name in self.names}
        for name in names:
            if not self.is_remote:
                _add(found, self._write(log, name, Path(self.place), progress, stopped))
                continue
            store = Store(self.place)
            with TemporaryDirectory(prefix="bhlog-") as folder:
                for setting in self.names:
                    (Path(folder) / setting).mkdir()
                seals = self._write(log, name, Path(folder), progress, stopped)
                for setting in seals:
                    store.put(Path(folder) / setting / name, f"{setting}/{name}")
            _add(found, seals)
        return found

    def _write(
        self, log: Log, name: str, folder: Path, progress: Progress, stopped: threading.Event
    ) -> Seals:
        decider = self.decider
        shard = log.open_shard("routing", name)
        paths = [folder / setting / name for setting in self.names]
        with ExitStack() as stack:
            files = [stack.enter_context(open_part(path, SCHEMA)) for path in paths]
            for group in log.groups_of(name, shard):
                most = (
                    group.rows if decider.whole_groups else max(1, _PIECE_LOGITS // log.n_experts)
                )
                for batch in log.pieces(group, _COLUMNS, most_rows=most, shard=shard):
                    if stopped.is_set():
                        return {}
                    for file, options, decisions in zip(
                        files, self.settings, decider.decide(batch), strict=True
                    ):
                        file.write(_table(batch, decisions, options, log))
                    progress(batch.num_rows)
        sealed = [seal_of(seal(file.path)) for file in files]
        return {setting: {name: one} for setting, one in zip(self.names, sealed, strict=True)}

    def _require(self, setting: str, sealed: dict[str, Seal]) -> None:
        """Workers wrote these where this machine sees them, and nothing else is there."""
        folder = Path(self.place) / setting
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        for name, one in sealed.items():
            if sizes.pop(name, None) != one.bytes:
                raise InvalidOption(
                    f"{folder / name}: a worker wrote it, and it is not here; give a folder that "
                    "all machines share, or a URI"
                )
        for left in sizes:  # of a worker that died
            (folder / left).unlink(missing_ok=True)


def _add(found: Seals, seals: Seals) -> None:
    for setting, sealed in seals.items():
        found[setting] |= sealed


def _table(batch: pa.RecordBatch, decisions: Decisions, options: BhOptions, log: Log) -> pa.Table:
    logits = logits_of(batch)
    chosen = np.arange(decisions.order.shape[1]) < decisions.n_selected[:, None]
    offsets = pa.array(np.concatenate([[0], np.cumsum(decisions.n_selected)]), pa.int32())
    weights = replayed_weights(logits, decisions, options, log.manifest.model)
    for row in np.flatnonzero(no_finite_logit(logits)):
        weights[row, : decisions.n_selected[row]] = batch.column("weights")[row].as_py()
    columns = {
        **{name: batch.column(name) for name in _KEYS},
        "experts": pa.ListArray.from_arrays(
            offsets, pa.array(decisions.order[chosen]), type=SCHEMA.field("experts").type
        ),
        "weights": pa.ListArray.from_arrays(
            offsets, pa.array(weights[chosen]), type=SCHEMA.field("weights").type
        ),
        "n_selected": decisions.n_selected,
        "n_rejected": decisions.n_rejected,
    }
    return pa.table(columns, schema=SCHEMA)


def replayed_weights(
    logits: np.ndarray, decisions: Decisions, options: BhOptions, model: ModelInfo
) -> np.ndarray:
    """(T, E) float32 weights in the order of the decisions, by the model's scoring and scale."""
    renormalize = options.renormalizes(model.norm_topk_prob)
    if model.scoring != "sigmoid":
        weights = softmax_weights(
            logits, decisions, temperature=options.temperature, renormalize=renormalize
        )
        return weights * np.float32(model.scale)
    scaled = finite_keys(logits) / np.float32(options.temperature)
    with np.errstate(over="ignore"):
        scores = 1 / (1 + np.exp(-scaled))
    weights = np.take_along_axis(scores, decisions.order.astype(np.int64), axis=1)
    weights[np.arange(weights.shape[1]) >= decisions.n_selected[:, None]] = 0
    if renormalize:
        total = weights.sum(axis=1, keepdims=True)
        weights /= np.where(total > 0, total, np.float32(1))
    return np.asarray(weights * np.float32(model.scale), dtype=np.float32)
