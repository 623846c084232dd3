"""A run in S3-compatible storage: each command answers as it does on the same run on disk."""

import http.server
import threading
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from moto.server import ThreadedMotoServer

from bhlog.analysis.cli import main
from bhlog.analysis.database.connection import connect
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import MissingRun
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

pytestmark = pytest.mark.slow

LAYERS = (0, 2)


@pytest.fixture(scope="module")
def endpoint():
    """HOST:PORT of an S3 server on this machine, which the environment names."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield f"{host}:{port}"
    server.stop()


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
def bucket(endpoint, runs) -> str:
    """The URI of the same folder in a bucket."""
    store = pafs.S3FileSystem(endpoint_override=endpoint, scheme="http", allow_bucket_creation=True)
    store.create_dir("logs")
    for file in runs.rglob("*.*"):
        if file.is_file():
            with store.open_output_stream(f"logs/{file.relative_to(runs)}") as stream:
                stream.write(file.read_bytes())
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
