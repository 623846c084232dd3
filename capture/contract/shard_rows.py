"""Rows of a shard, from columns."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.capture.contract.schema import PHASES


def identity(
    rank: int,
    token_id: NDArray[Any],
    phase: NDArray[np.int8],
    **numbers: NDArray[Any],
) -> dict[str, pa.Array]:
    """Columns that say who T rows are, the same at every layer.

    Args:
        token_id: (T,) int32, below 0 where it is unknown.
        phase: (T,), index into PHASES.
        numbers: (T,) uint32 sequence, position and forward.
    """
    return {
        **{name: pa.array(values) for name, values in numbers.items()},
        "rank": pa.array(np.full(len(phase), rank, dtype=np.uint16)),
        "token_id": pa.array(token_id, mask=token_id < 0),
        "phase": pa.DictionaryArray.from_arrays(phase, pa.array(PHASES)),
    }


def decided(
    schema: pa.Schema,
    layer: int,
    n: NDArray[np.uint16],
    experts: NDArray[np.uint16],
    weights: NDArray[np.float32],
    logits: NDArray[np.float32] | None = None,
) -> dict[str, pa.Array]:
    """Columns of what one layer decided for T rows.

    Args:
        schema: of the shard.
        n: (T,) experts of each row.
        experts, weights: (sum of n,), row after row.
        logits: (T, E), not copied; None for runs without.
    """
    offsets = np.zeros(len(n) + 1, dtype=np.int32)
    np.cumsum(n, out=offsets[1:])
    lists = {"experts": pa.array(experts), "weights": pa.array(weights)}
    columns = {
        name: pa.ListArray.from_arrays(pa.array(offsets), values, type=schema.field(name).type)
        for name, values in lists.items()
    }
    if logits is not None:
        flat, type = pa.array(logits.ravel()), schema.field("logits").type
        columns["logits"] = pa.FixedSizeListArray.from_arrays(flat, type=type)
    full = pa.array(np.full(len(n), layer, dtype=np.uint16))
    return {**columns, "layer": full, "n_selected": pa.array(n)}


def table(schema: pa.Schema, columns: dict[str, pa.Array]) -> pa.Table:
    """Rows of a shard, with nulls in the columns that are not given."""
    T = len(columns["rank"])
    found = [
        columns[field.name] if field.name in columns else pa.nulls(T, field.type)
        for field in schema
    ]
    return pa.table(found, schema=schema)
