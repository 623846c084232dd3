"""The CSV of an engine that streams experts, written by hand from its definition."""

import os
import re
from pathlib import Path

import pytest

from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify
from tests.analysis.engines.traces import rows, run_command

REAL = Path(__file__).parents[4] / "shared/data/route_trace"  # beside a checkout, if at all
COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
HEADER = (
    "# route_trace v1\n"
    "# model=tiny.gguf arch=toy n_layer=3 n_expert=4 n_expert_used=2\n"
    "# layer=0 expert_bytes=0 dense_bytes=5\n"
    "# layer=1 expert_bytes=100 dense_bytes=5\n"
    "# layer=2 expert_bytes=300 dense_bytes=5\n"
)
# a prompt of two tokens, whose first is dropped before the last layer; then a decoded token
PROMPT = (
    "0,0,0,1,0,3,0.75,0,100\n0,0,0,1,1,0,0.25,0,100\n"
    "0,0,1,1,0,2,0.5,0,100\n0,0,1,1,1,3,0.5,1,0\n"
    "0,0,1,2,0,1,0.625,0,300\n0,0,1,2,1,2,0.375,0,300\n"
)
DECODED = "0,1,2,1,0,0,0.9,1,0\n0,1,2,1,1,1,0.1,0,100\n0,1,2,2,0,2,0.8,1,0\n0,1,2,2,1,0,0.2,0,300\n"
TRACE = HEADER + COLUMNS + PROMPT + DECODED


@pytest.fixture
def bring(tmp_path, capsys):
    """Imports a text as a trace."""

    def call(text, *options):
        path = tmp_path / "trace.csv"
        path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
        return run_command(capsys, "route-trace", path, "--out", tmp_path / "run", *options)

    return call


def test_a_trace_is_a_run_of_experts_and_their_bytes(bring, tmp_path):
    code, out, err = bring(TRACE)
    assert (code, err) == (0, "")
    assert out.endswith("run: 3 tokens, 6 rows, 2 layers, top 2 of 4 experts, no logits\n")
    assert rows(tmp_path / "run", "phase", "forward", "experts", "weights", "n_selected") == [
        (1, 0, 0, "prefill", 0, [3, 0], [0.75, 0.25], 2),
        (1, 0, 1, "prefill", 0, [2, 3], [0.5, 0.5], 2),
        (1, 0, 2, "decode", 1, [0, 1], [pytest.approx(0.9), pytest.approx(0.1)], 2),
        (2, 0, 0, "prefill", 0, [], [], 0),
        (2, 0, 1, "prefill", 0, [1, 2], [0.625, 0.375], 2),
        (2, 0, 2, "decode", 1, [2, 0], [pytest.approx(0.8), pytest.approx(0.2)], 2),
    ]
    log = open_log(tmp_path / "run")
    model, manifest = log.manifest.model, log.manifest
    assert (model.name, model.class_name, model.layers) == ("tiny.gguf", "toy", (1, 2))
    assert manifest.options["engine"] == "route-trace" and not manifest.logits
    assert not manifest.token_ids and log.expert_bytes == {1: 100, 2: 300}
    assert {finding.status for finding in verify(log)} == {"ok"}
    assert manifest.totals.forwards == 2


def test_columns_go_by_their_names_and_turns_are_texts(bring, tmp_path):
    names = "dropped,expert,slot,layer,step,phase,turn,weight"
    lines = ["1,0,0,1,5,1,0,nan", "0,3,1,1,5,1,0,nan", "0,1,0,1,6,1,1,nan", "0,0,1,1,6,1,1,nan"]
    code, _, err = bring(HEADER.replace("# layer=2", "# x=2") + "\n".join([names, *lines]) + "\n")
    assert (code, err) == (0, "")
    assert rows(tmp_path / "run", "forward", "experts", "weights") == [
        (1, 0, 5, 0, [0, 3], [0.5, 0.5]),  # no weights are known: equal ones
        (1, 1, 6, 1, [1, 0], [0.5, 0.5]),
    ]


def test_a_prompt_that_was_read_in_parts_is_a_forward_for_each(bring, tmp_path):
    part = (
        "0,0,{0},1,0,3,0.75,0,1\n0,0,{0},1,1,0,0.25,0,1\n0,0,{0},2,0,3,1,0,1\n0,0,{0},2,1,0,0,0,1\n"
    )
    assert bring(HEADER + COLUMNS + part.format(0) + part.format(1))[0] == 0
    assert [row[3] for row in rows(tmp_path / "run", "forward")] == [0, 1, 0, 1]


def changed(old, new, line):
    assert TRACE.count(old) >= 1
    return TRACE.replace(old, new, 1), line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no header"),
        (HEADER, "has no header"),
        (HEADER + "turn,phase\n", "line 6: no column step"),
        changed("n_expert=4", "n_expert=x", "'x' is no whole number"),
        changed("n_expert=4 ", "", "give --n-experts"),
        changed("n_expert=4", "n_expert=70000", "70000|< 65536|65535"),
        changed("n_expert=4", "n_expert=1", "top 2 of 1 experts"),
        changed("0,0,0,1,0,3,", "0,0,0,1,0,4,", "layer 1, position 0: expected experts below 4"),
        changed("0,0,0,1,0,3,", "0,0,0,1,0,-1,", "line 7: '-1' is no whole number"),
        changed("0,0,0,1,0,3,", "0,0,0,1,0,0,", "layer 1, position 0: expected experts below 4"),
        changed("0,0,0,1,0,3,", "0,0,0,1,0,3.0,", "line 7: '3.0' is no whole number"),
        changed("0,0,0,1,0,3,", "0,0,0,1,0," + "9" * 30 + ",", "line 7"),
        changed("0,0,0,1,0,3,", "0,0,0,3,0,3,", "line 7: phase 0, layer 3, slot 0"),
        changed("0,0,0,1,0,3,", "0,2,0,1,0,3,", "line 7: phase 2"),
        changed("0,0,0,1,0,3,", "0,0,0,1,2,3,", "line 7: phase 0, layer 1, slot 2"),
        changed("0,0,0,1,0,3,", "0,0,0,1,1,3,", "line 7: the forward that begins here"),
        changed("0,0,1,2,1,2,0.375,0,300\n", "", "line 7: the forward that begins here"),
        changed("0,0,0,1,1,0,0.25,0,100\n", "", "line 7: the forward that begins here"),
        changed("0.75", "nan", "line 7: some weights are nan"),
        changed("0.25", "nan", "line 7: some weights are nan"),
        changed("0.75", "inf", "layer 1, position 0: a weight is NaN, infinite"),
        changed("0.75", "1e308", "layer 1, position 0: a weight is NaN, infinite"),
        changed("0.75", "-0.1", "layer 1, position 0: a weight is NaN, infinite or negative"),
        changed("0.75", "much", "line 7: 'much' is no weight"),
        changed(",0.75,0,100", ",0.75,0,100,7,8", "line 7: 11 columns, the header has 9"),
        (TRACE[:-30], "line 15: 7 columns"),
        (TRACE + "x" * 20_000, "line 17: is longer than 16,384 bytes"),
        (TRACE.encode() + b"\xff\x00\n", "line 17: 1 columns"),
        (b"\x00\x01\x02" * 10, "no column turn"),
    ],
)
def test_what_is_no_trace_is_refused_in_a_line_and_leaves_nothing(text, words, bring, tmp_path):
    code, _, err = bring(text)
    assert code == 1 and err.count("\n") == 1 and "trace.csv" in err

    assert re.search(words, err), err
    assert [path.name for path in tmp_path.iterdir()] == ["trace.csv"]


def test_a_link_to_a_trace_is_followed_and_a_fifo_is_not_waited_for(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/trace.csv").write_text(TRACE)
    (tmp_path / "link.csv").symlink_to(tmp_path / "there/trace.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    for name, out, expected, words in (
        ("link.csv", "run", 0, ""),
        ("pipe.csv", "b", 1, "pipe.csv: is not a file"),
        ("there", "c", 1, "there: is not a file"),
        ("gone.csv", "d", 1, "gone.csv: No such file or directory"),
    ):
        code, _, err = run_command(capsys, "route-trace", tmp_path / name, "--out", tmp_path / out)
        assert code == expected and words in err and err.count("\n") == code


def test_a_trace_without_its_facts_is_told_them(bring, tmp_path):
    options = ("--layers", "1-2", "--n-experts", "4", "--top-k", "2", "--model", "mine")
    assert bring(COLUMNS + PROMPT, *options)[0] == 0
    log = open_log(tmp_path / "run")
    assert log.manifest.model.name == "mine" and log.expert_bytes is None


def test_what_the_trace_tells_otherwise_is_refused(bring):
    code, _, err = bring(TRACE, "--n-experts", "5")
    assert code == 1 and "has n_experts 4, --n-experts says 5" in err


PUBLISHED = {  # by its authors: budget, hit rate of LRU, overlap of adjacent tokens' experts
    "gptoss.route.csv": ("3000MiB", 0.324, 0.179),
    "gemma.route.csv": ("4000MiB", 0.768, 0.357),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_traces_give_what_their_authors_published(name, tmp_path, capsys):
    if not REAL.exists():
        pytest.skip("the traces are not beside this checkout")
    run, (budget, hit_rate, overlap) = tmp_path / "run", PUBLISHED[name]
    assert run_command(capsys, "route-trace", REAL / name, "--out", run)[0] == 0
    log = open_log(run)
    lru = log.cache(budget).row(0, named=True)
    assert lru["cache"] == "lru" and round(lru["hit_rate"], 3) == hit_rate
    experts = {row[:3]: {*row[3]} for row in rows(run, "experts", "phase") if row[4] == "decode"}
    shared = [
        len(found & experts[layer, sequence, position - 1]) / len(found)
        for (layer, sequence, position), found in experts.items()
        if (layer, sequence, position - 1) in experts
    ]
    assert round(sum(shared) / len(shared), 3) == overlap
    assert {finding.status for finding in verify(log)} == {"ok"}
