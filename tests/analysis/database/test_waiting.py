"""Ctrl-C and a time limit stop a query in one line, however often and whenever they come."""

import signal
import subprocess
import sys
import time

import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.database.connection import connect
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from tests.synthetic import write_run

LONG = "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE a.range * b.range % 7 = 3"
STREAM = "SELECT a.range FROM range(1000000) a, range(1000000) b WHERE a.range * b.range % 7 = 3"
IN_PYTHON = "SELECT sum(router_entropy(logits)) FROM routing, range(10000000)"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waiting") / "demo"
    return write_run(folder, n_sequences=2, length=5, n_shards=1)


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 20])
@pytest.mark.parametrize("query", [LONG, STREAM, IN_PYTHON])
def test_ctrl_c_ends_a_query_in_one_line(run, query, presses):
    script = "from bhlog.analysis.cli import main; main()"
    command = [sys.executable, "-c", script, "sql", str(run), query]
    if query == STREAM:
        command += ["--format", "csv"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    time.sleep(4)  # the query runs
    assert process.poll() is None
    for _ in range(presses):
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors.strip()) == (130, "bhlog: interrupted")


def test_a_query_that_takes_longer_than_its_timeout_is_stopped(run, capsys):
    started = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        main(["sql", str(run), LONG, "--timeout", "0.5"])
    assert stop.value.code == 1 and time.monotonic() - started < 10
    assert capsys.readouterr().err == "bhlog: SQL: stopped, the time of --timeout is over\n"


def test_a_query_within_its_timeout_is_answered_and_the_next_one_has_the_whole_of_it(run):
    with connect(open_log(run), timeout=2) as database:
        for _ in range(2):
            _, batches = database.batches("SELECT count(*) AS n FROM routing")
            assert [batch.to_pylist() for batch in batches] == [[{"n": 30}]]
        with pytest.raises(InvalidOption, match="stopped"):
            list(database.batches(LONG)[1])
        assert database.sql("SELECT count(*) FROM routing").fetchall() == [(30,)]


def test_the_handler_of_ctrl_c_is_given_back(run):
    before = signal.getsignal(signal.SIGINT)
    with connect(open_log(run)) as database:
        list(database.batches("SELECT 1")[1])
    with pytest.raises(SystemExit):
        main(["sql", str(run), "SELECT 1"])
    assert signal.getsignal(signal.SIGINT) is before
