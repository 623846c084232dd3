"""Sequences that grow together in a cache, and one forward pass of them."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEVER = torch.iinfo(torch.int64).max  # a column no sequence reaches


@dataclass(eq=False)
class Stream:
    """Sequences that grow together in one cache: the rows of a batch.

    Attributes:
        sequences: (B,) uint32, the sequence number of each row.
        parents: (B,) int64, the sequence that each row left, -1 if it is whole.
        begun: (B,) int64, the column at which each row's sequence begins.
        texts: by text column of the log, (B,) what each row has there, "" for unknown.
        roles: (B,) who says what is at each column from 0 on, "" for unknown.
        then: who says what comes after those.
        columns: (B, capacity) bool on the model's device, which columns hold a logged token; the
            first `length` count, the others are padding or follow the end of a sequence.
        length: columns in the cache.
        tokens: (B,) int64 on the device, logged tokens of each row.
        ends: (B,) int64, columns from here on follow the row's end of sequence.
        last_start: column at which the last forward began.
        settled: columns that a generation has gone on from; a cut below undoes none of them.
        last_logits: (B, H, V), the head's output at the last H columns, for the next token's loss.
    """

    sequences: NDArray[np.uint32]
    parents: NDArray[np.int64]
    begun: NDArray[np.int64]
    texts: dict[str, tuple[str, ...]]
    columns: Tensor
    length: int
    tokens: Tensor
    ends: Tensor
    roles: tuple[tuple[str, ...], ...] = ()
    then: str = ""
    last_start: int = 0
    settled: int = 0
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

    def said_at(self, start: int, length: int) -> tuple[tuple[str, ...], ...]:
        """(B, length) who says what is at these columns; empty if no row is a conversation."""
        rows = (row[start : start + length] for row in self.roles)
        return tuple((*row, *(self.then,) * (length - len(row))) for row in rows)

    def cut(self, length: int) -> None:
        """Forget the columns from `length` on."""
        if self.last_logits is not None:
            kept = self.last_logits.shape[1] - (self.length - length)
            self.last_logits = self.last_logits[:, :kept] if kept > 0 else None
        self.roles = tuple(row[:length] for row in self.roles)
        self.length, self.settled = length, min(length, self.settled)
        self.tokens = self.columns[:, :length].sum(dim=1)
        self.ends = torch.where(self.ends > length, NEVER, self.ends)

    def reorder(self, rows: list[int], numbers: NDArray[np.uint32]) -> None:
        """Row i continues what row rows[i] was; numbers[i] is its own if it forks from it."""
        index = torch.tensor(rows, device=self.columns.device)
        forks = numbers != self.sequences[rows]
        self.leave(numbers, forks, np.array(rows))
        self.texts = {
            column: tuple(names[row] for row in rows) for column, names in self.texts.items()
        }
        self.roles = tuple(self.roles[row] for row in rows) if self.roles else ()
        self.columns, self.tokens = self.columns[index], self.tokens[index]
        self.ends = self.ends[index]
        if self.last_logits is not None:
            self.last_logits = self.last_logits[index.to(self.last_logits.device)]

    def leave(
        self, numbers: NDArray[np.uint32], forks: NDArray[np.bool_], rows: NDArray[np.int64]
    ) -> None:
        """Row i becomes sequence numbers[i]; where it forks, what row rows[i] was is its parent.

        A sequence that has no columns yet is nobody's parent: its own is.
        """
        whole = self.length > self.begun[rows]
        origins = np.where(whole, self.sequences[rows].astype(np.int64), self.parents[rows])
        self.parents = np.where(forks, origins, self.parents[rows])
        self.begun = np.where(forks, self.length, self.begun[rows])
        self.sequences = numbers


@dataclass(eq=False)
class Forward:
    """One forward pass: who its rows are, on the model's device.

    Attributes:
        number: forwards are numbered from 0.
        sequences, parents, texts: see Stream.
        roles: (B, S) who says each token, "" for unknown; empty if no row is a conversation.
        token_ids: (B, S) int64, a copy; None when the model was given embeddings.
        positions: (B, S) int64, in the sequence, padding not counted.
        keep: (B, S) bool; False for padding and for what follows a row's end of sequence.
        phase: 1 decode: its tokens continue what a cache holds as they were chosen, by `generate`
            (a draft may have several) or one at a time by a loop of the caller's. 0 prefill: they
            are given, as a prompt, a chunk or a turn of it, or a whole text that is read again
            because no cache holds it.
        start: column of the cache at which the forward's tokens go.
        stream: the stream it belongs to.
        ends: (B,) the stream's `ends` once the forward is done.
        head_start: (B, V) logits that predict the first column; None if unknown.
        follows: (B,) bool, rows whose column before the first is a token.
        foreign: token_ids were not given to the base model but to a model around it, and some may
            stand for what is no token of the vocabulary.
    """

    number: int
    sequences: NDArray[np.uint32]
    parents: NDArray[np.int64]
    texts: dict[str, tuple[str, ...]]
    token_ids: Tensor | None
    positions: Tensor
    keep: Tensor
    phase: int
    start: int
    stream: Stream
    ends: Tensor
    head_start: Tensor | None = None
    follows: Tensor | None = None
    foreign: bool = False
    roles: tuple[tuple[str, ...], ...] = ()

    @property
    def rows(self) -> int:
        """Rows that each router sees: batch * seq."""
        return self.keep.numel()
