"""Which token each router row belongs to: sequence, position, token id and phase.

Inside a router everything is flattened to batch * seq rows. Hooks on the routers' nearest
PreTrainedModel see input_ids, attention_mask and past_key_values, and follow each generation by its
cache object.
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.errors import UnknownIdentity


@dataclass(eq=False)
class Stream:
    """Sequences that grow together in one cache: the rows of a batch.

    Attributes:
        sequences: (B,) uint32, the sequence number of each row.
        sources: (B,) where the text of each row came from, "" for unknown.
        length: columns in the cache, padding and rejected drafts counted.
        real: (B, length) bool on the model's device, columns that are not padding.
        finished: (B,) bool on the device, rows whose end-of-sequence token was fed.
        drafts: whether columns were cut from the cache (assisted decoding).
        last_logits: (B, V), the head's output at the last column, for the next token's loss.
    """

    sequences: NDArray[np.uint32]
    sources: tuple[str, ...]
    length: int
    real: Tensor
    finished: Tensor
    drafts: bool = False
    last_logits: Tensor | None = None

    def cut(self, length: int) -> None:
        """Forget the columns from `length` on."""
        if length < self.length:
            self.length = length
            self.real = self.real[:, :length]
            self.drafts = True
            self.last_logits = None


@dataclass(eq=False)
class Forward:
    """One forward pass: who its rows are, on the model's device.

    Attributes:
        number: forwards are numbered from 0.
        sequences, sources: (B,), see Stream.
        token_ids: (B, S) int64; None when the model was given embeddings.
        positions: (B, S) int64, in the sequence, padding not counted.
        keep: (B, S) bool; False for padding and for what follows a row's end of sequence.
        phase: 0 prefill, 1 decode.
        start: column of the cache at which the forward's tokens go.
        stream: the stream it belongs to.
        head_start: logits that predict the first column, from the stream's forward before.
    """

    number: int
    sequences: NDArray[np.uint32]
    sources: tuple[str, ...]
    token_ids: Tensor | None
    positions: Tensor
    keep: Tensor
    phase: int
    start: int
    stream: Stream
    head_start: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows that each router sees: batch * seq."""
        return self.keep.numel()


@dataclass(eq=False)
class Tracker:
    """Numbers sequences and forwards, and follows generations through their caches.

    Attributes:
        eos: ids that end a sequence in decoding.
        next_sequence, next_forward: the numbers given next.
        next_sources: where the next new sequences come from; used up by the forward that starts
            them.
        on_cut: called with a stream and its new length when a cache drops columns.
    """

    eos: frozenset[int]
    next_sequence: int = 0
    next_forward: int = 0
    next_sources: tuple[str, ...] = ()
    on_cut: Any = None
    _streams: "weakref.WeakKeyDictionary[Any, Stream]" = field(
        default_factory=weakref.WeakKeyDictionary
    )

    def begin(self, inputs: dict[str, Any]) -> Forward:
        """Identify the rows of a forward from the base model's inputs.

        Args:
            inputs: its arguments by name.

        Raises:
            UnknownIdentity: several sequences are packed in a row.
        """
        token_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        given = token_ids if token_ids is not None else embeds
        if given is None:
            raise UnknownIdentity("the forward has neither input_ids nor inputs_embeds")
        B, S = given.shape[:2]
        _refuse_packing(inputs, B)
        cache = inputs.get("past_key_values")
        start = _cache_length(cache)
        stream = self._streams.get(cache) if cache is not None else None
        if stream is not None and start < stream.length:
            self._cut(stream, start)
        if stream is None or start == 0 or len(stream.sequences) != B:
            stream = self._new_stream(B, start, given.device)
            self._follow(cache, stream)
        real = _real_columns(inputs.get("attention_mask"), B, start, S, stream)
        phase = int(start > 0 and (S == 1 or stream.drafts))
        keep = real[:, start:]
        if phase:
            keep = keep & ~stream.finished[:, None]
            if token_ids is not None and self.eos:
                ends = _is_any(token_ids, self.eos) & keep
                # keep the end of a sequence itself, drop what follows it
                keep = keep & (ends.long().cumsum(dim=1) - ends.long() == 0)
                stream.finished = stream.finished | ends.any(dim=1)
        positions = real.long().cumsum(dim=1)[:, start:] - 1
        stream.real, stream.length = real, start + S
        forward = Forward(
            number=self.next_forward,
            sequences=stream.sequences,
            sources=stream.sources,
            token_ids=token_ids,
            positions=positions,
            keep=keep,
            phase=phase,
            start=start,
            stream=stream,
            head_start=stream.last_logits,
        )
        self.next_forward += 1
        return forward

    def end(self, forward: Forward, output: Any) -> None:
        """Follow the cache that the forward made, if it was given none."""
        cache = getattr(output, "past_key_values", None)
        if cache is not None and self._streams.get(cache) is not forward.stream:
            self._follow(cache, forward.stream)

    def _new_stream(self, batch: int, start: int, device: torch.device) -> Stream:
        first = self.next_sequence
        self.next_sequence += batch
        sources, self.next_sources = self.next_sources, ()
        return Stream(
            sequences=np.arange(first, first + batch, dtype=np.uint32),
            sources=sources if len(sources) == batch else ("",) * batch,
            length=start,
            # columns that went in before the tracker looked count as tokens
            real=torch.ones(batch, start, dtype=torch.bool, device=device),
            finished=torch.zeros(batch, dtype=torch.bool, device=device),
        )

    def _follow(self, cache: Any, stream: Stream) -> None:
        if cache is None or isinstance(cache, tuple | list):
            return
        self._streams[cache] = stream
        if "reorder_cache" in vars(cache):  # already followed: the stream changed, not the cache
            return
        reorder, crop, me = cache.reorder_cache, getattr(cache, "crop", None), weakref.ref(cache)

        def reorder_cache(beam_idx: Tensor) -> Any:
            result = reorder(beam_idx)
            if (followed := self._streams.get(me())) is not None:
                self._reorder(followed, beam_idx)
            return result

        cache.reorder_cache = reorder_cache
        if crop is None:
            return

        def crop_cache(max_length: int) -> Any:
            result = crop(max_length)
            if (followed := self._streams.get(me())) is not None:
                length = max_length if max_length >= 0 else followed.length + max_length
                self._cut(followed, length)
            return result

        cache.crop = crop_cache

    def release(self) -> None:
        """Give the caches that are still alive their own methods back."""
        for cache in list(self._streams):
            for name in ("reorder_cache", "crop"):
                vars(cache).pop(name, None)
        self._streams.clear()

    def _cut(self, stream: Stream, length: int) -> None:
        if length < stream.length:
            stream.cut(length)
            if self.on_cut is not None:
                self.on_cut(stream, length)

    def _reorder(self, stream: Stream, beam_idx: Tensor) -> None:
        """Rows continue the sequences of beam_idx; a second heir gets a number of its own."""
        heirs = beam_idx.tolist()
        taken: set[int] = set()
        sequences = stream.sequences[heirs].copy()
        for row, parent in enumerate(heirs):
            if parent in taken:
                sequences[row] = self.next_sequence
                self.next_sequence += 1
            taken.add(parent)
        index = beam_idx.to(stream.real.device)
        stream.sequences = sequences
        stream.sources = tuple(stream.sources[parent] for parent in heirs)
        stream.real, stream.finished = stream.real[index], stream.finished[index]
        if stream.last_logits is not None:
            stream.last_logits = stream.last_logits[index]


def _cache_length(cache: Any) -> int:
    if cache is None:
        return 0
    if isinstance(cache, tuple | list):
        raise UnknownIdentity(
            "past_key_values is a tuple, whose sequences cannot be followed; pass a Cache object"
        )
    return int(cache.get_seq_length())


def _real_columns(mask: Any, B: int, start: int, S: int, stream: Stream) -> Tensor:
    """(B, start + S) bool: which columns are tokens and not padding."""
    device = stream.real.device
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= start + S:
        return mask[:, : start + S].to(device=device, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == S:
        return torch.cat([stream.real, mask.to(device=device, dtype=torch.bool)], dim=1)
    # no mask, or one already expanded for attention: every new column is a token
    new = torch.ones(B, S, dtype=torch.bool, device=device)
    return torch.cat([stream.real, new], dim=1)


def _refuse_packing(inputs: dict[str, Any], batch: int) -> None:
    positions = inputs.get("position_ids")
    packed = inputs.get("cu_seq_lens_q") is not None or (
        inputs.get("attention_mask") is None
        and isinstance(positions, Tensor)
        and positions.dim() == 2
        and positions.shape[1] > 1
        and bool((positions.diff(dim=1) <= 0).any())
    )
    if packed:
        raise UnknownIdentity(
            "position_ids start again inside a row: several sequences are packed together, and "
            "bhlog cannot tell them apart; run one sequence per row, padded, with attention_mask"
        )


def _is_any(token_ids: Tensor, wanted: frozenset[int]) -> Tensor:
    found = torch.zeros_like(token_ids, dtype=torch.bool)
    for token_id in wanted:
        found |= token_ids == token_id
    return found
