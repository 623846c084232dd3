"""Arrow columns as numpy arrays; Arrow's own way imports pandas wherever that is installed."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_FLOATS = {"halffloat": "float16", "float": "float32", "double": "float64"}  # as Arrow calls them


def values_of(column: pa.Array | pa.ChunkedArray) -> NDArray[Any]:
    """The values of a column of numbers or booleans, without a copy where they are in one chunk.

    Args:
        column: flat.

    Returns:
        (T,), read-only unless it is a copy.

    Raises:
        ArrowInvalid: a value is missing.
    """
    if column.null_count:
        raise pa.ArrowInvalid(f"{column.null_count} of {len(column)} values are missing")
    if pa.types.is_boolean(column.type):
        return values_of(column.cast(pa.uint8())).view(np.bool_)
    dtype = np.dtype(_FLOATS.get(str(column.type), str(column.type)))
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype, len(chunk), chunk.offset * dtype.itemsize)
        for chunk in chunks
        if len(chunk)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype), *parts])


def arrow_of(values: NDArray[Any]) -> pa.Array:
    """(T,) numbers or booleans as an Arrow column; numbers that are contiguous are not copied."""
    if values.dtype == np.bool_:
        bits = np.packbits(values, bitorder="little")
        return pa.Array.from_buffers(pa.bool_(), len(values), [None, pa.py_buffer(bits)])
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, data])
