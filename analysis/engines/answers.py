"""Answers: what servers send, as a JSON line each or one JSON value, with the experts of tokens.

Which requests ran together is not told: a text's prompt is taken for a forward of its own, and so
is each token that was decoded.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from bhlog.analysis.engines.trace import Block, Told, Trace, blocks_of, lines_of
from bhlog.capture.contract.errors import CorruptTrace, one_line
from bhlog.capture.contract.manifest import ModelInfo

MOST_LINE = 1 << 29

Count = Annotated[int, Meta(ge=0, lt=1 << 32)]
TokenIds = list[Annotated[int, Meta(ge=0, lt=1 << 31)]] | None


@dataclass(frozen=True)
class Packed:
    """An array as a proxy sends it: base64 of its bytes, and what they are."""

    data: str
    shape: tuple[Count, Count, Count]
    dtype: Literal["uint8", "int16", "uint16", "int32", "int64"]
    start: Count = 0


@dataclass(frozen=True)
class About:
    """`usage`, `meta_info` and `sgl_ext`: counts, and the experts of some engines."""

    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    routed_experts: str | None = None
    routed_experts_start_len: Count | None = None


@dataclass(frozen=True)
class Choice:
    """One continuation of a prompt."""

    routed_experts: str | Packed | None = None
    routed_experts_prompt_start: Count | None = None
    token_ids: TokenIds = None
    meta_info: About | None = None
    sgl_ext: About | None = None


@dataclass(frozen=True)
class Answer(Choice):
    """An answer with `choices`, as over HTTP, or `outputs`, as in Python; or with its only one."""

    model: str | None = None
    prompt_token_ids: TokenIds = None
    prompt_routed_experts: str | Packed | None = None
    usage: About | None = None
    choices: list[Choice] = field(default_factory=list)
    outputs: list[Choice] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Text:
    """The experts of one text.

    Attributes:
        where: the file and the place in it.
        experts: (T, L, K) whole numbers; -1 throughout for tokens that were not computed.
        start: position of the first of them.
        prompt: tokens of the prompt, from position 0; None if unknown.
        token_ids: of the text from position 0, as far as they are known.
        model: its name.
    """

    where: str
    experts: NDArray[Any]
    start: int = 0
    prompt: int | None = None
    token_ids: tuple[int, ...] = ()
    model: str | None = None


def answers_of(path: Path) -> Iterator[tuple[str, Answer]]:
    """Each answer of a file, with its place in words.

    Raises:
        CorruptTrace: it is no JSON of answers.
    """
    first = True
    for where, line in lines_of(path, MOST_LINE):
        try:
            for answer in _decoded(line):
                yield where, answer
        except (ValueError, RecursionError) as error:
            try:  # one value over many lines
                if not first or path.stat().st_size > MOST_LINE:
                    raise
                yield from ((str(path), answer) for answer in _decoded(path.read_bytes()))
                return
            except (ValueError, RecursionError):
                raise CorruptTrace(f"{where}: is no answer ({one_line(str(error))})") from None
        first = False


def _decoded(text: bytes) -> list[Answer]:
    found = msgspec.json.decode(text, type=Answer | list[Answer])
    return found if isinstance(found, list) else [found]


def bytes_of_text(text: str, where: str) -> bytes:
    """What base64 text holds.

    Raises:
        CorruptTrace: it is no such text, or cut off.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise CorruptTrace(f"{where}: routed_experts: {one_line(str(error))}") from None


def of_texts(engine: str, path: Path, told: Told, texts: Iterator[Text]) -> Trace:
    """A trace of texts; told.layers are those of the arrays, or, if fewer, taken out of them."""
    first = next(texts, None)
    if first is None:
        raise CorruptTrace(f"{path}: no answer in it has routed_experts")
    L, K = _picked(first, told).shape[1:]
    layers = told.layers or tuple(range(L))
    model = told.info(path, first.model or "unknown", layers=layers, top_k=K)
    noted: dict[str, Any] = {}
    return Trace(engine, model, _blocks(chain([first], texts), told, model, noted), noted=noted)


def _picked(text: Text, told: Told) -> NDArray[Any]:
    """The experts of the layers with a router.

    Raises:
        CorruptTrace: they have other layers.
    """
    found, layers = text.experts, told.layers
    L = found.shape[1] if found.ndim == 3 else 0
    if L and layers and max(layers) < L != len(layers):
        return found[:, list(layers)]
    if not L or (layers and len(layers) != L):
        expected = f"{len(layers)} layers, or all" if layers else "(tokens, layers, k)"
        raise CorruptTrace(f"{text.where}: experts of shape {found.shape}; expected {expected}")
    return found


def _blocks(
    texts: Iterator[Text], told: Told, model: ModelInfo, noted: dict[str, Any]
) -> Iterator[Block]:
    forward = 0
    for number, text in enumerate(texts):
        experts = _picked(text, told)
        T = len(experts)
        if experts.shape[1:] != (len(model.layers), model.top_k):
            raise CorruptTrace(
                f"{text.where}: experts of {experts.shape[1:]} layers and k, unlike the first"
            )
        position = text.start + np.arange(T)
        decode = position >= (text.start + T if text.prompt is None else text.prompt)
        ids, known = np.full(T, -1), text.token_ids[text.start : text.start + T]
        ids[: len(known)] = known
        kept = (experts != -1).any(axis=(1, 2))
        if (experts[kept] == -1).any():
            raise CorruptTrace(f"{text.where}: some tokens lack some of their experts")
        if not kept.all():
            left_out = int((~kept).sum())
            noted["cached_tokens_left_out"] = noted.get("cached_tokens_left_out", 0) + left_out
        columns = {
            "sequence": np.full(T, number),
            "position": position,
            "forward": forward + np.cumsum(decode),
            "decode": decode,
            "token_id": ids,
        }
        forward += int(decode.sum()) + 1
        by_layer = [*np.moveaxis(experts[kept], 1, 0)]
        of_kept = {name: values[kept] for name, values in columns.items()}
        yield from blocks_of(text.where, model, experts=by_layer, columns=of_kept)
