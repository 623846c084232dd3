"""Which token each router row belongs to: sequence, position, token id and phase.

Inside a router everything is flattened to batch * seq rows. Hooks on the routers' nearest
PreTrainedModel see input_ids, attention_mask and the cache, and follow each generation by its cache
object. Nothing here waits for the device while a generation runs.
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

from bhlog.capture.contract.errors import UnknownIdentity
from bhlog.capture.tokens.cache import cache_length, find_cache, is_tuple_cache, unwatch, watch
from bhlog.capture.tokens.columns import mask_width, new_columns, packed, past_columns
from bhlog.capture.tokens.filler import Suspects, without_runs
from bhlog.capture.tokens.stream import NEVER, Forward, Stream


class _Place(threading.local):
    """Where a thread's generation stands.

    Attributes:
        stream: what the generation fed last; None before its first forward.
        due: the next forward is the generation's own, not one of a processor of its logits.
        prompt: the generation has not chosen a token yet.
    """

    stream: Stream | None = None
    due: bool = False
    prompt: bool = False


@dataclass(eq=False)
class Tracker:
    """Numbers sequences and forwards, and follows generations through their caches.

    Attributes:
        next_sequence, next_forward: the numbers given next.
        next_texts: by text column of the log, what the next new sequences have there, one name per
            row or per prompt of several rows; used up by the forward that starts them.
        next_roles: who says what is at each column of the next new sequences, one row of names per
            row or per prompt of several rows, and who says what follows; used up likewise.
        next_lengths: tokens of each row of the next forward without attention mask, padding after
            them; used up by it.
        pad_token_id: id that is padding at either end of rows without attention mask, if known.
        suspects: counts what may be padding in those, if it is not known.
        on_cut: called with a stream and its new length when a cache drops its last columns.
    """

    next_sequence: int = 0
    next_forward: int = 0
    next_texts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    next_roles: tuple[tuple[tuple[str, ...], ...], str] = ((), "")
    next_lengths: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    suspects: Suspects | None = None
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
                cache is of a kind that cannot be read, or the forward continues tokens that are in
                no cache.
        """
        given = _given(inputs)
        cache = _cache_of(inputs, given.shape[1])
        with self._lock:
            known = None if cache is None else self._streams.get(cache)
            start = cache_length(cache, None if known is None else known.length)
            real = self._tokens_among(inputs, given, start)
            stream = self._stream(cache, known, start, inputs.get("attention_mask"), given)
            chosen = self._chosen(stream, cache, given.shape[1])
            return self._forward(stream, inputs.get("input_ids"), real, start, chosen)

    def end(self, forward: Forward, output: Any) -> None:
        """The forward is done: its columns are in the cache, which it may have made itself.

        Raises:
            UnknownIdentity: the cache that came out holds tokens of a cache that did not go in.
        """
        parts = output.values() if isinstance(output, dict) else output
        cache = find_cache(parts) if isinstance(output, dict | tuple) else None
        with self._lock:
            stream = forward.stream
            if cache is not None and self._streams.get(cache) is not stream:
                length = cache_length(cache)
                if length > forward.start + forward.keep.shape[1]:
                    raise UnknownIdentity(
                        f"the model returned a cache of {length} columns, but it was given "
                        f"{forward.keep.shape[1]} tokens a row after {forward.start}; which "
                        "sequences they continue is not known"
                    )
                self._follow(cache, stream)
            stream.append(forward.keep, forward.positions[:, -1] + 1, forward.ends)

    def generation_begins(self) -> None:
        """`generate` is about to feed a prompt."""
        place = self._place
        place.stream, place.due, place.prompt = None, True, True

    def tokens_chosen(self, done: Tensor) -> None:
        """`generate` chose the next token of each row.

        Args:
            done: (B,) bool, rows that end with it and are fed padding from then on.
        """
        place = self._place
        if place.due:  # asked about a draft before it is fed
            return
        place.due, place.prompt = True, False
        stream = place.stream
        if stream is None:
            return
        stream.settled = stream.length
        if len(done) == len(stream.sequences):  # beam search keeps its own count
            ended = stream.ends.clamp(max=stream.length + 1)
            stream.ends = torch.where(done.to(ended.device), ended, stream.ends)

    def generation_ends(self) -> None:
        """`generate` returned or failed: what its cache is fed from now on is not its padding."""
        place = self._place
        if place.stream is not None:
            place.stream.ends = torch.full_like(place.stream.ends, NEVER)
        place.stream, place.due, place.prompt = None, False, False

    def release(self) -> None:
        """Give the caches that are still alive their own methods back."""
        with self._lock:
            for cache in list(self._streams):
                unwatch(cache)
            self._streams.clear()

    def _tokens_among(self, inputs: dict[str, Any], given: Tensor, start: int) -> Tensor:
        """(B, S) bool: columns of a forward that are tokens.

        Raises:
            UnknownIdentity: the mask cannot be read, or a row holds several sequences.
        """
        (B, S), mask = given.shape[:2], inputs.get("attention_mask")
        real = new_columns(mask, B, start, S, given.device)
        if packed(inputs, real):
            raise UnknownIdentity(
                "several sequences are packed in a row, as position_ids or cu_seq_lens_q say, and "
                "bhlog cannot tell them apart; run one sequence per row, padded, with "
                "attention_mask"
            )
        lengths, self.next_lengths = self.next_lengths, None
        if mask is None and lengths is not None:
            if len(lengths) != B:
                raise UnknownIdentity(f"{len(lengths)} lengths are named, of {B} rows")
            held = torch.tensor(lengths, device=real.device)[:, None]
            real = real & (torch.arange(S, device=real.device) < held)
        elif mask is None and given.dim() == 2:
            if self.pad_token_id is not None:
                real = without_runs(given, self.pad_token_id, begins=start == 0)
            elif self.suspects is not None and start == 0:
                self.suspects.notice(given)
        return real

    def _stream(
        self, cache: Any, stream: Stream | None, start: int, mask: Any, given: Tensor
    ) -> Stream:
        """The stream that a forward continues, the cache's if it still has one, or a new one."""
        if stream is not None and start < stream.length:
            self._cut(stream, start)
        B = given.shape[0]
        if stream is None or start == 0 or start != stream.length or len(stream.sequences) != B:
            stream = self._new_stream(mask, B, start, given.device)
            self._follow(cache, stream)
        return stream

    def _forward(
        self, stream: Stream, token_ids: Tensor | None, real: Tensor, start: int, chosen: bool
    ) -> Forward:
        """The next forward: which of its real columns are kept, and where in their sequences."""
        S = real.shape[1]
        decode = start > 0 and (chosen or (S == 1 and not self._place.prompt))
        keep, ends = real, stream.ends
        if chosen:  # generate feeds padding after the end of a row; a text may hold such an id
            first = start if S == 1 else torch.arange(start, start + S, device=real.device)
            keep = real & (ends[:, None] > first)
        else:
            ends = torch.full_like(ends, NEVER)
            if (n := self._ended_before(stream)) is not None:
                keep = real & (torch.arange(S, device=real.device) < S - n[:, None])
        before = stream.tokens[:, None] - 1
        head_start, stream.last_logits = stream.last_logits, None
        number, self.next_forward = self.next_forward, self.next_forward + 1
        return Forward(
            number=number,
            sequences=stream.sequences,
            parents=stream.parents,
            texts=stream.texts,
            roles=stream.said_at(start, S),
            # the caller may write its next token into the same tensor
            token_ids=None if token_ids is None else token_ids.clone(),
            positions=before + (keep if S == 1 else keep.cumsum(dim=1)),
            keep=keep,
            phase=int(decode),
            start=start,
            stream=stream,
            ends=ends,
            head_start=None if head_start is None else head_start[:, -1],
            follows=stream.columns[:, start - 1] if start > 0 else None,
        )

    def _chosen(self, stream: Stream, cache: Any, length: int) -> bool:
        """Whether a forward of `length` columns is fed what the generation has just chosen.

        Raises:
            UnknownIdentity: it must be, but what it continues is in no cache.
        """
        place = self._place
        before, due, place.due = place.stream, place.due, False
        if not due:
            return False
        place.stream = stream
        if place.prompt or before is None:
            return False
        if cache is not None:
            return stream is before
        # generation without a cache feeds everything again and one token more
        rows = len(before.sequences), len(stream.sequences)
        if rows[0] != rows[1] or length != before.length + 1:
            raise UnknownIdentity(
                f"generate feeds {length} tokens a row after {before.length}, and no cache holds "
                "what they continue; generate with a Cache object, or with use_cache=False"
            )
        stream.ends = before.ends.to(stream.ends.device)
        return True

    def _ended_before(self, stream: Stream) -> Tensor | None:
        """(B,) last columns that are padding where a processor of a generation's logits runs it.

        It feeds its own cache what the generation has chosen, and what follows the end of a row
        too. None outside of such a forward.
        """
        ours = self._place.stream
        if ours is None or ours is stream or len(ours.sequences) != len(stream.sequences):
            return None
        return (ours.length - ours.ends).clamp(min=0).to(stream.ends.device)

    def _new_stream(self, mask: Any, batch: int, start: int, device: torch.device) -> Stream:
        texts, self.next_texts = self.next_texts, {}
        (roles, then), self.next_roles = self.next_roles, ((), "")
        repeats, rest = divmod(batch, len(roles) or batch + 1)
        before = ("",) * start
        roles = () if rest else tuple((*before, *row) for row in roles for _ in range(repeats))
        # columns that went in before the tracker looked count as tokens unless the mask hides them
        columns = past_columns(mask, batch, start, device)
        return Stream(
            sequences=self._numbers(batch),
            parents=np.full(batch, -1),
            begun=np.full(batch, start),
            texts={column: _by_row(names, batch) for column, names in texts.items()},
            roles=roles,
            then=then,
            columns=columns,
            length=start,
            tokens=columns.sum(dim=1),
            ends=torch.full((batch,), NEVER, device=device),
        )

    def _numbers(self, count: int) -> NDArray[np.uint32]:
        first, self.next_sequence = self.next_sequence, self.next_sequence + count
        return np.arange(first, first + count, dtype=np.uint32)

    def _follow(self, cache: Any, stream: Stream) -> None:
        if cache is None:
            return
        self._streams[cache] = stream
        watch(cache, self._cache_changed)

    def _cache_changed(self, cache: Any, name: str, argument: Any) -> None:
        """A followed cache's method `name` was called with `argument`."""
        with self._lock:
            stream = self._streams.get(cache)
            if stream is None:
                return
            if name == "reset":
                self._streams[cache] = None  # still watched
            elif name == "crop":
                length = cache_length(cache)
                if length < stream.length:
                    self._cut(stream, length)
            elif name == "batch_repeat_interleave":
                self._reorder(stream, np.arange(len(stream.sequences)).repeat(argument).tolist())
            else:
                self._reorder(stream, torch.as_tensor(argument).tolist())

    def _cut(self, stream: Stream, length: int) -> None:
        """Drop columns: rejected drafts of the last forward, or a return to an earlier point."""
        if length > stream.last_start and length >= stream.settled:
            if self.on_cut is not None:
                self.on_cut(stream, length)
        else:  # what was logged stays; what follows is another continuation of the same start
            B = len(stream.sequences)
            stream.leave(self._numbers(B), np.ones(B, dtype=bool), np.arange(B))
            stream.begun[:] = length
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


def _by_row(names: tuple[str, ...], batch: int) -> tuple[str, ...]:
    """A name for each row of a batch, from one per row or prompt; unknown if they do not fit."""
    repeats, rest = divmod(batch, len(names) or batch + 1)
    if rest or not repeats:
        return ("",) * batch
    return tuple(name for name in names for _ in range(repeats))


def _given(inputs: dict[str, Any]) -> Tensor:
    """(B, S) token ids or (B, S, H) embeddings, whichever the forward was given."""
    for name in ("input_ids", "inputs_embeds"):
        given = inputs.get(name)
        if given is not None:
            tensor: Tensor = given
            return tensor
    raise UnknownIdentity("the forward has neither input_ids nor inputs_embeds")


def _cache_of(inputs: dict[str, Any], length: int) -> Any:
    """The cache among a forward's arguments, or None.

    Args:
        length: tokens that the forward is fed in each row.

    Raises:
        UnknownIdentity: it cannot be followed, or the mask tells of tokens that no cache holds.
    """
    if any(map(is_tuple_cache, inputs.values())):
        raise UnknownIdentity(
            "the cache is a tuple, whose sequences cannot be followed; pass a Cache object"
        )
    cache = find_cache(inputs.values())
    width = mask_width(inputs.get("attention_mask"))
    if cache is None and width > length:
        raise UnknownIdentity(
            f"attention_mask has {width} columns, but the model was given {length} tokens a row "
            "and no cache that holds the others; pass the cache, or a mask of the tokens given"
        )
    return cache
