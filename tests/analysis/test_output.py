import csv
import io
import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from bhlog.analysis.commands import options
from bhlog.analysis.output import FORMATS, write
from bhlog.capture.contract import rule
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null import curve
from bhlog.capture.contract.rule import CENTRED

HOSTILE = [
    "=cmd|' /C calc'!A0",
    "+1+1",
    "@SUM(A1)",
    "-x",
    "\t=1",
    "a\x1b[31m",
    "\u202etxt",
    "\x9b1m",
]


def test_a_table_says_its_title_as_it_is(capsys):
    write(pl.DataFrame({"x": [1.0]}), title="runs/[bold]a[/x]\x1b")
    assert capsys.readouterr().out.splitlines()[0].rstrip() == "runs/[bold]a[/x]\\x1b"


def test_json_has_no_nan(capsys):
    write(pl.DataFrame({"x": [float("nan"), 1.0], "y": [[float("inf")], []]}), "json")
    assert json.loads(capsys.readouterr().out) == [{"x": None, "y": [None]}, {"x": 1.0, "y": []}]


def test_words_that_look_like_markup_or_pictures_stay_words(capsys):
    write(pl.DataFrame({":smile:": [":key:"], "[red]": ["[bold]x[/bold]"]}))
    assert capsys.readouterr().out == ":smile:  [red]\n:key:    [bold]x[/bold]\n"


@pytest.mark.parametrize("format", ["table", "json", "csv", "markdown"])
def test_nothing_that_is_printed_steers_a_terminal(capsys, format):
    write(pl.DataFrame({"a\x1b[2J": HOSTILE, "b\u202e": HOSTILE}), format)
    out = capsys.readouterr().out
    assert out.replace("\n", "").replace("\t", "").isprintable()


def test_no_cell_of_csv_is_a_formula(capsys):
    write(pl.DataFrame({"=x()": [*HOSTILE, "-1.5", "-", None], "n": [-1.0] * 11}), "csv")
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["'=x()", "n"]
    assert not any(row[0].startswith(("=", "+", "@", "-x", "\t")) for row in rows)
    assert [row[0] for row in rows[-3:]] == ["-1.5", "-", ""]
    assert {row[1] for row in rows} == {"-1.0"}


def test_json_gives_back_what_it_was_given(capsys):
    write(pl.DataFrame({"x": HOSTILE}), "json")
    assert [row["x"] for row in json.loads(capsys.readouterr().out)] == HOSTILE


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_gets_what_its_name_or_the_format_says(tmp_path, format):
    frame = pl.DataFrame({"layer": [0, 1], "experts": [[1, 2], []], "name": ["a", None]})
    suffix = {"markdown": "md", "table": "txt"}.get(format, format)
    named, asked = tmp_path / f"x.{suffix}", tmp_path / "x"
    assert write(frame, None, named).rows == 2
    write(frame, format, asked)
    assert named.read_bytes() == asked.read_bytes()
    if format == "parquet":
        assert pl.read_parquet(named).to_dicts() == frame.to_dicts()
    if format == "json":
        assert json.loads(named.read_text()) == frame.to_dicts()


def test_batches_are_written_as_they_come(tmp_path, capsys):
    schema = pa.schema([("n", pa.int64())])
    seen = []

    def batches():
        for n in range(3):
            seen.append(n)
            yield pa.record_batch([pa.array([n])], schema=schema)

    assert write((schema, batches()), "csv").rows == 3
    assert capsys.readouterr().out == "n\n0\n1\n2\n"
    written = write((schema, batches()), max_rows=1)
    assert (written.rows, written.left_out) == (1, 2)
    assert write((schema, batches()), "parquet", tmp_path / "x").rows == 3
    assert pl.read_parquet(tmp_path / "x")["n"].to_list() == [0, 1, 2]


def test_what_cannot_be_written_says_so(tmp_path):
    frame = pl.DataFrame({"x": [1]})
    with pytest.raises(InvalidOption, match="parquet is not for a terminal"):
        write(frame, "parquet")
    with pytest.raises(InvalidOption, match="format must be one of table, json"):
        write(frame, "xml")
    with pytest.raises(InvalidOption, match="cannot be written"):
        write(frame, "csv", tmp_path / "no" / "x.csv")
    with pytest.raises(InvalidOption, match=r"^s3://b/x\.csv: is a URI; expected a path"):
        write(frame, "csv", Path("s3://AKIAKEY:hunter2@b/x.csv"))


def test_names_that_the_command_line_repeats_are_those_of_the_library():
    assert options.FORMATS == FORMATS
    assert options.KERNELS == curve.KERNELS
    assert options.BANDWIDTH_RULES == curve.BANDWIDTH_RULES
    assert tuple(CENTRED) == options.CENTRES
    from bhlog.analysis.commands.replay import RENORMALIZE

    assert tuple(rule.RENORMALIZE) == RENORMALIZE
