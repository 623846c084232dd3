"""Identity: which token a row is about, and whether two files speak of the same tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.fold import mix
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.schema import PHASES


@dataclass(frozen=True, eq=False)
class Identity:
    """What T rows of one rank say of their token.

    Attributes:
        sequence, position, forward: (T,) int64.
        token_id: (T,) int64, -1 where withheld.
        phase: (T,) int64, index into PHASES; -1 if unknown.
        unknown_phases: phases that PHASES does not have, as read.
    """

    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    forward: NDArray[np.int64]
    token_id: NDArray[np.int64]
    phase: NDArray[np.int64]
    unknown_phases: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sequence)

    @classmethod
    def join(cls, parts: "Sequence[Identity]") -> "Identity":
        """Rows of several parts, in order."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*map(_columns, parts), strict=True)
        sequence, position, forward, token_id, phase = map(np.concatenate, columns)
        return cls(sequence, position, forward, token_id, phase)

    def words(self, row: int) -> str:
        """A row's token in words."""
        return f"sequence {self.sequence[row]} position {self.position[row]}"

    def sorted(self) -> "Identity":
        """The rows by sequence, position and forward."""
        order = np.lexsort((self.forward, self.position, self.sequence))
        sequence, position, forward, token_id, phase = (c[order] for c in _columns(self))
        return Identity(sequence, position, forward, token_id, phase)

    def digest(self) -> bytes:
        """Equal for equal sets of (sequence, position, forward)."""
        rows = self.sorted()
        key = np.stack([rows.sequence, rows.position, rows.forward])
        return hashlib.sha256(key.tobytes()).digest()

    def fingerprint(self) -> int | None:
        """Of the tokens at their places, in any order; those of parts add up modulo 2^64.

        None if a token is withheld: then the places may be those of other texts.
        """
        if (self.token_id < 0).any():
            return None
        return int(mix(self.sequence, self.position, self.token_id).sum(dtype=np.uint64))

    def spans(self) -> NDArray[np.int64]:
        """(S, 3): each sequence with its first and its last position."""
        rows = self.sorted()
        if not len(rows):
            return np.zeros((0, 3), np.int64)
        begins = np.flatnonzero(np.append(True, rows.sequence[1:] != rows.sequence[:-1]))
        ends = np.append(begins[1:], len(rows)) - 1
        return np.stack([rows.sequence[begins], rows.position[begins], rows.position[ends]], axis=1)

    def repeated(self) -> str | None:
        """A token that is there twice in one forward, in words; None if there is none."""
        rows = self.sorted()
        same = _same(rows, rows.forward)
        return rows.words(int(np.argmax(same))) if same.any() else None

    def revisits(self) -> int:
        """Rows at a (sequence, position) that another forward had before."""
        return int(_same(self.sorted()).sum())

    def difference(self, expected: "Identity") -> str | None:
        """First way in which these rows differ from the tokens expected; None if they agree.

        The order of rows is free.
        """
        mine, theirs = _columns(self), _columns(expected)
        if all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True)):
            return None
        rows, tokens = self.sorted(), expected.sorted()
        n = min(len(rows), len(tokens))
        differs = (rows.sequence[:n] != tokens.sequence[:n]) | (
            rows.position[:n] != tokens.position[:n]
        )
        if differs.any() or len(rows) != len(tokens):
            at = int(np.argmax(differs)) if differs.any() else n
            has = rows.words(at) if at < len(rows) else "no more rows"
            wants = tokens.words(at) if at < len(tokens) else "no more tokens"
            return f"{len(rows):,} rows for {len(tokens):,} tokens; {has}, tokens has {wants}"
        for name in ("forward", "token_id", "phase"):
            found, wanted = getattr(rows, name), getattr(tokens, name)
            if not np.array_equal(found, wanted):
                at = int(np.argmax(found != wanted))
                return f"{rows.words(at)}: {name} {found[at]}, tokens says {wanted[at]}"
        return None


def identity_of(table: pa.Table | pa.RecordBatch) -> Identity:
    """Identity of the rows of a routing or tokens shard."""
    phase = table.column("phase")
    if isinstance(phase, pa.ChunkedArray):
        phase = phase.unify_dictionaries().combine_chunks()
    if isinstance(phase, pa.ChunkedArray):  # combine_chunks of no chunks
        phase = pa.DictionaryArray.from_arrays(pa.array([], pa.int8()), pa.array([], pa.string()))
    names = phase.dictionary.to_pylist()
    codes = np.array([*(PHASES.index(n) if n in PHASES else -1 for n in names), -1])
    index = values_of(phase.indices.fill_null(-1)).astype(np.int64)
    return Identity(
        sequence=values_of(table.column("sequence")).astype(np.int64),
        position=values_of(table.column("position")).astype(np.int64),
        forward=values_of(table.column("forward")).astype(np.int64),
        token_id=values_of(table.column("token_id").fill_null(-1)).astype(np.int64),
        phase=codes[index],
        unknown_phases=tuple(n for n in names if n not in PHASES),
    )


def _columns(rows: Identity) -> tuple[NDArray[np.int64], ...]:
    return rows.sequence, rows.position, rows.forward, rows.token_id, rows.phase


def _same(rows: Identity, *more: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(T,) bool: rows whose sequence and position, and more, are those of the row before."""
    same = np.zeros(len(rows), dtype=np.bool_)
    same[1:] = True
    for column in (rows.sequence, rows.position, *more):
        same[1:] &= column[1:] == column[:-1]
    return same
