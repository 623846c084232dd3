"""A run in S3-compatible storage: each command answers as it does on the same run on disk."""

import http.server
import threading
from pathlib import Path

import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.database.connection import connect
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import MissingRun
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions
from tests.analysis.test_executors import Backwards
from tests.object_store import object_store
from tests.synthetic import normal_kde, write_run

pytestmark = pytest.mark.slow

LAYERS = (0, 2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """An S3 server on this machine, which the environment names."""
    with object_store(tmp_path_factory.mktemp("cache"), "logs") as server:
        yield server


@pytest.fixture(scope="module")
def endpoint(server) -> str:
    """HOST:PORT of the server."""
    return server.endpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with two runs over the same text, native and by BH, and their null model."""
    folder = tmp_path_factory.mktemp("runs")
    shared = {"layers": LAYERS, "n_experts": 8, "n_sequences": 4, "length": 16, "top_k": 2}
    kde = normal_kde(LAYERS)
    kde.save(folder / "null.parquet")
    write_run(folder / "native", **shared)
    write_run(folder / "bh", options=BhOptions(alpha=0.3, max_k=4), kde=kde, **shared)
    return folder


@pytest.fixture(scope="module")
def bucket(server, runs) -> str:
    """The URI of the same folder in a bucket."""
    server.upload(runs)
    return "s3://logs"


@pytest.fixture
def bhlog(capsys):
    """Run the command; gives exit code, stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


COMMANDS = [
    "info {runs}/bh",
    "verify {runs}/bh --replay",
    "replay {runs}/bh --alpha 0.1 --out {out}/replay",
    "sweep {runs}/bh --target-experts 2",
    "compare {runs}/bh --policy bh:0.3 --policy topk:2",
    "kde fit {runs}/native {runs}/bh --out {out}/null.parquet",
    "kde check {local}/null.parquet {runs}/native",
    "fidelity {runs}/native {runs}/bh",
    "sql {runs}/native {runs}/bh --query run_agreement",
    "plot {runs}/bh experts_histogram step_up --out {out}/figures",
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split(" {")[0])
def test_a_command_answers_as_on_a_disk(command, runs, bucket, bhlog, tmp_path):
    answers, written = [], []
    for name, where in (("disk", runs), ("store", bucket)):
        out = tmp_path / name
        out.mkdir()
        words = [w.format(runs=where, local=runs, out=out) for w in command.split(" ")]
        code, *text = bhlog(*words)
        assert code == 0, text
        for path, short in ((out, "OUT"), (where, "RUNS"), (runs, "RUNS")):
            text = [t.replace(str(path), short) for t in text]
        answers.append([t.split() for t in text])  # columns are as wide as the paths in them
        files = {f.relative_to(out): f.read_bytes() for f in out.rglob("*.*") if f.is_file()}
        written.append(files)
    assert answers[0] == answers[1]
    assert written[0] == written[1]
    assert ("--out" in command) == bool(written[0])


def test_figures_of_a_run_in_a_bucket_need_a_folder(bucket, bhlog):
    assert bhlog("plot", f"{bucket}/bh") == (
        1,
        "",
        f"bhlog: {bucket}/bh is not a local folder; say where figures go: --out DIR\n",
    )


def test_the_uri_may_name_the_endpoint(bucket, endpoint, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    log = open_log(f"{bucket}/native?endpoint_override={endpoint}&scheme=http&region=us-east-1")
    assert (log.name, log.is_local) == ("native", False)
    with connect(log) as database:
        assert database.sql("SELECT DISTINCT run, count(*) FROM routing GROUP BY run").fetchall()
        assert set(database.runs) == {"native"}


@pytest.mark.parametrize(
    ("uri", "line"),
    [
        ("s3://logs/nothing", "s3://logs/nothing: no such bucket or folder"),
        ("s3://no-such-bucket/run", "s3://no-such-bucket/run: no such bucket or folder"),
        ("s3://logs", "s3://logs: no run.json, so this is not the folder of a run"),
        ("s3://logs/null.parquet", "a file; expected the folder of a run"),
        ("s3://logs/bh?colour=red", "Unexpected query parameter in S3 URI: 'colour'"),
        ("s4://logs/bh", "Unrecognized filesystem type"),
    ],
)
def test_what_is_no_run_in_a_store_gets_one_line(bucket, bhlog, uri, line):
    code, out, err = bhlog("info", uri)
    assert (code, out) == (1, "") and line in err and err.count("\n") == 1


WRITES = [
    ("replay {runs}/bh --alpha 0.1 --alpha 0.2 --out {out}/replay", "wrote "),
    ("sweep {runs}/bh --save {out}/profile.parquet", "wrote "),
    ("kde fit {runs}/native --out {out}/null.parquet", ""),
    ("kde merge {runs}/null.parquet {runs}/bh --out {out}/null.parquet", ""),
    ("kde export {runs}/null.parquet --out {out}/null.npz", "wrote "),
    ("info {runs}/bh --out {out}/facts.csv", ": "),
    ("kde show {runs}/null.parquet --figure {out}/tails.svg", ""),
    ("report {runs}/bh --out {out}/page.html", ""),
]


@pytest.mark.parametrize(("command", "says"), WRITES, ids=[c.split(" {")[0] for c, _ in WRITES])
def test_what_a_command_writes_into_a_store_is_what_it_writes_on_a_disk(
    command, says, runs, server, bucket, bhlog, tmp_path
):
    place = f"endpoint_override={server.endpoint}&scheme=http&region=us-east-1"
    server.delete("out")
    code, *told = bhlog(*[w.format(runs=runs, out=tmp_path) for w in command.split(" ")])
    assert code == 0, told
    words = command.format(runs=bucket, out="s3://AKIAKEY:hunter2@logs/out").split(" ")
    words = [f"{w}?{place}" if w.startswith("s3://AKIA") else w for w in words]
    code, *told = bhlog(*words)
    assert code == 0, told
    assert says in "".join(told) and "hunter2" not in "".join(told)
    on_disk = {f.relative_to(tmp_path).as_posix(): f for f in tmp_path.rglob("*") if f.is_file()}
    there = {path.removeprefix("out/"): data for path, data in server.files("out").items()}
    assert set(there) == set(on_disk) and there
    for path, data in there.items():
        name = path.rpartition(".")[2]
        assert name in ("npz", "svg", "html", "csv") or data == on_disk[path].read_bytes(), path
    server.delete("out")


def test_what_was_written_into_a_store_is_read_there(server, bucket, bhlog):
    log = open_log(f"{bucket}/bh")
    bhlog("replay", f"{bucket}/bh", "--alpha", 0.1, "--out", f"{bucket}/bh/replay")
    rows = bhlog("sql", f"{bucket}/bh", "SELECT count(*) n FROM replays", "--format", "csv")[1]
    assert int(rows.split()[-1]) == log.manifest.totals.rows
    assert bhlog("verify", f"{bucket}/bh")[0] == 0
    code, _, error = bhlog("replay", f"{bucket}/bh", "--alpha", 0.1, "--out", f"{bucket}/bh/replay")
    assert code == 1 and "is there already" in error
    server.delete("bh/replay/alpha-0.1_k-1-4/_replay.json")  # as an upload that was killed
    code, _, error = bhlog("sql", f"{bucket}/bh", "SELECT count(*) n FROM replays")
    assert code == 1 and "its replay is not whole" in error
    assert "not whole" in bhlog("verify", f"{bucket}/bh")[1]
    assert bhlog("replay", f"{bucket}/bh", "--alpha", 0.1, "--out", f"{bucket}/bh/replay")[0] == 0
    by_threads = server.files("bh/replay")
    server.delete("bh/replay")
    log.replay(0.1, out=f"{bucket}/bh/replay", executor=Backwards())  # each worker uploads its own
    assert server.files("bh/replay") == by_threads
    server.delete("bh/replay")
    bhlog("sweep", f"{bucket}/bh", "--save", f"{bucket}/p.parquet")
    from_file, from_log = (bhlog("sweep", f"{bucket}/{name}")[1] for name in ("p.parquet", "bh"))
    assert from_file == from_log
    open_log(f"{bucket}/native").fit().save(f"{bucket}/n.parquet")
    assert KdeModel.load(f"{bucket}/n.parquet").sha256 == open_log(f"{bucket}/native").fit().sha256
    for name in ("p.parquet", "n.parquet"):
        assert bhlog("verify", f"{bucket}/{name}")[0] == 0
        server.delete(name)


@pytest.mark.parametrize("fault", ["deny", "truncate", "late"])
def test_an_upload_that_fails_leaves_nothing_that_looks_whole(fault, server, bucket, bhlog):
    server.fault = fault if fault != "late" else None
    server.allowed = 1 if fault == "late" else None  # objects, then nothing is taken: no list
    code, _, error = bhlog("replay", f"{bucket}/bh", "--alpha", 0.1, "--out", f"{bucket}/bh/replay")
    assert code == 1 and error.count("\n") == 1 and "cannot write there" in error
    if fault != "late":
        code, _, error = bhlog("sweep", f"{bucket}/bh", "--save", f"{bucket}/p.parquet")
        assert code == 1 and "s3://logs/p.parquet: cannot be written" in error
    server.fault = server.allowed = None
    assert not [path for path in server.files() if "replay" in path or path == "p.parquet"]


def test_a_bucket_that_is_not_there_is_told_before_the_work(bucket, bhlog):
    for command in ("kde fit {}/bh --out {}/n.parquet", "sweep {}/bh --save {}/p.parquet"):
        words = command.format(bucket, "s3://nosuch").split(" ")
        code, out, error = bhlog(*words)
        assert (code, out) == (1, "") and "no such bucket (nosuch)" in error


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(403)

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


def test_a_store_that_refuses_gets_one_line(endpoint, monkeypatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(MissingRun, match=r"ACCESS_DENIED.*your credentials") as error:
            open_log("s3://logs/bh")
        server.shutdown()
    assert "\n" not in str(error.value)
