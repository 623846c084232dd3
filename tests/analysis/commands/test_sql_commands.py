"""`bhlog sql` as a user meets it."""

import io
import json
import os
import shlex
import subprocess
import sys

import duckdb
import polars as pl
import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.database.question import questions
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

LAYERS = (0, 1, 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two runs over the same text, one by BH with a null model, one native."""
    folder = tmp_path_factory.mktemp("sql")
    shared = {"n_sequences": 2, "length": 20, "n_shards": 2, "decode_from": 15}
    kde = normal_kde(LAYERS)
    write_run(folder / "bh", options=BhOptions(0.3, max_k=8), kde=kde, **shared)
    write_run(folder / "native", **shared)
    kde.save(folder / "null.parquet")
    return folder


@pytest.fixture
def bhlog(place, monkeypatch, capsys):
    """Runs `bhlog sql ...` beside the runs; gives exit code, stdout and stderr."""
    monkeypatch.chdir(place)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["sql", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return stop.value.code, out, err

    return run


def test_a_query_prints_a_table(bhlog):
    code, out, err = bhlog("bh", "SELECT layer, count(*) AS n FROM routing GROUP BY ALL ORDER BY 1")
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["layer", "n"], ["0", "40"], ["1", "40"], ["2", "40"],
    ]  # fmt: skip


def test_runs_are_told_apart_by_name(bhlog):
    query = "SELECT run, sum(n_selected) AS n FROM routing GROUP BY run ORDER BY run"
    code, out, _ = bhlog("native", "bh", query, "--format", "json")
    assert code == 0
    assert [row["run"] for row in json.loads(out)] == ["bh", "native"]
    assert json.loads(out)[1]["n"] == 40 * 3 * 8


@pytest.mark.parametrize("question", questions(), ids=lambda question: question.name)
def test_every_question_answers(bhlog, question):
    runs = ["native", "bh"] if "two runs" in question.needs else ["bh"]
    asked = ("--query", question.name, "--tokenizer", "bytes", "--format", "csv")
    code, out, err = bhlog(*runs, *asked)
    assert (code, err) == (0, "")
    header = out.splitlines()[0].split(",")
    assert all(name in question.returns or name in ("run", "layer") for name in header), header


def test_a_question_takes_parameters(bhlog):
    code, out, _ = bhlog(
        "bh", "--query", "experts_per_token", "--param", "phase=decode", "--format", "json"
    )
    assert code == 0 and [row["tokens"] for row in json.loads(out)] == [10, 10, 10]


def test_list_and_describe_need_no_run(bhlog):
    code, out, _ = bhlog("--list", "--format", "json")
    listed = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and set(listed) == {question.name for question in questions()}
    assert listed["coactivation"]["parameters"] == "layer min_tokens pairs top"
    code, out, _ = bhlog("--describe", "routes")
    assert code == 0 and out.startswith("-- routes.sql\n") and "Returns one row per" in out
    code, out, _ = bhlog("--describe", "shards")
    assert code == 0 and out.splitlines()[2].split() == [
        "folder",
        "VARCHAR",
        "routing",
        "or",
        "tokens",
    ]


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.md", "x.parquet", "x.txt"])
def test_out_writes_what_its_name_says(bhlog, tmp_path, name):
    out = tmp_path / name
    code, printed, err = bhlog("bh", "SELECT layer, logits FROM routing LIMIT 3", "--out", out)
    assert (code, printed, err) == (0, "", f"{out}: 3 rows\n")
    read = {
        "x.csv": lambda: pl.read_csv(out),
        "x.json": lambda: pl.DataFrame(json.loads(out.read_text())),
        "x.parquet": lambda: pl.read_parquet(out),
    }
    if name in read:
        assert read[name]().columns == ["layer", "logits"] and len(read[name]()) == 3
    else:
        assert "layer" in out.read_text().splitlines()[0]
    assert os.listdir(tmp_path) == [name]  # noqa: PTH208


def test_format_wins_over_the_name_of_out(bhlog, tmp_path):
    bhlog("bh", "SELECT 1 AS x", "--out", tmp_path / "x.txt", "--format", "json")
    assert json.loads((tmp_path / "x.txt").read_text()) == [{"x": 1}]


def test_rows_left_out_are_said_on_stderr(bhlog):
    code, out, err = bhlog("bh", "SELECT layer FROM routing", "--max-rows", 5)
    assert code == 0 and len(out.splitlines()) == 6
    assert err == "115 more rows: raise --max-rows, or write all to --out FILE\n"


def test_a_null_model_may_be_given(bhlog):
    query = "SELECT count(bh_count(logits, layer, 0.1)) AS n FROM routing"
    assert bhlog("native", query)[2].startswith("bhlog: no open run has a null model; fit one")
    code, out, _ = bhlog("native", query, "--kde", "null.parquet")
    assert code == 0 and out.split() == ["n", "120"]


def test_a_query_may_be_longer_than_a_file_name(bhlog):
    code, out, _ = bhlog("bh", "SELECT " + " + ".join(["1"] * 400) + " AS n")
    assert code == 0 and out.split() == ["n", "400"]


def test_a_query_may_come_from_a_pipe(bhlog, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT 42 AS n;\n"))
    assert bhlog("bh") == (0, bhlog("bh", "SELECT 42 AS n")[1], "")


def test_a_run_whose_name_has_blanks_is_a_run(bhlog, place, monkeypatch):
    write_run(place / "my own run", n_sequences=1, length=2, n_shards=1)
    monkeypatch.setattr(sys, "stdin", io.StringIO("SELECT DISTINCT run FROM routing"))
    assert bhlog("my own run", "--format", "csv") == (0, "run\nmy own run\n", "")


def test_the_prompt_opens_without_a_query(bhlog, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(
        "bhlog.analysis.database.prompt.run_prompt",
        lambda database, **options: asked.append((list(database.runs), options)),
    )
    assert bhlog("bh", "native", "--max-rows", 7) == (0, "", "")
    history = tmp_path / "bhlog" / "sql_history"
    options = {"result_format": "table", "max_rows": 7, "history": history}
    assert asked == [(["bh", "native"], options)]


def test_the_shell_command_opens_the_same_views(bhlog):
    code, out, _ = bhlog("bh", "native", "--shell-command")
    program, flag, statements = shlex.split(out)
    assert (code, program, flag) == (0, "duckdb", "-cmd")
    with duckdb.connect() as shell:
        shell.execute(statements).fetchall()
        query = "SELECT run, avg(weight) AS w FROM selections GROUP BY run ORDER BY run"
        found = json.loads(bhlog("bh", "native", query, "--format", "json")[1])
        assert [tuple(row.values()) for row in found] == [
            (run, pytest.approx(w)) for run, w in shell.sql(query).fetchall()
        ]


def test_memory_threads_and_folder_are_set(bhlog, tmp_path):
    query = "SELECT current_setting('threads') AS t, current_setting('memory_limit') AS m"
    code, out, err = bhlog(
        "bh", query, "--threads", 1, "--memory-limit", "512MB", "--temp-dir", tmp_path, "--unsafe",
        "--format", "csv",
    )  # fmt: skip
    assert code == 0, err
    assert out.splitlines()[1].startswith("1,488")  # MiB
    assert list(tmp_path.iterdir()) == []


def test_an_empty_run_is_said_and_answers_without_rows(bhlog, place):
    run = write_run(place / "empty", n_sequences=1, length=2, n_shards=1)
    for shard in [*run.glob("routing/*"), *run.glob("tokens/*")]:
        shard.unlink()
    code, out, err = bhlog("empty", "--query", "expert_load")
    assert code == 0 and out.split()[:3] == ["run", "layer", "expert"]
    assert err.endswith(f"bhlog: run 'empty' holds no rows yet ({run.name})\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], 'name a run: bhlog sql RUN "SELECT ..."'),
        (["SELECT 1"], 'name a run: bhlog sql RUN "SELECT ..."'),
        (["nothing", "SELECT 1"], "nothing: no such folder"),
        (["bh", "bh", "SELECT 1"], "bh: given twice; name each run once"),
        (["bh", "SELECT lyer FROM routing"], "SQL: no column 'lyer'; did you mean 'layer'?"),
        (["bh", "SELECT 1 FROM rooting"], "SQL: no table 'rooting'; did you mean 'routing'?"),
        (["bh", "SELECT FROM WHERE"], "syntax error"),
        (["bh", "SELECT 1", "--query", "routes"], "give a query or --query, not both"),
        (["bh", "SELECT 1", "--param", "a=1"], "--param belongs to --query"),
        (["bh", "--query", "rutes"], "no question 'rutes'; did you mean 'routes'?"),
        (["--describe", "rutes"], "no question 'rutes'; did you mean 'routes'?"),
        (["bh", "--query", "routes", "--param", "tp=1"], "did you mean 'top'?"),
        (["bh", "--query", "routes", "--param", "top"], "a parameter is NAME=VALUE, got 'top'"),
        (["bh", "--query", "run_agreement"], "compares two runs: bhlog sql RUN OTHER"),
        (["bh", "SELECT 1 AS x", "--format", "parquet"], "give --out FILE.parquet"),
        (
            ["bh", "SELECT 1 AS x", "--out", "null.parquet/x.csv"],
            "x.csv: its folder cannot be made",
        ),
        (["bh", "SELECT 1 AS x", "--kde", "absent"], "absent: cannot read a null model"),
        (["bh", "SELECT 1 AS x", "--memory-limit", "much"], "'much' is no size"),
        (["bh", "SELECT 1 AS x", "--temp-dir", "no/where"], "no/where: no folder for spilled"),
        (["bh", "COPY runs TO 'x.csv'"], "COPY is refused, the connection only reads the runs"),
        (["bh", "SELECT 'x'::INT"], "Could not convert string 'x' to INT32"),
    ],
)
def test_a_mistake_gets_one_line(bhlog, arguments, line):
    code, out, err = bhlog(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("bhlog: ") and line in err and err.count("\n") == 1


def test_help_names_views_examples_and_the_way_out(bhlog):
    code, out, _ = bhlog("--help")
    assert code == 0
    for word in ("routing, selections, tokens", "--unsafe", "bh_count(logits, layer, .1)"):
        assert word in " ".join(out.split())


def test_a_closed_pipe_ends_quietly(place):
    code = "from bhlog.analysis.cli import main; main()"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    query = "SELECT * FROM range(1000000)"
    line = f"{command} sql bh {shlex.quote(query)} --format csv | head -n 2"
    done = subprocess.run(line, shell=True, cwd=place, capture_output=True, text=True, timeout=60)
    assert done.stdout == "range\n0\n" and "Traceback" not in done.stderr
