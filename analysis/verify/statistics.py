"""Whether a footer's statistics are of the rows: SQL skips row groups by them."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def statistics_problem(group: Any, rows: pa.RecordBatch | pa.Table) -> str | None:
    """What the statistics of a row group say, and what is so instead; None if they agree.

    Args:
        group: of a pyarrow FileMetaData.
        rows: of that group, all or some columns of it.
    """
    for at in range(group.num_columns):
        name, told = group.column(at).path_in_schema, group.column(at).statistics
        if told is None or name not in rows.schema.names:
            continue
        values = rows.column(name)
        if pa.types.is_dictionary(values.type):
            try:
                values = values.cast(values.type.value_type)
            except pa.ArrowException:
                return f"{name} has indices beyond its dictionary"
        if told.has_null_count and told.null_count != values.null_count:
            return f"{name} lacks {told.null_count:,} values, but lacks {values.null_count:,}"
        ends = pc.min_max(values).as_py()
        if not told.has_min_max or ends["min"] is None:
            continue
        try:
            low, high = told.min, told.max
        except ValueError:
            return f"{name} has statistics that are no text"
        if not (low <= ends["min"] and ends["max"] <= high):
            return f"{name} goes from {low} to {high}, but from {ends['min']} to {ends['max']}"
    return None
