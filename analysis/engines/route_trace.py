"""route_trace: a CSV of the experts that an engine streamed, a row for each, as BigMoeOnEdge's.

Lines that begin with # tell the model and the bytes of each layer's experts. A row is a slot of a
token at a layer: turn, phase (0 for a prompt, which is one forward, 1 for a decoded token), step
(the place in the context), layer, slot by falling choice, expert, and its weight ("nan" where the
engine knew none). Other columns are about the engine's cache. Columns go by their names.

Before its last layer an engine may drop the prompt's tokens that it needs no output of: they have
no experts there, which is kept so.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bhlog.analysis.engines.trace import Block, Told, Trace, lines_of, regular
from bhlog.capture.contract.errors import CorruptTrace, one_line

MOST_LINE = 1 << 14
MOST_CELLS = 1 << 21  # of a forward, which is held
_COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight")
_FACT = re.compile(r"(\w+)=(\S+)")


def read(path: Path, told: Told) -> Trace:
    """A trace; the bytes of its experts are noted.

    Raises:
        CorruptTrace: a line is none of such a file, or a forward lacks experts; on the way, too.
    """
    lines = lines_of(regular(path.parent, path.name), MOST_LINE)
    facts: dict[str, str] = {}
    sizes: dict[int, int] = {}
    for where, line in lines:
        text = line.decode(errors="replace").strip()
        if not text.startswith("#"):
            break
        found = dict(_FACT.findall(text))
        if "layer" in found:
            layer, size = _whole(where, [found["layer"], found.get("expert_bytes", "")])
            sizes |= {layer: size} if size else {}
        else:
            facts |= found
    else:
        raise CorruptTrace(f"{path}: has no header; expected {','.join(_COLUMNS)},...")
    names = text.split(",")
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        raise CorruptTrace(f"{where}: no column {missing[0]}; expected {','.join(_COLUMNS)},...")
    counts = [_whole(str(path), [facts[n]])[0] if n in facts else None
              for n in ("n_expert", "n_expert_used")]  # fmt: skip
    model = told.info(
        path,
        facts.get("model", "unknown"),
        class_name=facts.get("arch", "unknown"),
        layers=tuple(sorted(sizes)) or None,
        n_experts=counts[0],
        top_k=counts[1],
    )
    places = [names.index(name) for name in _COLUMNS]
    blocks = _blocks(_cells(lines, places, len(names)), model.layers, model.top_k)
    noted = {"expert_bytes": {str(layer): size for layer, size in sorted(sizes.items())}}
    return Trace("route-trace", model, blocks, noted=noted if sizes else {})


def _whole(where: str, texts: list[str]) -> list[int]:
    """Whole numbers below 2^53.

    Raises:
        CorruptTrace: one is none.
    """
    for text in texts:
        if not (text.isascii() and text.isdigit()) or len(text) > 15:
            raise CorruptTrace(f"{where}: {one_line(text, 40)!r} is no whole number from 0 on")
    return [int(text) for text in texts]


def _cells(
    lines: Iterator[tuple[str, bytes]], places: list[int], width: int
) -> Iterator[tuple[str, list[int], float]]:
    """(place, turn to expert, weight) of each row."""
    for where, line in lines:
        texts = line.decode(errors="replace").strip().split(",")
        if len(texts) != width:
            raise CorruptTrace(f"{where}: {len(texts)} columns, the header has {width}")
        *whole, weight = (texts[place] for place in places)
        try:
            yield where, _whole(where, whole), float(weight)
        except ValueError:
            raise CorruptTrace(f"{where}: {one_line(weight, 40)!r} is no weight") from None


def _forwards(cells: Iterator[tuple[str, list[int], float]]) -> Iterator[list[Any]]:
    """The rows of each forward: of a decoded token, or of a prompt's tokens layer by layer."""
    held: list[Any] = []
    for cell in cells:
        turn, phase, step, layer, *_ = cell[1]
        if held:
            before = held[-1][1]
            if before[:2] != [turn, phase] or layer < before[3] or (phase and step != before[2]):
                yield held
                held = []
        held.append(cell)
        if len(held) > MOST_CELLS:
            raise CorruptTrace(f"{cell[0]}: a forward of more than {MOST_CELLS:,} rows")
    if held:
        yield held


def _blocks(
    cells: Iterator[tuple[str, list[int], float]], layers: tuple[int, ...], top_k: int
) -> Iterator[Block]:
    known = None  # whether weights are
    for number, held in enumerate(_forwards(cells)):
        where = held[0][0]
        turn, phase, step, layer, slot, expert = np.array([cell[1] for cell in held]).T
        given = np.array([cell[2] for cell in held])
        steps, row = np.unique(step, return_inverse=True)
        place = np.searchsorted(layers, layer)
        strange = (slot >= top_k) | (np.append(layers, -1)[place] != layer) | (phase > 1)
        if strange.any():
            at = int(np.argmax(strange))
            raise CorruptTrace(
                f"{held[at][0]}: phase {phase[at]}, layer {layer[at]}, slot {slot[at]}; expected "
                f"phase 0 or 1, one of {len(layers)} layers, and a slot below {top_k}"
            )
        experts = np.full((len(layers), len(steps), top_k), -1)
        weights = np.zeros(experts.shape)
        experts[place, row, slot], weights[place, row, slot] = expert, given
        used = experts >= 0
        n = used.sum(axis=2)
        n[-1, :-1] += np.where((n[-1, :-1] == 0) & (phase[0] == 0), top_k, 0)
        if used.sum() < len(held) or (n < top_k).any():
            raise CorruptTrace(
                f"{where}: the forward that begins here is not {top_k} experts for each token and "
                "layer, once each; if the file was cut off, remove its last lines from here on"
            )
        known = not np.isnan(given[0]) if known is None else known
        if (np.isnan(given) == known).any():
            raise CorruptTrace(f"{where}: some weights are nan, others are known")
        yield Block(
            where=where,
            sequence=np.full(len(steps), turn[0]),
            position=steps,
            forward=np.full(len(steps), number),
            decode=np.full(len(steps), phase[0] == 1),
            experts=experts,
            weights=weights if known else None,
        )
