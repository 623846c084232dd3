"""The prompt as its user meets it: keys go in, text comes out."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from bhlog.analysis.database.catalog import VIEWS
from bhlog.analysis.database.connection import connect
from bhlog.analysis.database.prompt import SqlCompleter, history_path, run_prompt
from bhlog.analysis.run import open_log
from tests.synthetic import normal_kde, write_run


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompt") / "demo"
    write_run(folder, n_sequences=2, length=5, n_shards=1, kde=normal_kde((0, 1, 2)))
    with connect(open_log(folder)) as opened:
        yield opened


@pytest.fixture
def prompt(database, capsys):
    """Type keys at the prompt, part by part with pauses, then Ctrl-D; gives stdout and stderr."""

    def type_keys(*parts, **options):
        with create_pipe_input() as pipe, ThreadPoolExecutor(1) as hand:

            def type_parts():
                for part in parts[:-1]:
                    pipe.send_text(part)
                    time.sleep(0.3)  # completion works beside the typing
                pipe.send_text(parts[-1] + "\x04")

            hand.submit(type_parts)
            run_prompt(database, input=pipe, output=DummyOutput(), **options)
        return capsys.readouterr()

    return type_keys


def test_a_query_prints_its_rows_and_the_prompt_goes_on(prompt):
    out, err = prompt("SELECT count(*) AS n FROM routing\rSELECT 41 + 1 AS m;\r")
    assert out.splitlines()[0] == (
        "demo: routing, selections, tokens, runs, kde, replays, shards. Enter .help for help."
    )
    assert out.split()[-4:] == ["n", "30", "m", "42"] and err == ""


def test_alt_enter_starts_a_line(prompt):
    out, _ = prompt("SELECT 1\x1b\r+ 1 AS two\r")
    assert out.split()[-2:] == ["two", "2"]


def test_a_mistake_is_one_line_and_the_prompt_goes_on(prompt):
    out, err = prompt("SELECT lyer FROM routing\rSELECT 5 AS five\r.nothing\r.query coactivaton\r")
    assert err == (
        "bhlog: SQL: no column 'lyer'; did you mean 'layer'?\n"
        "bhlog: no command '.nothing'; commands: .tables, .list, .query, .help, .quit\n"
        "bhlog: no question 'coactivaton'; did you mean 'coactivation'?\n"
    )
    assert out.split()[-2:] == ["five", "5"]


def test_an_unclosed_quote_of_a_command_is_one_line(prompt):
    _, err = prompt(".query 'routes\r")
    assert err.startswith("bhlog: ") and err.count("\n") == 1


def test_ctrl_c_forgets_the_line(prompt):
    out, err = prompt("SELECT 1 AS lost\x03SELECT 2 AS kept\r")
    assert "lost" not in out and out.split()[-2:] == ["kept", "2"] and err == ""


def test_quit_leaves(prompt):
    for word in (".quit", "exit"):
        assert "3" not in prompt(f"{word}\rSELECT 3\r").out


def test_tab_completes(prompt):
    out, _ = prompt("SELECT count(*) AS n FROM shar\t", "\r")
    assert out.split()[-2:] == ["n", "2"]
    out, _ = prompt(".query shard\t", "\r")
    assert "bytes_per_row" in out


def test_commands_say_what_is_there(prompt):
    out, err = prompt(".help\r.tables\r.list\r.tables tokens\r.tables x\r")
    assert "nll FLOAT loss of this token" in " ".join(out.split())
    assert err == f"bhlog: no view 'x'; views: {', '.join(VIEWS)}\n"
    assert "Tab completes" in out and "shards: run, folder, shard, bytes, rows" in out
    assert "coactivation: Which experts" in out


def test_a_question_takes_its_parameters(prompt):
    out, _ = prompt(".query load_by_position width=2\r")
    assert len(out.splitlines()) == 1 + 1 + 3


def test_more_rows_than_shown_are_counted_and_formats_hold(prompt):
    assert prompt("SELECT * FROM range(12)\r", max_rows=10).out.endswith("2 more rows\n")
    assert '{"x":1}' in prompt("SELECT 1 AS x\r", result_format="json").out


def test_lines_are_remembered_over_sessions(prompt, tmp_path):
    history = tmp_path / "state" / "history"
    prompt("SELECT 17 AS x\r", history=history)
    out, _ = prompt("\x1b[A\r", history=history)  # the up arrow
    assert out.split()[-2:] == ["x", "17"]


def test_history_lives_in_the_users_state_folder(monkeypatch, tmp_path, prompt):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "bhlog" / "sql_history"
    (tmp_path / "bhlog").write_text("a file in its place")
    assert prompt("SELECT 1 AS x\r", history=history_path()).out.split()[-2:] == ["x", "1"]


def completions(database, text):
    found = SqlCompleter(database).get_completions(Document(text), CompleteEvent())
    return [completion.text for completion in found]


def test_completion_knows_views_columns_functions_and_questions(database):
    assert completions(database, "SELECT * FROM sel") == ["selections"]
    assert completions(database, "select 1 from tokens join r") == ["routing", "runs", "replays"]
    assert completions(database, "SELECT bh_") == ["bh_count", "bh_experts"]
    assert completions(database, "SELECT tokens.n") == ["nll"]
    assert "p_value" in completions(database, "SELECT p_")
    assert completions(database, ".que") == [".query"]
    assert completions(database, ".tables s") == ["selections", "shards"]
    assert completions(database, ".query vocab") == ["vocabulary_specialization"]
    assert completions(database, "SELECT xyz") == []
