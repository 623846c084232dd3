"""Traces: what other engines write of their routing, as their readers give it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import CorruptTrace, InvalidOption
from bhlog.capture.contract.manifest import ModelInfo
from bhlog.capture.contract.opening import refused

MOST_VALUES = 1 << 24  # of a block, as far as its reader can cut it: 64 MiB of float32

_FACTS = {"layers": "--layers", "n_experts": "--n-experts", "top_k": "--top-k"}


@dataclass(frozen=True, eq=False)
class Block:
    """Tokens that follow one another in a trace, at all layers.

    T tokens, L layers in the model's order, K slots, E experts.

    Attributes:
        where: the file and the place in it, for errors.
        sequence, position, forward: (T,) whole numbers; forwards count from 0.
        decode: (T,) bool, whether a token was decoded.
        experts: (L, T, K) whole numbers by falling choice, -1 from a row's first unused slot on;
            None: the top_k largest logits.
        weights: (L, T, K) floats; None where the trace has none.
        logits: (L, T, E) float32; None where the trace has none.
        token_id: (T,) whole numbers; None where they are unknown.
    """

    where: str
    sequence: NDArray[Any]
    position: NDArray[Any]
    forward: NDArray[Any]
    decode: NDArray[np.bool_]
    experts: NDArray[Any] | None = None
    weights: NDArray[Any] | None = None
    logits: NDArray[np.float32] | None = None
    token_id: NDArray[Any] | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """A trace that is being read.

    Attributes:
        engine: what wrote it.
        model: whose routers they are.
        blocks: its tokens; each is read when it is asked for.
        logits: whether it has logits; all of its blocks do, or none.
        noted: what else the manifest is to keep; complete after the last block.
    """

    engine: str
    model: ModelInfo
    blocks: Iterator[Block]
    logits: bool = False
    noted: dict[str, Any] = field(default_factory=dict)


def blocks_of(
    where: str,
    model: ModelInfo,
    logits: Sequence[NDArray[Any]] | None = None,
    experts: Sequence[NDArray[Any]] | None = None,
    weights: Sequence[NDArray[Any]] | None = None,
    *,
    columns: Mapping[str, NDArray[Any]] = {},
    noted: dict[str, Any] | None = None,
) -> Iterator[Block]:
    """Blocks of arrays by layer, few enough tokens at a time.

    Args:
        logits: (T, E) floats, or bfloat16 as its bits in uint16, of each layer.
        experts, weights: (T, K) of each layer.
        columns: of Block, (T,) each; where left out, the tokens are one text from its start, and a
            text is one forward.
        noted: counts the float64 values that float32 does not hold.
    """
    arrays = experts if logits is None else logits
    assert arrays is not None
    T, E = len(arrays[0]), model.n_experts
    for name, values in columns.items():
        if values.shape != (T,):
            raise InvalidOption(f"{where}: {name} of shape {values.shape}; expected ({T},)")
    sequence = columns.get("sequence", np.zeros(T, np.int64))
    order = np.argsort(sequence, kind="stable")
    place = np.empty(T, np.int64)
    place[order] = np.arange(T) - np.searchsorted(sequence[order], sequence[order])
    usual = {"sequence": sequence, "position": place, "forward": sequence}
    whole = {**usual, "decode": np.zeros(T, np.bool_), "token_id": np.full(T, -1), **columns}
    step = E * max(1, MOST_VALUES // (len(model.layers) * E * E))
    for start in range(0, T, step):
        rows = slice(start, start + step)
        chosen, given = (
            None if of is None else np.stack([array[rows] for array in of])
            for of in (experts, weights)
        )
        wide = None if logits is None else _float32([array[rows] for array in logits], noted)
        part = {name: values[rows] for name, values in whole.items()}
        yield Block(where, experts=chosen, weights=given, logits=wide, **part)


def _float32(arrays: list[NDArray[Any]], noted: dict[str, Any] | None) -> NDArray[np.float32]:
    """(L, T, E); exact but for float64, whose values that are not are counted."""
    values = np.stack(arrays)
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        wide = values.astype(np.float32)
    if noted is not None and values.dtype.itemsize > 4:
        rounded = int(((wide != values) & ~np.isnan(values)).sum())
        if rounded:
            noted["values_rounded"] = noted.get("values_rounded", 0) + rounded
    return wide


@dataclass(frozen=True)
class Told:
    """What the user says of a trace; None is left to the trace.

    Attributes:
        layers: decoder layers with a router, rising.
        n_experts, top_k, norm_topk_prob, scoring: as in ModelInfo.
        model: its name.
    """

    layers: tuple[int, ...] | None = None
    n_experts: int | None = None
    top_k: int | None = None
    model: str | None = None
    norm_topk_prob: bool = False
    scoring: str = "softmax"

    def info(self, where: object, name: str = "unknown", **found: Any) -> ModelInfo:
        """The model, from what was found and what the user says.

        Args:
            where: the trace, for errors.
            found: of layers, n_experts and top_k those that the trace tells.

        Raises:
            InvalidOption: a fact is missing, or the two differ.
            CorruptTrace: no model has such routers.
        """
        facts: dict[str, Any] = {}
        for fact, option in _FACTS.items():
            told, there = getattr(self, fact), found.get(fact)
            if told is None and there is None:
                raise InvalidOption(f"{where}: does not tell {fact}; give {option}")
            if told is not None and there not in (None, told):
                raise InvalidOption(f"{where}: has {fact} {there}, {option} says {told}")
            facts[fact] = there if told is None else told
        facts |= {"name": self.model or name, "class_name": found.get("class_name", "unknown")}
        facts |= {"norm_topk_prob": self.norm_topk_prob, "scoring": self.scoring}
        try:
            model = msgspec.convert({**facts, "revision": None, "dtype": "unknown"}, ModelInfo)
        except msgspec.ValidationError as error:
            raise CorruptTrace(f"{where}: {error}") from None
        if list(model.layers) != sorted({*model.layers}) or model.top_k > model.n_experts:
            raise CorruptTrace(
                f"{where}: layers {model.layers}, top {model.top_k} of {model.n_experts} experts; "
                "expected rising layers, and no more than all experts"
            )
        return model


def regular(folder: Path, name: str) -> Path:
    """A file inside a folder, that may be opened if it is there.

    Raises:
        CorruptTrace: it is no regular file, or a link out of the folder.
    """
    why = refused(folder, name)
    if why is not None:
        raise CorruptTrace(f"{folder / name}: {why}")
    return folder / name


def lines_of(path: Path, most: int) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that hold something, with their place in words.

    Raises:
        CorruptTrace: a line is longer than `most` bytes.
    """
    with path.open("rb") as file:
        for number in count(1):
            line, where = file.readline(most + 1), f"{path}, line {number:,}"
            if len(line) > most:
                raise CorruptTrace(f"{where}: is longer than {most:,} bytes")
            if not line:
                return
            if line.strip():
                yield where, line
