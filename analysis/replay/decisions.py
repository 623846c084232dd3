"""Replayed decisions as Parquet shards, row-aligned with the log they came from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from analysis.log import Log, Progress
from analysis.replay.replay import COLUMNS, Replay
from capture.contract.bh import BhOptions, Decisions, finite_keys, softmax_weights
from capture.contract.errors import RunExists
from capture.contract.kde import KdeModel
from capture.contract.manifest import ModelInfo
from capture.contract.schema import list_type
from capture.contract.shard import write_shard

_KEYS = ("layer", "sequence", "position", "rank")
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


def setting_name(options: BhOptions, n_experts: int) -> str:
    """Name of a replay's folder, told from its settings: alpha-0.3_k-1-16."""
    low, high = options.bounds(n_experts)
    name = f"alpha-{options.alpha:g}_k-{low}-{high}"
    return name if options.temperature == 1.0 else f"{name}_t-{options.temperature:g}"


def write_decisions(
    log: Log,
    settings: Sequence[BhOptions],
    out: str | Path,
    *,
    kde: KdeModel | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the decisions of a replay: OUT/NAME/rank00000-00000.parquet for each setting.

    A file has the rows of the routing shard of the same name, in the same order.

    Returns:
        The folder of each setting.

    Raises:
        RunExists: a folder is there already.
        InvalidOption, KdeMismatch: see Replay.
    """
    rule = Replay(log, settings, kde)
    folders = [Path(out) / setting_name(options, log.n_experts) for options in settings]
    for folder in folders:
        if folder.exists():
            raise RunExists(f"{folder}: this replay is there already; remove it or choose --out")
    for folder in folders:
        folder.mkdir(parents=True)
    model = log.manifest.model
    columns = [*dict.fromkeys([*_KEYS, *COLUMNS])]
    for name in log.shards:
        tables: list[list[pa.Table]] = [[] for _ in settings]
        for group in log.row_groups():
            if group.shard != name:
                continue
            batch = log.read(group, columns)
            replayed = rule.decide(batch)
            for i, options in enumerate(settings):
                decisions = Decisions(
                    replayed.order, replayed.n_selected[i], replayed.n_rejected[i]
                )
                tables[i].append(_table(batch, replayed.logits, decisions, options, model))
            if progress is not None:
                progress(group.rows)
        for folder, groups in zip(folders, tables, strict=True):
            write_shard(folder / name, groups)
    return folders


def _table(
    batch: pa.RecordBatch,
    logits: np.ndarray,
    decisions: Decisions,
    options: BhOptions,
    model: ModelInfo,
) -> pa.Table:
    chosen = np.arange(decisions.order.shape[1]) < decisions.n_selected[:, None]
    offsets = pa.array(np.concatenate([[0], np.cumsum(decisions.n_selected)]), pa.int32())
    weights = replayed_weights(logits, decisions, options, model)
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
