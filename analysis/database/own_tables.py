"""Tables of the caller's that a query can join: polars, pandas or Arrow, as Arrow."""

import sys
from typing import Any

import polars as pl
import pyarrow as pa


def as_table(value: Any) -> pa.Table | None:
    """A polars, pandas or Arrow table as an Arrow table; None for anything else."""
    if isinstance(value, pl.LazyFrame):
        value = value.collect()
    if isinstance(value, pl.DataFrame):
        return value.to_arrow()
    if isinstance(value, pa.Table):
        return value
    if isinstance(value, pa.RecordBatch):
        return pa.Table.from_batches([value])
    pandas = sys.modules.get("pandas")  # nobody has a frame of it who has not imported it
    if pandas is not None and isinstance(value, pandas.DataFrame):
        return pa.Table.from_pandas(value, preserve_index=False)
    return None
