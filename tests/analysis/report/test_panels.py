"""What the panels show is what the log holds."""

import json
import re
import shlex
from html import unescape

import numpy as np
import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.log import logits_of
from bhlog.analysis.report.document import report
from bhlog.analysis.report.mind import of_null, of_run
from bhlog.analysis.report.subject import Subject
from bhlog.analysis.report.which_experts import pairs_of
from bhlog.analysis.run import open_log
from tests.synthetic import normal_kde, write_run


@pytest.fixture(scope="module")
def text(native, rerun):
    """The page with texts of tokens, which are bytes here."""
    runs = [open_log(native), open_log(rerun)]
    return report(Subject(runs, [rerun / "kde.parquet"], tokenizer="bytes"))


def test_all_panels_are_there_in_order(text):
    keys = re.findall(r'<section id="([\w-]+)"', text)
    assert keys == ["overview", "explorer", "policies", "text", "calibration", "load", "sources",
                    "caches", "saturation", "extremes", "fidelity"]  # fmt: skip
    assert re.findall(r'<a href="#([\w-]+)">', text) == keys


def test_what_cannot_be_shown_says_why(page):
    left_out = page.read_text().partition('<section id="left-out"')[2]
    assert "a log holds no text: name its tokenizer with --tokenizer" in left_out


def test_pairs_are_those_of_the_rows(rerun):
    run = open_log(rerun)
    found = pairs_of(run, [1, 5], 1.0)
    for layer in (1, 5):
        slow = np.zeros((run.n_experts, run.n_experts), int)
        rows = 0
        for batch in run.batches(["experts"], layers=[layer]):
            for experts in batch.column("experts").to_pylist():
                rows += 1
                for a in experts:
                    for b in experts:
                        slow[a, b] += 1
        assert found.rows[layer] == rows
        assert found.together[layer].tolist() == slow.tolist()
        a, b = np.argwhere(np.triu(slow, 1) >= 10)[0]
        assert found.lift(layer)[a, b] == slow[a, b] * rows / (slow[a, a] * slow[b, b])


def test_the_step_up_of_a_token_is_the_rules(text, rerun):
    data = json.loads(text.partition('id="bhlog-text">')[2].partition("</script>")[0])
    run = open_log(rerun)
    for shown in data["layers"]:
        batch = run.read(
            next(run.row_groups([shown["layer"]])), ["logits", "n_selected", "position", "sequence"]
        )
        first = batch.column("sequence").to_numpy() == 0
        at = np.flatnonzero(first)[batch.column("position").to_numpy()[first].argsort()]
        logits, n = logits_of(batch)[at], batch.column("n_selected").to_numpy()[at]
        assert shown["n"] == n.tolist()
        for i, (experts, p) in enumerate(zip(shown["experts"], shown["p"], strict=True)):
            order = np.argsort(-logits[i], kind="stable")[: len(experts)]
            assert experts == order.tolist()
            assert p == pytest.approx(run.kde[shown["layer"]].curves[0].p_value(logits[i][order]),
                                      rel=0.01)  # fmt: skip


def test_an_experts_page_has_the_tokens_that_it_weighs_most(text, rerun):
    data = json.loads(text.partition('id="bhlog-text">')[2].partition("</script>")[0])
    run = open_log(rerun)
    page = data["pages"][0]
    rows = {e: 0 for e in range(run.n_experts)}
    best: dict[int, float] = {}
    token: dict[int, int] = {}
    for batch in run.batches(["experts", "weights", "token_id"], layers=[0]):
        lists = zip(batch["experts"].to_pylist(), batch["weights"].to_pylist(),
                    batch["token_id"].to_pylist(), strict=True)  # fmt: skip
        for experts, weights, token_id in lists:
            for e, weight in zip(experts, weights, strict=True):
                rows[e] += 1
                if weight > best.get(e, 0):
                    best[e], token[e] = weight, token_id
    for e, shown in page["experts"].items():
        assert shown["rows"] == rows[int(e)]
        assert shown["top"][0][1] == chr(token[int(e)])
        assert sum(shown["sources"]) == pytest.approx(1, abs=1e-3)


def test_what_to_mind_is_said_with_a_command(tmp_path):
    path = write_run(tmp_path / "one", n_sequences=1, n_shards=1, length=30)
    run = open_log(path)
    assert [one.what for one in of_run(run)] == ["one holds one sequence only"]
    said = of_null(Subject([run], [normal_kde((0, 1, 2))]))
    assert said[0].what.startswith("The null model was fitted from all logits")
    assert said[0].command == f"bhlog kde fit {path} --trim-high 8 --out null.parquet"
    assert said[1].what.startswith("P-values are not uniform in")


@pytest.mark.slow
def test_every_command_on_the_page_runs(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = [unescape(one) for one in re.findall(r"<code>(bhlog .*?)</code>", text)]
    assert len(commands) >= 11
    for command in commands:
        with pytest.raises(SystemExit) as end:
            main(shlex.split(command)[1:])
        out, err = capsys.readouterr()
        assert end.value.code == 0 and out, (command, err)
