"""Every value that SQL can give, in every form that a result can take."""

import csv
import io
import json
import math
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.cells import spelled_out
from bhlog.analysis.database.connection import connect
from bhlog.analysis.database.result import print_result, write_result
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from tests.synthetic import write_run

# name: (SQL, what a table shows, the value in JSON)
VALUES = {
    "text": ("'a|b'", "a|b", "a|b"),
    "unicode": ("'naïve ☃ 日本'", "naïve ☃ 日本", "naïve ☃ 日本"),
    "quoted": ("'say \"x\", y'", 'say "x", y', 'say "x", y'),
    "empty": ("''", "", ""),
    "escape": ("chr(27) || '[31mred'", "\\x1b[31mred", "\x1b[31mred"),
    "bidi": ("'a' || chr(8238)", "a\\u202e", "a\u202e"),
    "nothing": ("NULL::INTEGER", "-", None),
    "nan": ("'nan'::DOUBLE", "nan", None),
    "infinite": ("'-inf'::FLOAT", "-inf", None),
    "large": ("1e300", "1e+300", 1e300),
    "thousands": ("12345.678::DOUBLE", "12,345.7", 12345.678),
    "whole": ("sum(3)", "3", 3),
    "unsigned": ("18446744073709551615::UBIGINT", "18,446,744,073,709,551,615", 2**64 - 1),
    "list": ("[1.5, NULL, 'nan'::DOUBLE]", "1.5 - nan", [1.5, None, None]),
    "no_list": ("[]::INTEGER[]", "", []),
    "struct": ("{'a': 1, 'b': [2]}", "{'a': 1, 'b': [2]}", {"a": 1, "b": [2]}),
    "day": ("DATE '2026-01-02'", "2026-01-02", "2026-01-02"),
    "interval": ("INTERVAL 3 MONTH", "3 months", "3 months"),
    "bytes": (r"'\x00a'::BLOB", "\\x00a", "\\x00a"),
    "bits": ("'101'::BIT", "101", "101"),
    "flag": ("true", "yes", True),
}


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("result") / "demo", n_sequences=1, length=2, n_shards=1)
    with connect(open_log(run)) as opened:
        yield opened


def printed(capsys, database, query, result_format, max_rows=1000):
    left_out = print_result(*database.batches(query), result_format, max_rows=max_rows)
    return capsys.readouterr().out, left_out


@pytest.mark.parametrize("name", VALUES)
def test_a_value_in_every_format(name, capsys, tmp_path, database):
    sql, shown, value = VALUES[name]
    query = f"SELECT {sql} AS value, 1 AS one"
    table = printed(capsys, database, query, "table")[0].splitlines()
    assert table[1].removesuffix("1").strip() == shown
    markdown = printed(capsys, database, query, "markdown")[0].splitlines()
    assert markdown[2] == f"| {shown} | 1 |".replace("a|b", "a\\|b")
    assert json.loads(printed(capsys, database, query, "json")[0]) == [{"value": value, "one": 1}]
    header, row = csv.reader(io.StringIO(printed(capsys, database, query, "csv")[0]))
    assert header == ["value", "one"]
    if isinstance(value, list | dict):
        assert json.loads(row[0]) == value
    elif isinstance(value, str):
        assert row[0] == spelled_out(value)  # what could steer a terminal is harmless
    else:
        plain = {"nothing": "", "nan": "NaN", "infinite": "-inf", "flag": "true"}
        assert row[0] == plain.get(name, row[0]) and (name in plain or json.loads(row[0]) == value)
    out = tmp_path / "x.parquet"
    assert write_result(*database.batches(query), "parquet", out) == 1
    (kept,) = pq.read_table(out)["value"].to_pylist()
    if isinstance(value, list) and value:
        assert kept[:2] == value[:2] and math.isnan(kept[2])
    elif value is None:
        assert str(kept) in ("None", "nan", "-inf")
    else:
        assert kept == value or str(kept) == value


def test_integers_beyond_64_bits_are_whole(capsys, database):
    query = "SELECT 170141183460469231731687303715884105727 AS n"
    assert json.loads(printed(capsys, database, query, "json")[0]) == [{"n": 2**127 - 1}]
    assert f"{2**127 - 1:,}" in printed(capsys, database, query, "table")[0]


def test_columns_that_share_a_name_are_told_apart(capsys, database):
    query = "SELECT * FROM (VALUES (1, 2, 3), (4, 5, 6)) AS t(a, a, a_1) ORDER BY 3 DESC"
    assert json.loads(printed(capsys, database, query, "json")[0]) == [
        {"a": 4, "a_1": 5, "a_1_1": 6},
        {"a": 1, "a_1": 2, "a_1_1": 3},
    ]
    joined = "FROM routing JOIN tokens USING (run, rank, sequence, position)"
    names = printed(capsys, database, joined, "csv")[0].splitlines()[0].split(",")
    assert len(names) == len(set(names)) and "token_id_1" in names


@pytest.mark.parametrize("result_format", ["table", "json", "csv", "markdown", "parquet"])
def test_a_result_without_rows_has_its_columns(result_format, tmp_path, database):
    out = tmp_path / "x"
    query = "SELECT layer, logits, INTERVAL 1 DAY AS i FROM routing WHERE false"
    assert write_result(*database.batches(query), result_format, out) == 0
    if result_format == "parquet":
        assert pq.read_table(out).column_names == ["layer", "logits", "i"]
    elif result_format == "json":
        assert json.loads(out.read_text()) == []
    else:
        assert out.read_text().replace("|", " ").replace(",", " ").split()[:3] == [
            "layer", "logits", "i",
        ]  # fmt: skip


def test_what_a_table_leaves_out_is_counted(capsys, database):
    query = "SELECT * FROM range(100000) AS t(n)"
    for result_format in ("table", "markdown"):
        text, left_out = printed(capsys, database, query, result_format, max_rows=3)
        assert left_out == 99_997
        assert len(text.splitlines()) == 3 + {"table": 1, "markdown": 2}[result_format]
    for result_format in ("json", "csv"):
        text, left_out = printed(capsys, database, query, result_format, max_rows=3)
        assert left_out == 0 and "99999" in text


def test_newlines_stay_inside_a_cell_of_markdown(capsys, database):
    text, _ = printed(capsys, database, "SELECT 'a' || chr(10) || 'b' AS x", "markdown")
    assert text == "| x |\n| :-- |\n| a<br>b |\n"


def test_a_table_wider_than_the_terminal_is_printed_row_by_row(capsys, database, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    query = "SELECT layer, logits FROM routing LIMIT 2"
    text, _ = printed(capsys, database, query, "table")
    assert max(map(len, text.splitlines())) <= 60 and "…" not in text
    assert text.startswith("row 1\n  layer   0\n  logits  ") and "\nrow 2\n" in text
    ((logits,),) = database.sql("SELECT logits FROM routing LIMIT 1").fetchall()
    first = " ".join(text.split("row 2")[0].split("logits")[1].split())
    assert first == " ".join(f"{x:.4g}" for x in logits)
    monkeypatch.setenv("COLUMNS", "1000")
    header = printed(capsys, database, query, "table")[0].splitlines()[0]
    assert "layer" in header and "logits" in header


def test_parquet_is_not_for_a_terminal(database):
    with pytest.raises(InvalidOption, match=r"give --out FILE\.parquet"):
        print_result(*database.batches("SELECT 1"), "parquet", max_rows=1)


def test_a_file_is_whole_or_not_there(tmp_path, database):
    schema, batches = database.batches("SELECT * FROM range(100000) AS t(n)")

    def failing():
        yield next(batches)
        raise RuntimeError("the disk is gone")

    (tmp_path / "kept.csv").write_text("before")
    with pytest.raises(RuntimeError):
        write_result(schema, failing(), "csv", tmp_path / "kept.csv")
    assert (tmp_path / "kept.csv").read_text() == "before"
    assert os.listdir(tmp_path) == ["kept.csv"]  # noqa: PTH208
    with pytest.raises(InvalidOption, match="cannot be written"):
        write_result(schema, iter(()), "csv", tmp_path / "no" / "x.csv")


def test_lists_of_float32_are_written_as_they_are(tmp_path, database):
    out = tmp_path / "x.parquet"
    write_result(*database.batches("SELECT logits FROM routing"), "parquet", out)
    table = pq.read_table(out)
    assert table.schema.field("logits").type.value_type == pa.float32()
    expected = [row for (row,) in database.sql("SELECT logits FROM routing").fetchall()]
    assert table["logits"].to_pylist() == expected
