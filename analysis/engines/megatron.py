"""megatron: Megatron-core's router_trace, a JSON line for each step and layer of a rank.

A line of router_trace_rank{N}.jsonl has step, block, layer, rank, num_tokens, topk and top_indices
(tokens, topk), and, where logits were asked for, logit_offset, logit_bytes and logit_shape: where
they are in logits_rank{N}.bin beside it, little-endian bfloat16 (tokens, experts). Which text a
token is of is not told: each forward is taken for a text of its own, given as a prompt.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from bhlog.analysis.engines.npy_files import mapped
from bhlog.analysis.engines.trace import Block, Told, Trace, blocks_of, lines_of, regular
from bhlog.capture.contract.errors import CorruptTrace, one_line
from bhlog.capture.contract.manifest import Count, Layer, ModelInfo

MOST_LINE = 1 << 26
_NAME = re.compile(r"router_trace(_rank\d+)\.jsonl")


@dataclass(frozen=True)
class Record:
    """A line of a trace."""

    step: Count
    layer: Layer
    num_tokens: Count
    topk: Count
    top_indices: list[list[Annotated[int, Meta(ge=0, lt=1 << 16)]]]
    block: str
    logit_offset: Count | None = None
    logit_bytes: Count | None = None
    logit_shape: tuple[Count, Count] | None = None


@dataclass(frozen=True, eq=False)
class Routed:
    """A record with its place, and its experts as an array."""

    where: str
    record: Record
    experts: NDArray[np.uint16]


def read(path: Path, told: Told) -> Trace:
    """A folder with files of all ranks, which follow one another; or the file of one rank.

    Raises:
        CorruptTrace: a line is none of such a file, or a step lacks a layer; on the way, too.
    """
    files = [path]
    if path.is_dir():
        found = [entry for entry in path.iterdir() if _NAME.fullmatch(entry.name)]
        files = sorted(found, key=lambda file: (len(file.name), file.name))
    noted: dict[str, Any] = {}
    steps = ((file, step) for file in files for step in _steps(file, noted))
    first = next(steps, None)
    if first is None:
        raise CorruptTrace(f"{path}: no router_trace_rank0.jsonl with decoder layers is in it")
    record = first[1][min(first[1])].record
    model = told.info(
        path,
        layers=tuple(sorted(first[1])),
        n_experts=None if record.logit_shape is None else record.logit_shape[1],
        top_k=record.topk,
    )
    logits = record.logit_shape is not None
    return Trace("megatron", model, _blocks(chain([first], steps), model, logits), logits, noted)


def _steps(path: Path, noted: dict[str, Any]) -> Iterator[dict[int, Routed]]:
    """The records of each forward by layer: until the step is another, or a layer comes again."""
    held: dict[int, Routed] = {}
    step = 0
    for where, line in lines_of(regular(path.parent, path.name), MOST_LINE):
        try:
            record = msgspec.json.decode(line, type=Record)
            experts = np.array(record.top_indices, dtype=np.uint16)
            if experts.shape != (record.num_tokens, record.topk):
                raise ValueError(f"top_indices of shape {experts.shape}")
        except (ValueError, RecursionError) as error:
            raise CorruptTrace(f"{where}: no record ({one_line(str(error))})") from None
        if record.block != "decoder":  # multi-token prediction, whose layers count from 0 too
            noted["records_left_out"] = noted.get("records_left_out", 0) + 1
            continue
        if held and (record.layer in held or record.step != step):
            yield held
            held = {}
        step = record.step
        held[record.layer] = Routed(where, record, experts)
    if held:
        yield held


def _blocks(
    steps: Iterator[tuple[Path, dict[int, Routed]]], model: ModelInfo, logits: bool
) -> Iterator[Block]:
    files: dict[Path, Any] = {}
    for number, (path, step) in enumerate(steps):
        routed = [step[layer] for layer in sorted(step)]
        where, shapes = routed[0].where, {one.experts.shape for one in routed}
        alike = {one.record.logit_shape is not None for one in routed} == {logits}
        if tuple(sorted(step)) != model.layers or len(shapes) > 1 or not alike:
            raise CorruptTrace(
                f"{where}: the step that begins here has layers {sorted(step)}, and experts of "
                f"{sorted(shapes)}; expected layers {[*model.layers]} of as many tokens, "
                f"{'with' if logits else 'without'} logits as the first"
            )
        if path not in files and logits:
            name = _NAME.sub(r"logits\1.bin", path.name)
            files = {path: mapped(regular(path.parent, name))}
        wide = [_logits(one, model, files[path]) for one in routed] if logits else None
        yield from blocks_of(
            where,
            model,
            wide,
            [one.experts for one in routed],
            columns={"sequence": np.full(routed[0].record.num_tokens, number)},
        )


def _logits(routed: Routed, model: ModelInfo, data: Any) -> NDArray[np.uint16]:
    """(T, E) logits of a record, as bits of bfloat16."""
    record, shape = routed.record, (routed.record.num_tokens, model.n_experts)
    start, size = record.logit_offset, 2 * shape[0] * shape[1]
    if (record.logit_shape, record.logit_bytes) != (shape, size) or start is None:
        raise CorruptTrace(
            f"{routed.where}: logits of {record.logit_shape} from {start} in {record.logit_bytes} "
            f"bytes; expected bfloat16 of {shape}"
        )
    if start + size > len(data):
        raise CorruptTrace(
            f"{routed.where}: logits in bytes {start:,} to {start + size:,}, of {len(data):,} "
            "bytes that there are"
        )
    return np.frombuffer(data, "<u2", size // 2, start).reshape(shape)
