"""Conditions in SQL on the rows of a log, such as phase = 'decode' AND source = 'notes.txt'."""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

import numpy as np
import polars as pl
import pyarrow as pa

from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.schema import COLUMNS

TOKEN = ("sequence", "position", "forward")  # which token of a shard a row is about

_ROUTING = tuple(column.name for column in COLUMNS["routing"])
_TOKENS = tuple(column.name for column in COLUMNS["tokens"])


@dataclass(frozen=True)
class Condition:
    """A condition on columns of the routing shards, and of the tokens shards beside them.

    Attributes:
        text: in SQL.
        columns: columns of the routing shards that it needs.
        of_tokens: columns that only the tokens shards have.
    """

    text: str
    columns: tuple[str, ...]
    of_tokens: tuple[str, ...]

    def matches(self, rows: pa.RecordBatch, tokens: "ShardTokens | None" = None) -> pa.Array:
        """(T,) bool: rows that it keeps; null where it cannot tell.

        Args:
            rows: with its columns.
            tokens: of the rows' shard; needed if it asks for columns of tokens.

        Raises:
            InvalidOption: it does not fit the columns, or is no condition.
        """
        frame = pl.DataFrame(pl.from_arrow(rows.select(list(self.columns))))
        if self.of_tokens:
            assert tokens is not None
            frame = frame.hstack(tokens.beside(rows))
        frame = frame.with_columns(pl.selectors.categorical().cast(pl.String))
        try:
            mask = frame.select(pl.sql_expr(self.text).alias("mask"))["mask"]
        except pl.exceptions.PolarsError as error:
            raise InvalidOption(
                f"where: {self.text!r} does not fit the columns ({_line(error)})"
            ) from error
        if mask.dtype != pl.Boolean:
            raise InvalidOption(f"where: {self.text!r} is {mask.dtype}, expected a condition")
        return mask.to_arrow()


@lru_cache(maxsize=64)
def condition(where: str) -> Condition:
    """A condition from its text.

    Raises:
        InvalidOption: it cannot be read, or there is no such column.
    """
    try:
        names = list(dict.fromkeys(pl.sql_expr(where).meta.root_names()))
    except pl.exceptions.PolarsError as error:
        raise InvalidOption(
            f"where: cannot read {where!r} ({_line(error)}); expected a condition in SQL, such as "
            "phase = 'decode' AND position < 100"
        ) from error
    known = [*dict.fromkeys((*_ROUTING, *_TOKENS))]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"columns: {', '.join(known)}"
            raise InvalidOption(f"where: no column '{name}'; {hint}")
    of_tokens = tuple(name for name in names if name not in _ROUTING)
    columns = tuple(name for name in names if name in _ROUTING)
    if of_tokens:
        columns = tuple(dict.fromkeys((*columns, *TOKEN)))
    return Condition(where, columns, of_tokens)


def condition_columns(where: str) -> list[str]:
    """Columns that a condition in SQL reads, of routing and of tokens.

    Raises:
        InvalidOption: it cannot be read, or there is no such column.
    """
    condition(where)
    return list(dict.fromkeys(pl.sql_expr(where).meta.root_names()))


class ShardTokens:
    """Columns of a tokens shard, to be laid beside rows of the routing shard of the same name.

    Args:
        tokens: rows of the tokens shard, with TOKEN and the columns that are asked for.
    """

    def __init__(self, tokens: pa.Table) -> None:
        self._frame = pl.DataFrame(pl.from_arrow(tokens)).with_columns(
            pl.selectors.categorical().cast(pl.String)
        )
        self._keys = [self._frame[name].to_numpy() for name in TOKEN]
        self._asked = [name for name in self._frame.columns if name not in TOKEN]

    def beside(self, rows: pa.RecordBatch) -> pl.DataFrame:
        """The columns asked for, row by row; nulls for rows whose token is not in the shard."""
        keys = [values_of(rows.column(name)) for name in TOKEN]
        if not rows.num_rows:
            return self._frame.select(self._asked).clear()
        # rows of a layer are in the order of the tokens, as capture writes them
        first = np.flatnonzero(
            np.logical_and.reduce([mine == k[0] for mine, k in zip(self._keys, keys, strict=True)])
        )
        if len(first):
            part = slice(int(first[0]), int(first[0]) + rows.num_rows)
            if all(np.array_equal(m[part], k) for m, k in zip(self._keys, keys, strict=True)):
                return self._frame[part].select(self._asked)
        wanted = pl.DataFrame(dict(zip(TOKEN, keys, strict=True)))
        known = self._frame.unique(TOKEN, keep="first", maintain_order=True)
        found = wanted.join(known, on=TOKEN, how="left", maintain_order="left")
        return found.select(self._asked)


def _line(error: Exception) -> str:
    """A library's message in one line."""
    return " ".join(str(error).split())
