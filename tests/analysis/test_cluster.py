"""A Dask cluster folds a log: to the same bits, and what goes wrong there is one line here."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError

import pytest

from bhlog.analysis import fold as folding
from bhlog.analysis import workers as workers_module
from bhlog.analysis.cli import main
from bhlog.analysis.commands import scheduler
from bhlog.analysis.log import Log
from bhlog.analysis.run import open_log
from bhlog.analysis.workers import elsewhere
from bhlog.capture.contract.errors import RouterLogError
from tests.analysis.test_executors import VERBS, same
from tests.analysis.test_executors import made as two_runs
from tests.synthetic import normal_kde


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    normal_kde(two_runs(folder).layers).save(folder / "null.parquet")
    return folder


@pytest.fixture(autouse=True)
def many_stretches(monkeypatch):
    monkeypatch.setattr(folding, "STRETCH_LOGITS", 16)


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    # a port of its own: Dask has one of fixed number, which another cluster may have
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
    ) as made:
        yield made


@pytest.fixture
def client(cluster):
    from distributed import Client

    with Client(cluster) as made:
        made.wait_for_workers(2)
        yield made


def ran(capsys, *arguments):
    """Exit status, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    return end.value.code or 0, *capsys.readouterr()


REPLAY = ("--alpha", "0.3", "--max-k", "8", "--format", "csv")


@pytest.mark.slow
def test_the_same_bits_also_when_a_worker_is_killed(place, cluster, client):
    run = open_log(place / "run")
    victims = [worker.pid for worker in cluster.workers.values()][:1]

    def kill(rows):  # once the first stretch is here
        if victims:
            os.kill(victims.pop(), signal.SIGKILL)

    for verb in VERBS:
        executor = client.get_executor(pure=False)
        assert same(verb(run, executor=executor, progress=kill), verb(run, threads=1))
    assert not victims


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "replay RUN --kde NULL --alpha 0.3 --max-k 8",
        "sweep RUN --kde NULL",
        "kde check NULL RUN",
        "compare RUN --kde NULL --experts 4",
        "kde compare NULL NULL --run RUN",
        "export load RUN --out load.json",
        "verify BH --replay",
        "fidelity RUN BH",
        "plot RUN mean_experts n_selected_by_position --out .",
    ],
)
def test_commands_print_the_same(place, cluster, capsys, monkeypatch, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    names = {
        "RUN": str(place / "run"),
        "BH": str(place / "bh"),
        "NULL": str(place / "null.parquet"),
    }
    words = [names.get(word, word) for word in arguments.split()]
    alone = ran(capsys, *words)
    there = ran(capsys, *words, "--scheduler", cluster.scheduler_address)
    assert there == alone and not alone[0]
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "nowhere")
    assert ran(capsys, *words, "--scheduler", cluster.scheduler_address) == alone
    code, _, told = ran(capsys, *words)
    assert code == 1 and "--scheduler nowhere: no address of a Dask scheduler" in told


@pytest.mark.parametrize("address", ["localhost:8786", "http://host:8786", "tcp://", "tcp:/a"])
def test_what_is_no_address_is_refused(place, capsys, address):
    code, _, told = ran(capsys, "replay", place / "bh", *REPLAY, "--scheduler", address)
    assert (code, told.count("\n")) == (1, 1)
    assert told.startswith(f"bhlog: --scheduler {address}: no address of a Dask scheduler")


def test_without_dask_the_extra_is_named(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    found = ran(capsys, "replay", place / "bh", *REPLAY, "--scheduler", "tcp://host:8786")
    line = "bhlog: this needs the package distributed: pip install 'bhlog[cluster]'\n"
    assert found == (1, "", line)


@pytest.mark.slow
def test_a_scheduler_that_does_not_answer_is_waited_for_no_longer(place, capsys, monkeypatch):
    import socket

    monkeypatch.setattr(scheduler, "WAIT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        code, _, told = ran(capsys, "replay", place / "bh", *REPLAY, "--scheduler", address)
    assert (code, told.count("\n")) == (1, 1)
    assert told.startswith(f"bhlog: {address}: no Dask scheduler answers there within 1 s")


@pytest.mark.slow
def test_a_report_is_counted_there(place, cluster, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "WAIT_SECONDS", 1)
    pages = []
    for how in ([], ["--scheduler", cluster.scheduler_address]):
        run, out = place / "bh", tmp_path / "page.html"
        assert ran(capsys, "report", run, "--out", out, *how)[0] == 0
        pages.append(out.stat().st_size)
    assert abs(pages[0] - pages[1]) < 100  # ids of its elements differ
    assert ran(capsys, "report", run, "--out", out, "--scheduler", "tcp://127.0.0.1:1")[0] == 1


@pytest.mark.slow
def test_workers_with_another_bhlog_or_none_are_named(place, cluster, client, capsys, monkeypatch):
    words = ("replay", place / "bh", *REPLAY, "--scheduler", cluster.scheduler_address)
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    here = workers_module.own_version()
    monkeypatch.setattr(workers_module, "own_version", lambda: "99")
    code, _, told = ran(capsys, *words)
    assert code == 1 and told.startswith(f"bhlog: worker {workers[0]}: bhlog there is ")
    assert "here 99; install the same version on every worker\n" in told

    def lacking(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(workers_module, "own_version", lambda: here)
    monkeypatch.setattr(workers_module, "version", lacking)
    code, _, told = ran(capsys, *words)
    assert code == 1 and told.startswith(f"bhlog: worker {workers[0]}: bhlog there is none, ")

    def late(item):
        raise ModuleNotFoundError("No module named 'bhlog'", name="bhlog")

    with pytest.raises(RouterLogError, match=f"^worker {workers[0]}: bhlog there is none, "):
        list(elsewhere(client.get_executor(pure=False), late, [0]))


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_run_is_named(place, cluster, client, capsys, monkeypatch):
    monkeypatch.setattr(Log, "source", "/not/on/workers")
    words = ("replay", place / "bh", *REPLAY, "--scheduler", cluster.scheduler_address)
    code, _, told = ran(capsys, *words)
    assert (code, told.count("\n")) == (1, 1)
    assert told.startswith("bhlog: worker tcp://127.0.0.1:")
    assert ": /not/on/workers: no such folder; a worker opens the run itself" in told


@pytest.mark.slow
def test_workers_that_fail_are_told_of_in_a_line(cluster, client, monkeypatch):
    def full(item):
        raise MemoryError

    def dies(item):
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    def lacks(item):
        raise ModuleNotFoundError("No module named 'bhlog'", name="bhlog")

    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    for task, words in (
        (full, r"^worker tcp://127.0.0.1:\d+: out of memory"),
        (lacks, "^ClientExecutor: a worker lacks the package bhlog; install"),
        (dies, r"^worker tcp://127.0.0.1:\d+: ended in the middle of a task"),
    ):
        with pytest.raises(RouterLogError, match=words):
            list(elsewhere(client.get_executor(pure=False), task, [0]))
    client.wait_for_workers(2)


@pytest.mark.slow
def test_ctrl_c_cancels_on_the_cluster(place, cluster, client):
    def slow_down():
        import time

        from bhlog.analysis.log import Log

        pieces = Log.pieces

        def slowly(*arguments, **options):
            time.sleep(0.5)
            return pieces(*arguments, **options)

        Log.pieces, Log.fast = slowly, pieces

    def speed_up():
        from bhlog.analysis.log import Log

        Log.pieces = Log.fast

    client.run(slow_down)
    command = [sys.executable, "-c", "from bhlog.analysis.cli import main; main()"]
    with subprocess.Popen(
        [*command, "replay", str(place / "bh"), *REPLAY, "--scheduler", cluster.scheduler_address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(lambda: len(cluster.scheduler.tasks) > 1)  # one that others share
        os.kill(process.pid, signal.SIGINT)
        out, told = process.communicate(timeout=60)
    assert (process.returncode, out, told.strip()) == (130, "", "bhlog: interrupted")
    wait_until(lambda: not cluster.scheduler.tasks)
    client.run(speed_up)


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
