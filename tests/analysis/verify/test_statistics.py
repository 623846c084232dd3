import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.verify.statistics import statistics_problem
from bhlog.capture.contract.schema import shard_name
from tests.analysis.verify.damage import errors
from tests.synthetic import write_run


def test_statistics_that_leave_rows_out_are_an_error(tmp_path):
    """By them SQL would skip row groups that hold what is asked for."""
    run = write_run(tmp_path / "run", layers=(0, 1), n_sequences=2, length=5, n_shards=1)
    name = shard_name(0, 0)
    for folder in ("routing", "tokens"):
        path = run / folder / name
        data = bytearray(path.read_bytes())
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        for match in re.finditer(rb"\x04\x04\0\0\0", data):  # four bytes: position 4, the last
            if match.start() > footer:
                data[match.start() + 1] = 2
        path.write_bytes(data)
    details = [detail for check, where, detail in errors(run) if (check, where) == ("rows", name)]
    told = "by its footer, position goes from 0 to 2, but from 0 to 4 in its rows"
    assert sum(told in detail for detail in details) == 3  # tokens, and a row group a layer


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ({"a": [1, 2, 3], "b": ["x", "y", None]}, None),
        ({"a": [2, 2], "b": ["y", None]}, None),  # bounds may be wide
        ({"a": [0, 2, 3], "b": ["x", "y", None]}, "a goes from 1 to 3, but from 0 to 3"),
        ({"a": [1, 2, 4], "b": ["x", "y", None]}, "a goes from 1 to 3, but from 1 to 4"),
        ({"a": [1, 2, 3], "b": ["x", "z", None]}, "b goes from x to y, but from x to z"),
        ({"a": [1, 2, 3], "b": ["x", None, None]}, "b lacks 1 values, but lacks 2"),
        ({"c": [9]}, None),
    ],
)
def test_statistics_are_held_against_rows(rows, problem):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1, 2, 3], "b": ["x", "y", None]}), sink)
    group = pq.read_metadata(pa.BufferReader(sink.getvalue())).row_group(0)
    assert statistics_problem(group, pa.table(rows)) == problem
