"""The page as a file: whole, self-contained, small, harmless."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.report.document import report, write_report
from bhlog.analysis.report.subject import Subject
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption, MissingExtra
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, normal_null, without_logits, write_run


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return end.value.code, *capsys.readouterr()


class Fetched(HTMLParser):
    """What the elements of a page would fetch or lead to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def test_a_page_asks_no_server_for_anything(page):
    text = page.read_text()
    found = Fetched(text).found
    assert found and not [one for one in found if not one.startswith(("#", "data:"))]
    assert "@import" not in text and not re.search(r"url\(\s*['\"]?http", text)


def test_bhlog_report_writes_one_file_and_says_how_large_it_is(rerun, tmp_path, capsys):
    code, out, err = call(capsys, "report", rerun, "--out", tmp_path / "new" / "report.html")
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"{tmp_path}/new/report.html: \d\.\d MB\n", out)


def test_a_run_without_a_null_model_has_a_page_that_says_what_to_do(native, tmp_path):
    page = report(Subject([open_log(native)]))
    assert f"bhlog kde fit {native} --trim-high 8 --out null.parquet" in page
    assert "bhlog-profiles" not in page.partition("</style>")[2].partition("<main")[2]


def test_what_a_log_says_cannot_become_markup(tmp_path):
    name = "<script>alert(1)</script>"
    run = open_log(write_run(tmp_path / "<b>x", sources=(name, "b"), length=20))
    page = report(Subject([run], [normal_kde((0, 1, 2))]))
    assert name not in page and "<b>x" not in page
    data = page.partition('id="bhlog-profiles">')[2].partition("</script>")[0]
    assert json.loads(data)[0]["name"] == "<b>x"


def test_a_page_that_cannot_be_written_leaves_nothing(native, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOption, match="cannot be written"):
        write_report(Subject([open_log(native)]), tmp_path / "file" / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_bokeh_the_command_that_installs_it_is_named(native, capsys, monkeypatch):
    def missing(library: str, extra: str) -> None:
        raise MissingExtra(f"this needs the package {library}: pip install 'bhlog[{extra}]'")

    monkeypatch.setattr("bhlog.analysis.commands.report.needed", missing)
    code, _, err = call(capsys, "report", native, "--out", "x.html")
    assert code == 1
    assert err == "bhlog: this needs the package bokeh: pip install 'bhlog[report]'\n"


def test_bhlog_explore_opens_what_it_wrote(rerun, capsys, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda uri: bool(opened.append(uri)) or False)
    code, out, err = call(capsys, "explore", rerun)
    path = Path(out.strip())
    assert code == 0 and opened == [path.as_uri()]
    assert err == "bhlog: no browser was found to open it in\n"
    assert 'id="bhlog-profiles"' in path.read_text()


def test_several_null_models_have_a_curve_each(rerun, tmp_path):
    other = tmp_path / "wide.parquet"
    KdeModel({i: normal_null(i, sd=2.0) for i in (0, 1, 5)}).save(other)
    subject = Subject([open_log(rerun)], [rerun, other])
    page = report(subject, only_explorer=True)
    data = json.loads(page.partition('id="bhlog-profiles">')[2].partition("</script>")[0])
    assert [one["name"] for one in data] == [f"bh-0.3, {rerun}", f"bh-0.3, {other}"]
    assert data[1]["command"] == f"bhlog sweep {rerun} --kde {other}"
    assert data[0]["counts"] != data[1]["counts"]


@pytest.mark.slow
def test_odd_runs_have_a_page_too(tmp_path):
    null = normal_kde((0, 1))
    nan = np.full((2, 2, 20, 8), np.nan, np.float32)
    odd = [
        write_run(tmp_path / "nan", layers=(0, 1), n_experts=8, length=10, logits=nan, kde=null,
                  options=BhOptions(alpha=0.2)),
        write_run(tmp_path / "tiny", layers=(0,), n_experts=2, top_k=1, length=1, n_sequences=1,
                  n_shards=1, kde=null, options=BhOptions(alpha=0.2, min_k=0)),
        write_run(tmp_path / "ids", layers=(0, 1), token_ids=False, length=5, sources=("a",)),
        without_logits(write_run(tmp_path / "without", layers=(0, 1), length=5)),
    ]  # fmt: skip
    said = [report(Subject([open_log(run)], tokenizer="bytes")) for run in odd]
    assert "80 rows of nan have a NaN or infinite logit" in said[0]
    assert "captured without token ids" in said[2]
    assert "has no logits" in said[3]


@pytest.mark.slow
def test_a_page_of_olmoe_takes_at_most_4_mb(tmp_path):
    layers = range(16)
    run = write_run(tmp_path / "run", layers=layers, n_experts=64, length=512, n_sequences=32)
    subject = Subject([open_log(run)], [normal_kde(layers)], tokenizer="bytes")
    assert len(report(subject)) < 4e6
