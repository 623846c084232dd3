import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from bhlog.capture.contract.arrays import arrow_of, values_of

TYPES = [
    pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.int8(), pa.int16(), pa.int32(),
    pa.int64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(),
]  # fmt: skip


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_values_are_those_that_arrow_gives(kind):
    values = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1, 0], dtype=kind.to_pandas_dtype())
    whole = pa.array(values, kind)
    for column in (whole, whole.slice(3, 5), whole.slice(10), pa.array([], kind)):
        expected = column.to_numpy(zero_copy_only=False)
        assert values_of(column).dtype == expected.dtype
        np.testing.assert_array_equal(values_of(column), expected)
    for chunks in ([], [whole], [whole.slice(2, 3), whole.slice(0, 0), whole]):
        column = pa.chunked_array(chunks, kind)
        assert values_of(column).dtype == values.dtype
        assert values_of(column).tolist() == column.to_pylist()


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 8, 9])
def test_arrays_become_columns(kind, n):
    values = (np.arange(2 * n) % 3).astype(kind.to_pandas_dtype())[::2]
    column = arrow_of(values)
    column.validate(full=True)
    assert column.equals(pa.array(values, kind))


def test_one_chunk_is_not_copied():
    column = pa.array(np.arange(5))
    assert values_of(column).ctypes.data == column.buffers()[1].address


@pytest.mark.parametrize("values", [[1, None], [True, None]])
def test_a_missing_value_is_an_error(values):
    with pytest.raises(pa.ArrowInvalid, match="1 of 2 values are missing"):
        values_of(pa.array(values))


def test_pandas_is_not_imported():
    code = (
        "import sys; import pyarrow as pa; from bhlog.capture.contract.arrays import values_of; "
        "data = [None, pa.py_buffer(bytes(8))]; "  # pa.array would import it
        "print([values_of(pa.Array.from_buffers(kind, 2, data)).tolist() "
        "for kind in (pa.int32(), pa.float32(), pa.bool_())], 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[0, 0], [0.0, 0.0], [False, False]] False"
