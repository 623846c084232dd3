"""Gathers what the routers of one forward returned and hands it to the writer."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from capture.errors import UnknownIdentity
from capture.identity import Forward, Stream
from capture.routing import finite_keys
from capture.stage import Stage
from capture.writer import Block, RunWriter

_BULK_ROWS = 2048  # small forwards (decoding) leave the device together, this many rows at once
_LOSS_ROWS = 1024  # rows whose loss is computed at once, to bound the float32 copy of the logits


@dataclass(eq=False)
class _Record:
    """A forward and what its routers returned, on the device.

    layers maps a decoder layer to its tensors by name: logits (T, E), experts (T, K),
    weights (T, K) and under BH n_selected, n_rejected (T,).
    """

    forward: Forward
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    nll: Tensor | None = None


class Recorder:
    """Collects router outputs per forward; everything stays on the device until it is staged.

    Args:
        writer: where rows go.
        layers: decoder layers that every complete forward has.
    """

    def __init__(self, writer: RunWriter, layers: Sequence[int]) -> None:
        self.writer = writer
        self._layers = tuple(layers)
        self._stage = Stage()
        self._open = threading.local()  # a forward per thread: DataParallel runs several
        self._last: _Record | None = None  # its drafts may still be rejected
        self._bulk: list[_Record] = []
        self._lock = threading.Lock()

    def begin(self, forward: Forward) -> None:
        """A forward starts; the one before can no longer change.

        Raises:
            WriterFailed: the writer stopped on an error.
        """
        self.writer.check()
        with self._lock:
            self._release()
        self._open.record = _Record(forward)

    def record(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """Take a router's output, (T, ...) tensors by name; outside a forward it is ignored.

        Raises:
            UnknownIdentity: the router saw other rows than the model was given.
        """
        record: _Record | None = getattr(self._open, "record", None)
        if record is None:  # activation checkpointing runs routers again in the backward pass
            return
        rows = tensors["logits"].shape[0]
        if rows != record.forward.rows:
            raise UnknownIdentity(
                f"the router of layer {layer} saw {rows} rows, but the model was given "
                f"{record.forward.rows} tokens; which row is which token is not known"
            )
        record.layers[layer] = tensors

    @property
    def current(self) -> Forward | None:
        """The forward this thread is in."""
        record: _Record | None = getattr(self._open, "record", None)
        return None if record is None else record.forward

    def loss(self, head: Tensor) -> None:
        """Take the head's logits, (B, S or 1, V), for the loss of this forward's tokens."""
        record: _Record | None = getattr(self._open, "record", None)
        if record is not None:
            record.nll = _loss(record.forward, head)

    def end(self, complete: bool) -> None:
        """The forward is over; an incomplete one (an exception) is forgotten."""
        record: _Record | None = getattr(self._open, "record", None)
        self._open.record = None
        if record is None or not complete or not record.layers:
            return
        missing = set(self._layers) - set(record.layers)
        if missing:
            raise UnknownIdentity(
                f"the routers of layers {sorted(missing)} did not run in forward "
                f"{record.forward.number}; a token must be logged at every layer"
            )
        with self._lock:
            self._last = record
            self.writer.count(forwards=1)

    def cut(self, stream: Stream, length: int) -> None:
        """A cache dropped its columns from `length` on: rejected drafts of the last forward."""
        with self._lock:
            record = self._last
            if record is not None and record.forward.stream is stream:
                kept = max(0, length - record.forward.start)
                keep = record.forward.keep.clone()
                keep[:, kept:] = False
                record.forward.keep = keep

    def flush(self) -> None:
        """Hand everything to the writer, the last forward too."""
        with self._lock:
            self._release()
            self._send_bulk()

    def _release(self) -> None:
        record, self._last = self._last, None
        if record is None:
            return
        if self._bulk and not _alike(self._bulk[0], record):
            self._send_bulk()
        self._bulk.append(record)
        if sum(r.forward.rows for r in self._bulk) >= _BULK_ROWS:
            self._send_bulk()

    def _send_bulk(self) -> None:
        records, self._bulk = self._bulk, []
        if not records:
            return
        stacked = [_stack(record, self._layers) for record in records]
        tensors = {
            name: torch.cat([s[name] for s in stacked], dim=int(name in _BY_LAYER))
            if len(stacked) > 1
            else stacked[0][name]
            for name in stacked[0]
        }
        forwards = [record.forward for record in records]
        rows = [f.rows for f in forwards]
        sequences = np.concatenate([f.sequences for f in forwards])
        columns = np.repeat(
            [f.keep.shape[1] for f in forwards], [len(f.sequences) for f in forwards]
        )
        named = [source for forward in forwards for source in forward.sources]
        names = sorted(set(named) - {""})
        codes = [names.index(name) if name else -1 for name in named]
        self.writer.submit(
            Block(
                staged=self._stage.copy(tensors),
                layers=self._layers,
                sequence=np.repeat(sequences, columns),
                forward=np.repeat(np.array([f.number for f in forwards], dtype=np.uint32), rows),
                phase=np.repeat(np.array([f.phase for f in forwards], dtype=np.int8), rows),
                source=np.repeat(np.array(codes, dtype=np.int32), columns),
                sources=tuple(names),
            )
        )


_BY_LAYER = ("logits", "experts", "weights", "n_selected", "n_rejected")


def _stack(record: _Record, layers: tuple[int, ...]) -> dict[str, Tensor]:
    """The forward's tensors, one per column: by layer (L, T, ...), others (T,)."""
    forward = record.forward
    home = record.layers[layers[-1]]["logits"].device
    result = {}
    for name in record.layers[layers[0]]:
        parts = [record.layers[layer][name].detach().to(home) for layer in layers]
        result[name] = torch.stack(parts)
    if "n_selected" not in result:
        _sort_by_logit(result)
    for name in result:
        if name in ("experts", "n_selected", "n_rejected"):
            result[name] = result[name].to(torch.int16)  # a quarter of the bytes to move
    for name, tensor in (
        ("position", forward.positions),
        ("keep", forward.keep),
        ("token_id", forward.token_ids),
        ("nll", record.nll),
    ):
        if tensor is not None:
            result[name] = tensor.detach().reshape(-1).to(home)
    return result


def _sort_by_logit(tensors: dict[str, Tensor]) -> None:
    """Order the model's own choice by falling logit, ties by the lower expert."""
    experts, by_index = tensors["experts"].sort(dim=-1)
    keys = finite_keys(tensors["logits"].gather(-1, experts))
    by_logit = keys.sort(dim=-1, descending=True, stable=True).indices
    tensors["experts"] = experts.gather(-1, by_logit)
    tensors["weights"] = tensors["weights"].gather(-1, by_index).gather(-1, by_logit)


def _alike(a: _Record, b: _Record) -> bool:
    """Whether two forwards have the same columns, shaped to be sent together."""

    def shape(record: _Record) -> list[tuple[str, int]]:
        first = next(iter(record.layers.values()))
        widths = [(name, t.shape[1] if t.dim() > 1 else 0) for name, t in first.items()]
        return [*widths, ("nll", int(record.nll is not None)),
                ("token_id", int(record.forward.token_ids is not None))]  # fmt: skip

    return shape(a) == shape(b)


@torch.no_grad()
def _loss(forward: Forward, head: Tensor) -> Tensor | None:
    """(B * S,) float32 loss of each token in nats, NaN where unknown; remembers the last logits.

    The loss of the token in column s comes from the head's logits in column s - 1.
    """
    ids = forward.token_ids
    if ids is None:
        return None
    B, S = ids.shape
    nll = torch.full((B, S), torch.nan, device=head.device)
    if forward.head_start is not None and forward.start > 0:
        nll[:, 0] = _cross_entropy(forward.head_start.to(head.device), ids[:, 0])
    if head.shape[1] == S and S > 1:
        flat = head[:, :-1].reshape(-1, head.shape[-1])
        nll[:, 1:] = _cross_entropy(flat, ids[:, 1:].reshape(-1)).view(B, S - 1)
        # the token after padding has no token before it
        nll[:, 1:].masked_fill_(~forward.keep[:, :-1].to(head.device), torch.nan)
    forward.stream.last_logits = head[:, -1].clone()
    return nll.masked_fill(forward.positions.to(head.device) == 0, torch.nan).view(-1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """(T,) float32, -log softmax(logits)[target], a few rows at a time."""
    targets = targets.to(logits.device)
    loss = torch.nn.functional.cross_entropy
    parts = [
        loss(logits[i : i + _LOSS_ROWS].float(), targets[i : i + _LOSS_ROWS], reduction="none")
        for i in range(0, len(targets), _LOSS_ROWS)
    ]
    return torch.cat(parts)
