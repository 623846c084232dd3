"""Text as a model takes it: token windows, padded batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import EmptyText, InvalidOption, RouterLogError
from bhlog.capture.documents import Document, Message

NO_TEMPLATE = (
    "the tokenizer has no chat template, by which messages are written: name another --tokenizer, "
    "or read text"
)
EMPTY = "the text is empty: there is nothing to capture"


@dataclass(frozen=True)
class Window:
    """At most max_length consecutive tokens of one document.

    Attributes:
        source: of the document.
        token_ids: its tokens.
        roles: who says each token, "" for unknown; empty if the document is no conversation.
    """

    source: str
    token_ids: tuple[int, ...]
    roles: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows side by side, padded on the right.

    Attributes:
        token_ids, mask: (B, S) int64; mask is 0 on padding.
        sources: (B,) names.
        roles: (B,) of each window.
    """

    token_ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    sources: tuple[str, ...]
    roles: tuple[tuple[str, ...], ...]


class Tokenizer(Protocol):
    """What capture needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def chat(self, messages: Sequence[Message], *, answer: bool = False) -> str: ...


class ByteTokenizer:
    """A token per byte of UTF-8, as byte-level models without a tokenizer file read text."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, each below 256."""
        return list(text.encode("utf-8", errors="replace"))

    def chat(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        """Raises RouterLogError: there is no chat template."""
        raise RouterLogError(NO_TEMPLATE)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; ids above 255 are left out."""
        return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")


def conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, answer: bool = False
) -> tuple[list[int], list[str]]:
    """Token ids of a conversation as the model's chat template writes it, and who says each.

    The first messages alone are written too: what a message adds to them is said by its role. Where
    a template writes them otherwise alone, or not at all, it is not known who says what, up to the
    next message that only adds.

    Args:
        answer: end with what the template writes before an answer, which is the assistant's.

    Raises:
        RouterLogError: there is no chat template, or it refuses the conversation.
    """
    token_ids = tokenizer.encode(tokenizer.chat(messages, answer=answer))
    roles: list[str] = []
    known = True
    for n, message in enumerate(messages, 1):
        try:
            so_far = tokenizer.encode(tokenizer.chat(messages[:n]))
        except RouterLogError:
            so_far = []
        if so_far and len(so_far) >= len(roles) and token_ids[: len(so_far)] == so_far:
            roles += [str(message["role"]) if known else ""] * (len(so_far) - len(roles))
            known = True
        else:
            known = False
    last = "assistant" if answer and known else ""
    return token_ids, roles + [last] * (len(token_ids) - len(roles))


def windows(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_tokens: int | None = None,
) -> list[Window]:
    """Cut documents into consecutive windows of at most max_length tokens.

    Args:
        max_tokens: stop after so many tokens of every source; None reads everything.

    Raises:
        EmptyText: there is not a single token.
    """
    result = list(cut(documents, tokenizer, max_length=max_length, max_tokens=max_tokens))
    if not result:
        raise EmptyText(EMPTY)
    return result


def cut(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_tokens: int | None = None,
    full: set[str] | None = None,
    answers: bool = False,
) -> Iterator[Window]:
    """As `windows`, one after another while documents are read, and none of an empty text.

    Args:
        full: gets each source of which max_tokens are cut, for read_documents to leave it.
        answers: whether the model is to answer the last message of a conversation.
    """
    for name, value in (("max_length", max_length), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise InvalidOption(f"{name} must be at least 1, got {value}")
    left: dict[str, int] = {}
    for document in documents:
        room = left.get(document.source, max_tokens)
        if room is not None and room <= 0:
            continue
        roles: list[str] = []
        token_ids = tokenizer.encode(document.text)
        if document.messages:
            token_ids, roles = conversation(tokenizer, document.messages, answer=answers)
        token_ids = token_ids[:room]
        if room is not None:
            left[document.source] = room - len(token_ids)
            if full is not None and left[document.source] <= 0:
                full.add(document.source)
        for start in range(0, len(token_ids), max_length):
            part = slice(start, min(start + max_length, len(token_ids)))
            yield Window(document.source, tuple(token_ids[part]), tuple(roles[part]))


def batches(windows: Iterable[Window], *, batch_size: int, pad_id: int = 0) -> Iterator[Batch]:
    """Batches of batch_size windows in order, padded on the right to the longest of each."""
    if batch_size < 1:
        raise InvalidOption(f"batch_size must be at least 1, got {batch_size}")
    ahead = iter(windows)
    while part := list(islice(ahead, batch_size)):
        longest = max(len(window.token_ids) for window in part)
        token_ids = np.full((len(part), longest), pad_id, dtype=np.int64)
        mask = np.zeros_like(token_ids)
        for row, window in enumerate(part):
            n = len(window.token_ids)
            token_ids[row, :n] = window.token_ids
            mask[row, :n] = 1
        sources, roles = ([getattr(w, name) for w in part] for name in ("source", "roles"))
        yield Batch(token_ids, mask, tuple(sources), tuple(roles))
