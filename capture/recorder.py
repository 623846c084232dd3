"""Gathers what the routers of one forward returned and hands it to the writer."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from bhlog.capture.contract.errors import UnknownIdentity
from bhlog.capture.routers.routing import finite_keys
from bhlog.capture.tokens.loss import token_loss
from bhlog.capture.tokens.stream import Forward, Stream
from bhlog.capture.writing.buffer import BY_LAYER, TEXT_COLUMNS, Block, Texts
from bhlog.capture.writing.stage import Stage
from bhlog.capture.writing.writer import RunWriter

_BULK_ROWS = 2048  # small forwards (decoding) leave the device together, this many rows at once


@dataclass(eq=False)
class Record:
    """A forward and what its routers returned, on the device.

    Attributes:
        layers: by decoder layer, its tensors by name: logits (T, E), experts (T, K), weights (T, K)
            and under BH n_selected, n_rejected (T,); until the forward ends.
        columns: the same once stacked by layer, (L, T, ...).
        nll: (T,) float32, the loss of each token; None if unknown.
        rejected: tokens of rejected drafts, which the routers saw but no row is logged of.
    """

    forward: Forward
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    nll: Tensor | None = None
    rejected: int = 0

    def take(self, layers: Sequence[int], tensors: dict[str, Tensor]) -> None:
        """Take a router's output.

        Args:
            layers: the layer it is; several where it runs once for each in a forward.
            tensors: (T, ...) by name.

        Raises:
            UnknownIdentity: the router saw other rows than the model was given, or ran too often,
                or its tensors stand for others.
        """
        if is_functorch_wrapped_tensor(tensors["logits"]):
            raise UnknownIdentity(
                "the model runs inside a transform of torch.func (vmap, grad, jvp), where tensors "
                "stand for others: run it outside of that, or inside `with patcher.paused():`"
            )
        rows = tensors["logits"].shape[0]
        if rows != self.forward.rows:
            raise UnknownIdentity(
                f"the router of layer {layers[0]} saw {rows} rows, but the model was given "
                f"{self.forward.rows} tokens; which row is which token is not known"
            )
        for layer in layers:
            if layer not in self.layers:
                self.layers[layer] = tensors
                return
        raise UnknownIdentity(
            f"the router of layer {layers[0]} ran {len(layers) + 1} times in forward "
            f"{self.forward.number}; a row is one token at one layer"
        )

    def see(self, head: Tensor) -> None:
        """Take the head's logits of the last H columns, (B, H, V), for the tokens' loss."""
        self.nll = token_loss(self.forward, head)


class Recorder:
    """Keeps what the routers of whole forwards returned on the device, until it is staged.

    Args:
        writer: where rows go.
        layers: decoder layers that every complete forward has.
    """

    def __init__(self, writer: RunWriter, layers: Sequence[int]) -> None:
        self.writer = writer
        self._layers = tuple(layers)
        self._stage = Stage()
        self._last: dict[int, Record] = {}  # by thread: its drafts may still be rejected
        self._bulk: list[Record] = []
        self._bulk_rows = 0
        self._lock = threading.Lock()

    def begin(self, forward: Forward) -> Record:
        """A forward starts; the thread's forward before can no longer change.

        Raises:
            WriterFailed: the writer stopped on an error.
        """
        self.writer.check()
        with self._lock:
            self._release(threading.get_ident())
        return Record(forward)

    def end(self, record: Record) -> None:
        """The forward is over, and complete.

        Raises:
            UnknownIdentity: a router did not run.
        """
        missing = set(self._layers) - set(record.layers)
        if missing:
            raise UnknownIdentity(
                f"the routers of layers {sorted(missing)} did not run in forward "
                f"{record.forward.number}; a token must be logged at every layer"
            )
        # copies: what the routers returned may be overwritten by the next forward
        record.columns, record.layers = _stack(record.layers, self._layers), {}
        with self._lock:
            self._last[threading.get_ident()] = record

    def cut(self, stream: Stream, length: int) -> None:
        """A cache dropped its columns from `length` on: rejected drafts of the last forward."""
        with self._lock:
            for record in self._last.values():
                if record.forward.stream is stream:
                    keep = record.forward.keep.clone()
                    keep[:, max(0, length - record.forward.start) :] = False
                    record.rejected += int((record.forward.keep & ~keep).sum())
                    record.forward.keep = keep

    def flush(self) -> None:
        """Hand everything to the writer, the last forward too."""
        with self._lock:
            for thread in list(self._last):
                self._release(thread)
            self._send_bulk()

    def _release(self, thread: int) -> None:
        record = self._last.pop(thread, None)
        if record is None:
            return
        if self._bulk and not _alike(self._bulk[0], record):
            self._send_bulk()
        self._bulk.append(record)
        self._bulk_rows += record.forward.rows
        if self._bulk_rows >= _BULK_ROWS:
            self._send_bulk()

    def _send_bulk(self) -> None:
        records, self._bulk, self._bulk_rows = self._bulk, [], 0
        if not records:
            return
        columns = [{**record.columns, **_identity(record)} for record in records]
        tensors = {
            name: torch.cat([c[name] for c in columns], dim=int(name in BY_LAYER))
            if len(columns) > 1
            else columns[0][name]
            for name in columns[0]
        }
        if "n_selected" not in tensors:
            _sort_by_logit(tensors)
        for name in ("experts", "n_selected", "n_rejected"):
            if name in tensors:
                tensors[name] = tensors[name].to(torch.int16)  # a quarter of the bytes to move
        if not self.writer.admit(sum(t.numel() * t.element_size() for t in tensors.values())):
            self.writer.drop(
                self._stage.copy({name: tensors[name] for name in ("position", "keep")})
            )
            return
        forwards = [record.forward for record in records]
        rows = [f.rows for f in forwards]
        sequences = np.concatenate([f.sequences for f in forwards])
        parents = np.concatenate([f.parents for f in forwards])
        widths = np.repeat(
            [f.keep.shape[1] for f in forwards], [len(f.sequences) for f in forwards]
        )
        self.writer.submit(
            Block(
                staged=self._stage.copy(tensors),
                layers=self._layers,
                sequence=np.repeat(sequences, widths),
                forward=np.repeat(np.array([f.number for f in forwards], dtype=np.uint32), rows),
                phase=np.repeat(np.array([f.phase for f in forwards], dtype=np.int8), rows),
                parent=np.repeat(parents, widths),
                texts={
                    **{column: _texts(column, forwards, widths) for column in TEXT_COLUMNS},
                    "role": _roles(forwards),
                },
                rejected=sum(record.rejected for record in records),
            )
        )


def _texts(column: str, forwards: list[Forward], widths: NDArray[np.int64]) -> Texts:
    """What the rows of these forwards have in a text column.

    Args:
        widths: columns of each sequence, forward after forward.
    """
    named = [
        name
        for forward in forwards
        for name in forward.texts.get(column, ("",) * len(forward.sequences))
    ]
    code = {name: i for i, name in enumerate(sorted(set(named) - {""}))}
    codes = np.array([code.get(name, -1) for name in named], dtype=np.int32)
    return Texts(np.repeat(codes, widths), tuple(code))


def _roles(forwards: list[Forward]) -> Texts:
    """Who says each row of these forwards."""
    if not any(forward.roles for forward in forwards):
        return Texts(np.full(sum(f.rows for f in forwards), -1, dtype=np.int32), ())
    named: list[str] = []
    for forward in forwards:
        named += chain(*forward.roles) if forward.roles else ("",) * forward.rows
    code = {name: i for i, name in enumerate(sorted(set(named) - {""}))}
    return Texts(np.array([code.get(name, -1) for name in named], dtype=np.int32), tuple(code))


def _stack(by_layer: dict[int, dict[str, Tensor]], layers: tuple[int, ...]) -> dict[str, Tensor]:
    """A forward's router outputs by layer, (L, T, ...), on one device."""
    outputs = [by_layer[layer] for layer in layers]
    home = outputs[-1]["logits"].device
    if any(tensors["logits"].device != home for tensors in outputs):
        outputs = [{name: t.to(home) for name, t in tensors.items()} for tensors in outputs]
    with torch.no_grad():
        return {name: torch.stack([tensors[name] for tensors in outputs]) for name in outputs[0]}


def _identity(record: Record) -> dict[str, Tensor]:
    """The forward's columns that are the same at every layer, (T,)."""
    forward, home = record.forward, record.columns["logits"].device
    columns = {
        "position": forward.positions,
        "keep": forward.keep,
        "token_id": forward.token_ids,
        "nll": record.nll,
    }
    return {
        name: tensor.detach().reshape(-1).to(home)
        for name, tensor in columns.items()
        if tensor is not None
    }


def _sort_by_logit(tensors: dict[str, Tensor]) -> None:
    """Order the model's own choice by falling logit, ties by the lower expert."""
    experts, by_index = tensors["experts"].sort(dim=-1)
    keys = finite_keys(tensors["logits"].gather(-1, experts))
    by_logit = keys.sort(dim=-1, descending=True, stable=True).indices
    tensors["experts"] = experts.gather(-1, by_logit)
    tensors["weights"] = tensors["weights"].gather(-1, by_index).gather(-1, by_logit)


def _alike(a: Record, b: Record) -> bool:
    """Whether two forwards have the same columns, shaped to be sent together."""

    def shape(record: Record) -> list[Any]:
        widths = [(name, t.shape[2:], t.dtype, t.device) for name, t in record.columns.items()]
        return [*widths, record.nll is not None, record.forward.token_ids is not None]

    return shape(a) == shape(b)
