"""Which token each router row belongs to: sequence, position, token id and phase.

Inside a router everything is flattened to batch * seq rows. Hooks on the routers' nearest
PreTrainedModel see input_ids, attention_mask and past_key_values, and follow each generation by its
cache object. Nothing here waits for the device while a generation runs.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.contract.errors import UnknownIdentity
from capture.tokens.columns import new_columns, packed, past_columns

_NEVER = torch.iinfo(torch.int64).max  # a column no sequence reaches


@dataclass(eq=False)
class Stream:
    """Sequences that grow together in one cache: the rows of a batch.

    Attributes:
        sequences: (B,) uint32, the sequence number of each row.
        sources: (B,) where the text of each row came from, "" for unknown.
        columns: (B, capacity) bool on the model's device, which columns hold a logged token; the
            first `length` count, the others are padding or follow the end of a sequence.
        length: columns in the cache.
        tokens: (B,) int64 on the device, logged tokens of each row.
        ends: (B,) int64, columns from here on follow the row's end of sequence.
        last_start: column at which the last forward began.
        drafts: whether columns were cut from the cache (assisted decoding).
        last_logits: (B, H, V), the head's output at the last H columns, for the next token's loss.
    """

    sequences: NDArray[np.uint32]
    sources: tuple[str, ...]
    columns: Tensor
    length: int
    tokens: Tensor
    ends: Tensor
    last_start: int = 0
    drafts: bool = False
    last_logits: Tensor | None = None

    def append(self, keep: Tensor, tokens: Tensor, ends: Tensor) -> None:
        """Add the (B, S) columns of a forward."""
        start, self.length = self.length, self.length + keep.shape[1]
        if self.length > self.columns.shape[1]:
            room = self.columns.new_zeros(len(keep), max(64, 2 * self.length))
            room[:, :start] = self.columns[:, :start]
            self.columns = room
        self.columns[:, start : self.length] = keep
        self.last_start, self.tokens, self.ends = start, tokens, ends

    def cut(self, length: int) -> None:
        """Forget the columns from `length` on."""
        if self.last_logits is not None:
            kept = self.last_logits.shape[1] - (self.length - length)
            self.last_logits = self.last_logits[:, :kept] if kept > 0 else None
        self.length = length
        self.tokens = self.columns[:, :length].sum(dim=1)
        self.ends = torch.where(self.ends > length, _NEVER, self.ends)
        self.drafts = True

    def reorder(self, rows: list[int], sequences: NDArray[np.uint32]) -> None:
        """Row i continues what row rows[i] was, under the number sequences[i]."""
        index = torch.tensor(rows, device=self.columns.device)
        self.sequences = sequences
        self.sources = tuple(self.sources[row] for row in rows)
        self.columns, self.tokens = self.columns[index], self.tokens[index]
        self.ends = self.ends[index]
        if self.last_logits is not None:
            self.last_logits = self.last_logits[index.to(self.last_logits.device)]


@dataclass(eq=False)
class Forward:
    """One forward pass: who its rows are, on the model's device.

    Attributes:
        number: forwards are numbered from 0.
        sequences, sources: (B,), see Stream.
        token_ids: (B, S) int64, a copy; None when the model was given embeddings.
        positions: (B, S) int64, in the sequence, padding not counted.
        keep: (B, S) bool; False for padding and for what follows a row's end of sequence.
        phase: 0 prefill, 1 decode.
        start: column of the cache at which the forward's tokens go.
        stream: the stream it belongs to.
        ends: (B,) the stream's `ends` once the forward is done.
        head_start: (B, V) logits that predict the first column; None if unknown.
        follows: (B,) bool, rows whose column before the first is a token.
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
    ends: Tensor
    head_start: Tensor | None = None
    follows: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows that each router sees: batch * seq."""
        return self.keep.numel()


class _Place(threading.local):
    """Where a thread's generation stands.

    Attributes:
        stream: of the forward before.
        prompt: a generation began and has not chosen a token yet.
        chosen: the generation has just chosen the tokens that the next forward is fed.
        inside: a forward began and has not ended.
    """

    stream: Stream | None = None
    prompt: bool = False
    chosen: bool = False
    inside: bool = False


@dataclass(eq=False)
class Tracker:
    """Numbers sequences and forwards, and follows generations through their caches.

    Attributes:
        eos: ids that end a sequence in decoding, where no generation says what ended.
        next_sequence, next_forward: the numbers given next.
        next_sources: where the next new sequences come from, one name per row or per prompt of
            several rows; used up by the forward that starts them.
        on_cut: called with a stream and its new length when a cache drops its last columns.
    """

    eos: frozenset[int]
    next_sequence: int = 0
    next_forward: int = 0
    next_sources: tuple[str, ...] = ()
    on_cut: Callable[[Stream, int], None] | None = None
    _streams: "weakref.WeakKeyDictionary[Any, Stream | None]" = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _place: _Place = field(default_factory=_Place)
    _lock: Any = field(default_factory=threading.RLock)

    def begin(self, inputs: dict[str, Any]) -> Forward:
        """Identify the rows of a forward from the base model's inputs.

        Nothing is committed to the stream before `end`: a forward that fails leaves no trace but
        its numbers.

        Args:
            inputs: its arguments by name.

        Raises:
            UnknownIdentity: several sequences are packed in a row, or the attention mask or the
                cache is of a kind that cannot be read.
        """
        token_ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        given = token_ids if token_ids is not None else embeds
        if given is None:
            raise UnknownIdentity("the forward has neither input_ids nor inputs_embeds")
        B, S = given.shape[:2]
        place = self._place
        with self._lock:
            cache = inputs.get("past_key_values")
            if isinstance(cache, tuple | list):
                raise UnknownIdentity(
                    "past_key_values is a tuple, whose sequences cannot be followed; pass a Cache "
                    "object"
                )
            stream = None if cache is None else self._streams.get(cache)
            start = _cache_length(cache, stream)
            mask = inputs.get("attention_mask")
            real = new_columns(mask, B, start, S, given.device)
            if packed(inputs, real):
                raise UnknownIdentity(
                    "position_ids start again inside a row: several sequences are packed together, "
                    "and bhlog cannot tell them apart; run one sequence per row, padded, with "
                    "attention_mask"
                )
            if stream is not None and start < stream.length:
                self._cut(stream, start)
            if place.inside:  # the forward before failed, and its generation with it
                place.prompt = place.chosen = False
            before, chosen, place.chosen = place.stream, place.chosen, False
            if stream is None or start == 0 or start != stream.length or len(stream.sequences) != B:
                stream = self._new_stream(mask, B, start, given.device)
                # generation without a cache feeds everything again and one token more
                chosen = chosen and cache is None and _continues(before, B, S)
                if chosen and before is not None:
                    stream.ends = before.ends.to(given.device)
                self._follow(cache, stream)
            else:
                chosen = chosen and stream is before
            if chosen:
                decode = start > 0
            elif place.prompt:
                decode = False
            else:
                decode = start > 0 and (S == 1 or stream.drafts)
            ends = stream.ends if decode or chosen else torch.full_like(stream.ends, _NEVER)
            keep = real
            if decode or chosen:
                columns = torch.arange(start, start + S, device=given.device)
                keep = real & (columns < ends[:, None])
            if decode and not chosen and token_ids is not None and self.eos:
                keep, ends = _stop_after(token_ids, keep, ends, start, self.eos)
            follows = stream.columns[:, start - 1] if start > 0 else None
            head_start, stream.last_logits = stream.last_logits, None
            forward = Forward(
                number=self.next_forward,
                sequences=stream.sequences,
                sources=stream.sources,
                # the caller may write its next token into the same tensor
                token_ids=None if token_ids is None else token_ids.clone(),
                positions=stream.tokens[:, None] + keep.cumsum(dim=1) - 1,
                keep=keep,
                phase=int(decode),
                start=start,
                stream=stream,
                ends=ends,
                head_start=None if head_start is None else head_start[:, -1],
                follows=follows,
            )
            self.next_forward += 1
            place.stream, place.inside = stream, True
            return forward

    def end(self, forward: Forward, output: Any) -> None:
        """The forward is done: its columns are in the cache, which it may have made itself."""
        self._place.inside = False
        with self._lock:
            stream = forward.stream
            stream.append(forward.keep, forward.positions[:, -1] + 1, forward.ends)
            cache = getattr(output, "past_key_values", None)
            if isinstance(output, tuple):
                cache = next((part for part in output if hasattr(part, "get_seq_length")), None)
            if cache is not None and self._streams.get(cache) is not stream:
                self._follow(cache, stream)

    def generation_begins(self) -> None:
        """`generate` is about to feed a prompt."""
        self._place.prompt, self._place.chosen, self._place.inside = True, False, False

    def tokens_chosen(self, done: Tensor) -> None:
        """`generate` chose the next token of each row.

        Args:
            done: (B,) bool, rows that end with it and are fed padding from then on.
        """
        place = self._place
        place.prompt, place.chosen = False, True
        stream = place.stream
        if stream is None or len(done) != len(stream.sequences):  # beam search keeps its own count
            return
        done = done.to(stream.ends.device)
        over = done | (stream.ends != _NEVER)
        ends = torch.where(done, stream.ends.clamp(max=stream.length + 1), stream.ends)
        # when every row is done the generation stops: what comes later is not its padding
        stream.ends = torch.where(over.all(), _NEVER, ends)

    def release(self) -> None:
        """Give the caches that are still alive their own methods back."""
        with self._lock:
            for cache in list(self._streams):
                for name in _Watched.methods:
                    watched = vars(cache).get(name)
                    if isinstance(watched, _Watched):
                        watched.remove(cache)
            self._streams.clear()

    def _new_stream(self, mask: Any, batch: int, start: int, device: torch.device) -> Stream:
        sources, self.next_sources = self.next_sources, ()
        repeats, rest = divmod(batch, len(sources) or batch + 1)
        if rest or not repeats:
            sources, repeats = ("",), batch
        # columns that went in before the tracker looked count as tokens unless the mask hides them
        columns = past_columns(mask, batch, start, device)
        return Stream(
            sequences=self._numbers(batch),
            sources=tuple(name for name in sources for _ in range(repeats)),
            columns=columns,
            length=start,
            tokens=columns.sum(dim=1),
            ends=torch.full((batch,), _NEVER, device=device),
        )

    def _numbers(self, count: int) -> NDArray[np.uint32]:
        first, self.next_sequence = self.next_sequence, self.next_sequence + count
        return np.arange(first, first + count, dtype=np.uint32)

    def _follow(self, cache: Any, stream: Stream) -> None:
        if cache is None:
            return
        self._streams[cache] = stream
        for name in _Watched.methods:
            if hasattr(cache, name) and not isinstance(vars(cache).get(name), _Watched):
                setattr(cache, name, _Watched(self, cache, name))

    def cache_changed(self, cache: Any, name: str, argument: Any) -> None:
        """A followed cache's method `name` was called with `argument`."""
        with self._lock:
            stream = self._streams.get(cache)
            if stream is None:
                return
            if name == "reset":
                self._streams[cache] = None  # still watched
            elif name == "crop":
                length = _cache_length(cache, None)
                if length < stream.length:
                    self._cut(stream, length)
            elif name == "batch_repeat_interleave":
                self._reorder(stream, np.arange(len(stream.sequences)).repeat(argument).tolist())
            else:
                self._reorder(stream, torch.as_tensor(argument).tolist())

    def _cut(self, stream: Stream, length: int) -> None:
        """Drop columns: rejected drafts of the last forward, or a return to an earlier point."""
        if length > stream.last_start and not self._place.chosen:
            if self.on_cut is not None:
                self.on_cut(stream, length)
        else:  # what was logged stays; what follows is another continuation of the same start
            stream.sequences = self._numbers(len(stream.sequences))
        stream.cut(length)

    def _reorder(self, stream: Stream, rows: list[int]) -> None:
        """Rows continue the sequences of `rows`; a second heir gets a number of its own."""
        taken: set[int] = set()
        sequences = stream.sequences[rows].copy()
        for i, row in enumerate(rows):
            if row in taken:
                sequences[i] = self._numbers(1)[0]
            taken.add(row)
        stream.reorder(rows, sequences)


class _Watched:
    """A cache's method that tells the tracker when it was called.

    It refers to its cache weakly, so that the cache is freed as soon as its user drops it; copying
    or pickling the cache gives the copy its own, plain method.
    """

    methods = ("reorder_cache", "crop", "reset", "batch_repeat_interleave", "batch_select_indices")

    def __init__(self, tracker: Tracker, cache: Any, name: str) -> None:
        self._tracker = weakref.ref(tracker)
        self._cache = weakref.ref(cache)
        self._name = name
        self._own = vars(cache).get(name)  # set on the instance by someone else

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache()
        method = self._own or getattr(type(cache), self._name).__get__(cache)
        result = method(*args, **kwargs)
        tracker = self._tracker()
        if tracker is not None:
            tracker.cache_changed(cache, self._name, next(iter([*args, *kwargs.values()]), None))
        return result

    def __reduce__(self) -> Any:
        return getattr, (self._cache(), self._name)

    def remove(self, cache: Any) -> None:
        """Put the cache's method back as it was."""
        if self._own is None:
            del vars(cache)[self._name]
        else:
            setattr(cache, self._name, self._own)


def _continues(before: Stream | None, batch: int, length: int) -> bool:
    return before is not None and (len(before.sequences), before.length + 1) == (batch, length)


def _cache_length(cache: Any, stream: Stream | None) -> int:
    """Columns in the cache; a length on the device is read only when no stream knows it."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and stream is not None:
        return stream.length
    return int(length)


def _stop_after(
    token_ids: Tensor, keep: Tensor, ends: Tensor, start: int, eos: frozenset[int]
) -> tuple[Tensor, Tensor]:
    """Drop what follows the first end-of-sequence token of each row, and note where it was."""
    found = torch.zeros_like(token_ids, dtype=torch.bool)
    for token_id in eos:
        found |= token_ids == token_id
    found &= keep
    after = found.long().cumsum(dim=1) - found.long()  # 0 up to the first end, itself included
    first = start + found.long().argmax(dim=1) + 1
    return keep & (after == 0), torch.where(found.any(dim=1), ends.minimum(first), ends)
