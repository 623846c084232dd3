"""What SGLang's expert distribution recorder dumps in its mode per_token: a .pt file of a rank.

{"records": [...], "last_physical_to_logical_map": (L, P)}. A record is a forward, with its
`topk_ids_of_layer` (L, T, slots; -1 where a model has fewer experts, a layer no router, or a row no
token) of physical experts, of which several can be copies of one logical expert; with `input_ids`,
`positions`, `forward_mode`, and `extend_seq_lens`, the tokens of each text that a prompt's forward
has. Texts are not followed from one forward to the next.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bhlog.analysis.engines.trace import Block, Told, Trace, blocks_of, regular
from bhlog.capture.contract.errors import CorruptTrace, one_line
from bhlog.capture.contract.manifest import ModelInfo

_DECODE = 2  # of SGLang's ForwardMode
_STRANGE = (RuntimeError, UnpicklingError, EOFError, ValueError, KeyError, TypeError, IndexError,
            AttributeError, OverflowError)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Forward:
    """A record: (L, T, slots) logical experts, and what is known of its tokens."""

    experts: NDArray[np.int64]
    columns: dict[str, NDArray[Any]]


def read(path: Path, told: Told) -> Trace:
    """A dump, which is held in memory; nothing of it is run.

    Raises:
        CorruptTrace: it is none, or says what cannot be.
    """
    file = regular(path.parent, path.name)
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that are not its own
            dump = torch.load(file, map_location="cpu", weights_only=True)
        logical = np.asarray(dump["last_physical_to_logical_map"])
        forwards = [_forward(record, logical) for record in dump["records"]]
    except _STRANGE as error:
        words = f"{path}: is no dump of each token's experts"
        raise CorruptTrace(f"{words} ({one_line(repr(error))})") from None
    used = [(forward.experts >= 0).sum(axis=2) for forward in forwards]
    routed = np.any([n.any(axis=1) for n in used], axis=0) if used else np.zeros(1, np.bool_)
    model = told.info(
        path,
        layers=tuple(map(int, np.flatnonzero(routed))),
        n_experts=int(logical.max()) + 1,
        top_k=max((int(n.max(initial=0)) for n in used), default=0),
    )
    noted: dict[str, Any] = {}
    return Trace("sglang", model, _blocks(path, model, forwards, noted), noted=noted)


def _forward(record: dict[str, Any], logical: NDArray[Any]) -> Forward:
    """A record as arrays; ValueError and its like if it is none."""
    physical = np.asarray(record["topk_ids_of_layer"])
    L, T, _ = physical.shape
    if logical.dtype.kind + physical.dtype.kind != "ii" or logical.min() < 0 or len(logical) != L:
        raise ValueError(f"experts {physical.dtype} {physical.shape}, their map {logical.shape}")
    if physical.min(initial=0) < -1 or physical.max(initial=0) >= logical.shape[1]:
        raise ValueError(f"physical experts below {logical.shape[1]} are expected")
    decode = record["forward_mode"] == _DECODE
    lengths = [1] * T if decode or not record["extend_seq_lens"] else record["extend_seq_lens"]
    if sum(lengths) != T:
        raise ValueError(f"extend_seq_lens of {sum(lengths):,} tokens, there are {T:,}")
    columns = {
        "position": np.asarray(record["positions"]),
        "token_id": np.asarray(record["input_ids"]),
        "sequence": np.repeat(np.arange(len(lengths)), lengths),
        "decode": np.full(T, decode),
    }
    for name, values in columns.items():
        if values.shape != (T,):
            raise ValueError(f"{name} of shape {values.shape} for {T} tokens")
    experts = np.take_along_axis(logical, physical.reshape(L, -1).clip(0), axis=1)
    return Forward(np.where(physical < 0, -1, experts.reshape(physical.shape)), columns)


def _blocks(
    path: Path, model: ModelInfo, forwards: list[Forward], noted: dict[str, Any]
) -> Iterator[Block]:
    texts = 0
    for number, forward in enumerate(forwards):
        where, kept = f"{path}, record {number}", (forward.experts >= 0).any(axis=(0, 2))
        experts = forward.experts[list(model.layers)][:, kept, : model.top_k]
        if not (experts >= 0).all():
            raise CorruptTrace(f"{where}: some tokens lack some of their experts")
        if not kept.all():
            noted["rows_left_out"] = noted.get("rows_left_out", 0) + int((~kept).sum())
        columns = {name: values[kept] for name, values in forward.columns.items()}
        columns |= {
            "sequence": texts + columns["sequence"],
            "forward": np.full(int(kept.sum()), number),
        }
        texts += int(forward.columns["sequence"].max(initial=-1)) + 1
        yield from blocks_of(where, model, experts=[*experts], columns=columns)
