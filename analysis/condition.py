"""Conditions in SQL on the rows of a log, such as phase = 'decode' AND position < 100."""

import polars as pl
import pyarrow as pa

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.schema import routing_schema


def condition_columns(where: str) -> list[str]:
    """Columns of the routing shards that a condition in SQL reads.

    Raises:
        InvalidOption: it cannot be read, or there is no such column.
    """
    return _condition(where)[1]


def _condition(where: str) -> tuple[pl.Expr, list[str]]:
    try:
        expression = pl.sql_expr(where)
        names = expression.meta.root_names()
    except pl.exceptions.PolarsError as error:
        raise InvalidOption(
            f"where: cannot read {where!r} ({error}); expected a condition in SQL, such as "
            "phase = 'decode' AND position < 100"
        ) from error
    known = routing_schema(1).names
    for name in names:
        if name not in known:
            raise InvalidOption(f"where: no column '{name}'; columns are {', '.join(known)}")
    return expression, [*dict.fromkeys(names)]  # a column may stand there twice


def matches(rows: pa.RecordBatch, where: str) -> pa.Array:
    """(T,) bool: rows that a condition in SQL keeps.

    Raises:
        InvalidOption: it does not fit the columns, or is no condition.
    """
    expression, names = _condition(where)
    frame = pl.DataFrame(pl.from_arrow(rows.select(names)))
    try:
        mask = frame.select(expression.alias("mask"))["mask"]
    except pl.exceptions.PolarsError as error:
        raise InvalidOption(f"where: {where!r} does not fit the columns ({error})") from error
    if mask.dtype != pl.Boolean:
        raise InvalidOption(f"where: {where!r} is {mask.dtype}, expected a condition")
    return mask.to_arrow()
