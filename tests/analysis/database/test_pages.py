"""What SQL reads of a shard is checked by its pages' checksums, chunk by chunk, and no more."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.database.connection import connect
from bhlog.analysis.database.pages import chunks_of, page_error
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import CorruptShard
from tests.synthetic import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "demo"
    return write_run(folder, n_experts=32, n_sequences=4, length=200, n_shards=2)


def flipped(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def ask(run, query):
    with connect(open_log(run)) as database:
        return [row for batch in database.batches(query)[1] for row in batch.to_pylist()]


def shards(run):
    return [("routing", p) for p in sorted((run / "routing").iterdir())] + [
        ("tokens", p) for p in sorted((run / "tokens").iterdir())
    ]


@pytest.mark.parametrize("folder", ["routing", "tokens"])
def test_a_flip_in_any_column_chunk_is_refused_in_one_line_that_names_the_file(
    run, tmp_path, folder, capsys
):
    rng = np.random.default_rng(0)
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    path = sorted((broken / folder).iterdir())[1]
    whole = path.read_bytes()
    chunks = chunks_of(pq.read_metadata(path))
    assert len(chunks) >= 8
    for chunk in chunks:
        flipped(path, chunk.end - 1 - int(rng.integers(3)), int(rng.integers(8)))
        with pytest.raises(CorruptShard) as error:
            ask(broken, f"SELECT {chunk.column} FROM {folder}")
        assert f"{path}: row group {chunk.group} " in str(error.value)
        assert f"column {chunk.column}:" in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(whole)
    flipped(path, chunks[-1].end - 1)
    with pytest.raises(SystemExit) as stop:
        main(["sql", str(broken), f"SELECT {chunks[-1].column} FROM {folder}"])
    errors = capsys.readouterr().err
    assert stop.value.code == 1 and errors.count("\n") == 1 and str(path) in errors


def test_a_flip_in_any_byte_of_the_pages_is_seen(run):
    for _, path in shards(run)[::2]:
        data = path.read_bytes()
        for chunk in chunks_of(pq.read_metadata(path)):
            whole = bytearray(data[chunk.start : chunk.end])
            assert page_error(memoryview(whole), chunk) is None
            for at in range(0, len(whole), 1 if len(whole) < 300 else 997):
                for bit in range(8):
                    whole[at] ^= 1 << bit
                    # bits of a header that nothing reads, as of its smallest and largest values
                    if page_error(memoryview(whole), chunk) is None:
                        assert answers_the_same(data, chunk, bytes(whole))
                    whole[at] ^= 1 << bit


def answers_the_same(data, chunk, changed) -> bool:
    def column(file):
        parquet = pq.ParquetFile(pa.BufferReader(file), page_checksum_verification=True)
        return parquet.read_row_group(chunk.group, columns=[chunk.column])

    other = data[: chunk.start] + changed + data[chunk.end :]
    try:
        return column(data).equals(column(other))
    except (OSError, pa.ArrowException, SystemError):  # refused where it is decoded
        return True


def test_columns_that_are_not_asked_for_may_be_broken(run, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    path = sorted((broken / "routing").iterdir())[0]
    for chunk in chunks_of(pq.read_metadata(path)):
        if chunk.column == "weights":
            flipped(path, chunk.end - 1)
    query = "SELECT layer, avg(n_selected) AS mean FROM routing GROUP BY layer"
    assert ask(broken, query)
    with pytest.raises(CorruptShard):
        ask(broken, "SELECT weights FROM routing")


@pytest.mark.parametrize("n_experts", [8, 64])
@pytest.mark.parametrize("length", [2, 500, 5000])
def test_what_is_read_is_what_was_written(tmp_path, n_experts, length):
    run = write_run(
        tmp_path / "demo", n_experts=n_experts, n_sequences=2, length=length, n_shards=1, top_k=4
    )
    expected = pq.read_table(run / "routing" / "rank00000-00000.parquet")
    with connect(open_log(run), threads=2) as database:
        for column in expected.column_names:
            found = database.sql(f"SELECT {column} FROM routing").to_arrow_table()
            assert found[column].to_pylist() == expected[column].to_pylist(), column
        table = database.sql("SELECT * EXCLUDE (run) FROM routing").to_arrow_table()
        assert table.to_pylist() == expected.to_pylist()


def test_a_file_without_checksums_is_read_with_one_warning(run, tmp_path, capsys):
    plain = tmp_path / "plain"
    shutil.copytree(run, plain)
    for _, path in shards(plain):
        pq.write_table(pq.read_table(path), path)
    with pytest.warns(UserWarning, match="have no checksums") as seen:
        rows = ask(plain, "SELECT sum(len(logits)) AS n FROM routing JOIN tokens USING (position)")
    assert rows and len(seen) == 1 and str(plain) in str(seen[0].message)
    with pytest.raises(SystemExit):
        main(["sql", str(plain), "SELECT avg(n_selected) FROM routing"])
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("bhlog: ") and "no checksums" in errors


def test_pages_of_which_some_lost_their_checksum_are_refused(run):
    path = sorted((run / "routing").iterdir())[0]
    data = path.read_bytes()
    chunk = next(c for c in chunks_of(pq.read_metadata(path)) if c.column == "position")
    pages = memoryview(data)[chunk.start : chunk.end]
    assert page_error(pages, chunk) is None
    assert page_error(pages[:-1], chunk)
    assert page_error(memoryview(b""), chunk)
    assert page_error(pages, chunk._replace(n_values=chunk.n_values + 1))
    assert page_error(pages, chunk._replace(n_bytes=chunk.n_bytes - 1))
    assert page_error(pages, chunk._replace(encodings=("PLAIN",)))


@pytest.mark.parametrize(
    "garbage", [b"\x1c" * 5000, b"\xff" * 100, b"\x15\x00", b"\x00", b"\x18\xff"]
)
def test_a_header_that_is_none_is_said_to_be_none(run, garbage):
    path = sorted((run / "routing").iterdir())[0]
    chunk = chunks_of(pq.read_metadata(path))[0]
    assert page_error(memoryview(garbage), chunk) == "page 0 has no readable header"
