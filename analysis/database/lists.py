"""Columns of Arrow, lists above all, as numpy arrays and back: what functions of SQL work on."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


class ListColumn:
    """A list column in the making: rows are put in any order, those never put are NULL.

    What is put is kept as it is, so that one long list costs its own length and no other's.
    """

    def __init__(self, logits: pa.ListArray, dtype: type[np.generic]) -> None:
        self._sizes = np.zeros(len(logits), dtype=np.int64)
        self._put = np.zeros(len(logits), dtype=np.bool_)
        self._dtype = dtype
        self._pieces: list[tuple[Any, NDArray[Any]]] = []

    def put(
        self,
        rows: Any,
        values: NDArray[Any],
        sizes: int | NDArray[Any],
        known: bool | NDArray[np.bool_] = True,
    ) -> None:
        """Set rows to the first `sizes` of (T, K) values, or to NULL where they are not known."""
        self._sizes[rows] = sizes
        self._put[rows] = known
        self._pieces.append((rows, values))

    def to_arrow(self) -> pa.ListArray:
        offsets = np.concatenate([[0], np.cumsum(self._sizes)])
        flat = np.empty(int(offsets[-1]), dtype=self._dtype)
        for rows, values in self._pieces:
            place = np.arange(values.shape[1])
            inside = place < self._sizes[rows][:, None]
            if isinstance(rows, slice) and inside.all():
                flat[:] = values.ravel()
            else:
                flat[(offsets[:-1][rows][:, None] + place)[inside]] = values[inside]
        return pa.ListArray.from_arrays(
            pa.array(offsets.astype(np.int32)), pa.array(flat), mask=pa.array(~self._put)
        )


def logit_groups(logits: pa.ListArray, *keys: pa.Array) -> Iterator[tuple[Any, Any, NDArray[Any]]]:
    """(key, rows, (T, E) float32 logits) of each distinct key and number of experts.

    Rows whose logits are NULL or empty are in no group.
    """
    lengths = logits.value_lengths()
    offsets = logits.offsets.to_numpy()
    flat = logits.values.to_numpy(zero_copy_only=False)
    for (E, *key), rows in key_groups(len(logits), lengths, *keys):
        if E:
            starts = offsets[:-1][rows]
            if isinstance(rows, slice):
                x = flat[starts[0] : starts[0] + len(starts) * E].reshape(len(starts), E)
            else:
                x = flat[starts[:, None] + np.arange(E)]
            yield tuple(key), rows, x


def key_groups(n: int, *columns: pa.Array) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(key, rows) of each distinct combination of values; rows is a slice when there is but one."""
    if not n:
        return
    encoded = [column.dictionary_encode(null_encoding="encode") for column in columns]
    values = [column.dictionary.to_pylist() for column in encoded]
    if all(len(v) == 1 for v in values):
        yield tuple(v[0] for v in values), slice(None)
        return
    code = np.zeros(n, dtype=np.int64)
    for column, v in zip(encoded, values, strict=True):
        code = code * len(v) + column.indices.to_numpy(zero_copy_only=False)
    distinct, group = np.unique(code, return_inverse=True)
    for g in range(len(distinct)):
        rows = np.flatnonzero(group == g)
        yield tuple(c[int(rows[0])].as_py() for c in encoded), rows


def list_elements(lists: pa.ListArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and value of each element of a list column that is not NULL."""
    rows, values = lists.value_parent_indices(), lists.flatten()
    if values.null_count:
        rows, values = rows.filter(values.is_valid()), values.drop_null()
    arrays = (column.to_numpy(zero_copy_only=False).astype(np.int64) for column in (rows, values))
    return next(arrays), next(arrays)
