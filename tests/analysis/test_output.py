import json

import polars as pl

from bhlog.analysis.output import print_frame


def test_a_table_says_its_title_as_it_is(capsys):
    print_frame(pl.DataFrame({"x": [1.0]}), title="runs/[bold]a[/x]\x1b")
    assert capsys.readouterr().out.splitlines()[0].rstrip() == "runs/[bold]a[/x]\\x1b"


def test_json_has_no_nan(capsys):
    print_frame(pl.DataFrame({"x": [float("nan"), 1.0], "y": [[float("inf")], []]}), "json")
    assert json.loads(capsys.readouterr().out) == [{"x": None, "y": [None]}, {"x": 1.0, "y": []}]
