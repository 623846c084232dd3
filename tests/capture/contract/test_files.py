import re

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from pyarrow.lib import ArrowException

from bhlog.capture.contract.files import seal, write_part, write_shard
from bhlog.capture.contract.schema import routing_schema, tokens_schema
from tests.synthetic import write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", layers=(2, 5), n_experts=8, top_k=2, n_shards=1)


def shard_of(run, folder="routing"):
    return run / folder / "rank00000-00000.parquet"


def test_a_row_group_holds_one_layer_and_says_so(run):
    metadata = pq.read_metadata(shard_of(run))
    column = metadata.schema.names.index("layer")
    found = [metadata.row_group(i).column(column).statistics for i in range(2)]
    assert [(s.min, s.max) for s in found] == [(2, 2), (5, 5)]


def test_columns_are_those_of_the_schema(run):
    assert pq.read_schema(shard_of(run)).equals(routing_schema(8), check_metadata=True)
    assert pq.read_schema(shard_of(run, "tokens")).equals(tokens_schema(), check_metadata=True)


def test_logits_are_byte_streams_without_a_dictionary(run):
    group = pq.read_metadata(shard_of(run)).row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        assert column.compression == "ZSTD"
        if column.path_in_schema.startswith(("logits", "weights")):
            assert "BYTE_STREAM_SPLIT" in column.encodings
            assert not column.has_dictionary_page


def test_float32_survives_bit_for_bit_nan_included(tmp_path):
    l = np.random.default_rng(0).integers(0, 2**32, (1, 1, 50, 8), np.uint32).view(np.float32)
    l[0, 0, 0] = np.nan
    run = write_run(
        tmp_path / "run", layers=(0,), n_experts=8, top_k=2, n_sequences=1, n_shards=1, logits=l
    )
    read = pq.read_table(shard_of(run))["logits"].combine_chunks().flatten().to_numpy()
    assert read.tobytes() == l.tobytes()


def test_duckdb_polars_and_pandas_read_the_same_rows(run):
    path = shard_of(run)
    table = pq.read_table(path)
    expected = table["experts"].to_pylist(), table["logits"].to_pylist()
    relation = duckdb.sql(f"SELECT experts, logits FROM '{path}'").fetchall()
    assert [row[0] for row in relation] == expected[0]
    assert [list(row[1]) for row in relation] == expected[1]
    frame = pl.read_parquet(path)
    assert frame["experts"].to_list() == expected[0]
    assert frame["logits"].to_list() == expected[1]
    pandas = table.to_pandas()
    assert [list(row) for row in pandas["experts"]] == expected[0]


def test_a_flipped_byte_in_any_page_is_noticed(run):
    data = shard_of(run).read_bytes()
    group = pq.read_metadata(shard_of(run)).row_group(0)
    for i in range(group.num_columns):
        column = group.column(i)
        start = column.dictionary_page_offset or column.data_page_offset
        broken = bytearray(data)
        broken[start + column.total_compressed_size - 1] ^= 1  # the last byte of its last page
        path = run / "broken.parquet"
        path.write_bytes(broken)
        with pytest.raises((OSError, ArrowException)):
            pq.ParquetFile(path, page_checksum_verification=True).read()


def test_a_shard_has_its_name_only_once_it_is_whole(run, tmp_path):
    table = pq.read_table(shard_of(run, "tokens"))
    path = tmp_path / "rank00000-00000.parquet"
    part = write_part(path, [table])
    assert re.fullmatch(r"rank00000-00000\.parquet\.[0-9a-f]{8}\.part", part.name)
    assert not path.exists()
    seal(part)
    assert not part.exists() and pq.read_table(path).equals(table)


def test_two_that_write_one_shard_do_not_mix_and_the_last_wins_whole(run, tmp_path):
    table = pq.read_table(shard_of(run, "tokens"))
    path = tmp_path / "rank00000-00000.parquet"
    first, second = (write_part(path, [rows]) for rows in (table, table.slice(1)))
    assert first != second
    seal(second)
    seal(first)
    assert pq.read_table(path).equals(table)
    assert sorted(tmp_path.iterdir()) == [path, tmp_path / "run"]


def test_a_table_that_fails_leaves_no_file(run, tmp_path):
    table = pq.read_table(shard_of(run, "tokens"))

    def groups():
        yield table
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_shard(tmp_path / "rank00000-00000.parquet", groups())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_same_rows_make_the_same_bytes(tmp_path):
    first, second = (write_run(tmp_path / name) for name in ("a", "b"))
    assert shard_of(first).read_bytes() == shard_of(second).read_bytes()
