"""Runs in an object store: what is sealed is uploaded, and what is not waits on disk."""

import logging
import random
import threading
import time
from pathlib import Path

import pytest
import torch

import bhlog.capture.writing.uploads as uploads
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption, RouterLogError, RunExists, WriterFailed
from bhlog.capture.contract.manifest import Routing, Totals
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.observe import new_writer, observe
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.writing.place import Place
from tests.capture.blocks import LAYERS, check_run, make_block, no_errors, writer
from tests.capture.writing.test_kill import Nursery, kill, wait_for
from tests.object_store import object_store

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path):
    with object_store(tmp_path / "cache") as server:
        yield server


@pytest.fixture
def uri(server) -> str:
    return f"s3://{server.bucket}/some/run"


@pytest.fixture
def quick(monkeypatch):
    """A store that is away is soon given up."""
    monkeypatch.setattr(uploads, "_HURRY_SECONDS", 0.5)


def staged(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*.parquet"))


def log_blocks(log_writer, numbers) -> None:
    for number in numbers:
        log_writer.submit(make_block(number))


def test_shards_are_those_of_a_run_on_disk_and_the_manifest_comes_last(server, uri, run, tmp_path):
    for where in (run, uri):
        with_both = writer(where, shard_rows=100)
        log_blocks(with_both, range(30))
        with_both.close()
    files = server.files("some/run")
    on_disk = {p.relative_to(run).as_posix(): p for p in run.rglob("*") if p.is_file()}
    assert {path.removeprefix("some/run/") for path in files} == set(on_disk)
    for path, file in on_disk.items():
        assert path == "run.json" or files[f"some/run/{path}"] == file.read_bytes()
    assert open_log(uri).manifest.shards == open_log(run).manifest.shards
    no_errors(uri)
    order = [path.rpartition("/run/")[2] for path in server.puts if "/run/" in path]
    shards = [f"{f}/rank00000-{n:05d}.parquet" for n in range(6) for f in ("tokens", "routing")]
    assert order == ["README.md", "run.json", *shards, "run.json"]
    assert not (tmp_path / "cache" / "bhlog" / "staging" / Place.of(uri).folder.name).exists()


def test_a_store_that_is_away_is_waited_for_and_in_the_end_the_model_waits(
    server, uri, tmp_path, caplog
):
    limit = 20_000
    waiting = writer(uri, shard_rows=40, queue_bytes=limit, threads=1)
    server.fault = "503"
    submitted = 0

    def submit() -> None:
        nonlocal submitted
        for number in range(60):
            waiting.submit(make_block(number))
            submitted += 1

    thread = threading.Thread(target=submit, daemon=True)
    thread.start()
    wait_for(lambda: bool(caplog.records))
    assert "SLOW_DOWN" in caplog.text and "asking again for up to 300 s" in caplog.text
    assert submitted < 60 and thread.is_alive()
    sizes = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.parquet")]
    assert limit / 2 < sum(sizes) <= limit + 3 * 2 * max(sizes)  # of pairs, three are in work
    assert open_log(uri).shards == ()
    server.fault = None
    thread.join(30)
    waiting.close()
    assert check_run(uri) == [(s, p) for s in range(60) for p in range(10)]


def test_an_error_says_what_is_where_and_resume_loses_nothing(server, uri, tmp_path, quick):
    broken = writer(uri, shard_rows=100, store_seconds=0.5)
    log_blocks(broken, range(5))
    broken.flush()
    server.stop()  # connections are refused from here on
    log_blocks(broken, range(5, 15))
    with pytest.raises(WriterFailed) as error:
        broken.close()
    says = str(error.value)
    folder = Place.of(uri).folder
    assert f"{uri}: writing stopped" in says and "NETWORK_CONNECTION" in says
    assert f"1 shards are there and whole; 2 more wait in {folder}" in says and "--resume" in says
    assert len(staged(tmp_path)) == 4 and "\n" not in says
    server.start()
    assert len(check_run(uri)) == 50  # it reads as a run that was killed
    resumed = writer(uri, shard_rows=100, resume=True)
    assert (resumed.next_sequence, staged(tmp_path)) == (15, [])
    log_blocks(resumed, range(15, 20))
    resumed.close()
    assert check_run(uri) == [(s, p) for s in range(20) for p in range(10)]
    assert open_log(uri).manifest.totals == Totals(rows=400, tokens=200, shards=4, forwards=20)
    no_errors(uri)


def test_ctrl_c_while_the_store_is_away_keeps_the_rows_on_disk(server, uri, model, tmp_path, quick):
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), observe(model, uri, pad_token_id=0):
        model(torch.arange(1, 40)[None])
        server.fault = "deny"
        raise KeyboardInterrupt
    assert len(staged(tmp_path)) == 2 and open_log(uri).shards == ()
    server.fault = None
    with pytest.raises(RunExists), observe(model, uri):
        pass
    resumed = new_writer(uri, RouterPatcher(model).info, Routing(), resume=True)
    resumed.close()
    log = open_log(uri)
    assert log.manifest.totals.tokens == 39 and log.manifest.error is None
    no_errors(uri)


def test_what_arrives_cut_short_is_removed_and_never_listed(server, uri, tmp_path, quick):
    cut = writer(uri, shard_rows=100, store_seconds=0.2)
    server.fault = "truncate"
    log_blocks(cut, range(5))
    with pytest.raises(WriterFailed, match=r"[\d,]+ of [\d,]+ bytes arrived of what was uploaded"):
        cut.close()
    server.fault = None
    assert not [path for path in server.files() if path.endswith(".parquet")]
    resumed = writer(uri, resume=True)
    resumed.close()
    assert len(check_run(uri)) == 50
    no_errors(uri)


def test_killed_at_random_moments_and_resumed(server, tmp_path):
    """kill -9: what came to the store reads, what did not is found in the staging folder."""
    place = f"endpoint_override={server.endpoint}&scheme=http&region=us-east-1"
    uri = f"s3://key:secret@{server.bucket}/run?{place}"
    server.delay = 0.002
    rng, notes, before = random.Random(0), tmp_path / "notes", 0
    notes.write_text("0")
    nursery = Nursery("test_kill")
    for turn in range(2):
        child = nursery.start("log_blocks_for_ever", uri, int(turn > 0), notes)
        wait_for(lambda before=before: int(notes.read_text() or 0) > before)
        time.sleep(rng.uniform(0, 0.5))
        flushed = int(notes.read_text() or 0)
        kill(child)
        log = open_log(uri)
        assert log.manifest.closed is None
        orphans = set(log.token_shards) - set(log.shards)
        assert orphans <= {log.token_shards[-1]}
        tables = [log.read_tokens(name, ["sequence", "position"]) for name in log.shards]
        rows = {(row["sequence"], row["position"]) for t in tables for row in t.to_pylist()}
        sequences = 1 + max(s for s, _ in rows)
        assert rows == {(s, p) for s in range(sequences) for p in range(5 + s % 7)}
        assert sequences >= max(flushed, before)
        before = sequences
    nursery.close()
    last = writer(uri, resume=True)
    assert last.next_sequence >= before  # what waited on disk is there, too
    last.close()
    tokens = check_run(uri)
    assert tokens == [(s, p) for s in range(last.next_sequence) for p in range(5 + s % 7)]
    totals = open_log(uri).manifest.totals
    assert (totals.rows, totals.forwards) == (len(tokens) * len(LAYERS), last.next_sequence)
    assert not staged(tmp_path)
    no_errors(uri)


def test_ranks_share_a_run(server, uri, monkeypatch):
    monkeypatch.setenv("BHLOG_LAUNCH", "this")
    first, second = writer(uri, rank=0), writer(uri, rank=1)
    first.submit(make_block(0))
    first.close()
    second.submit(make_block(1))
    assert open_log(uri).manifest.closed is None
    second.close()
    assert sorted(check_run(uri)) == [(s, p) for s in (0, 1) for p in range(10)]
    assert open_log(uri).manifest.ranks == 1 and len(open_log(uri).manifest.shards) == 2
    with pytest.raises(RunExists, match="rank 1 has written here before"):
        writer(uri, rank=1)
    with pytest.raises(RunExists, match="not empty"):
        writer(uri)


def test_a_null_model_is_fitted_into_a_store(server, uri, model, monkeypatch):
    null = f"s3://{server.bucket}/null.parquet"
    with torch.no_grad(), observe(model, uri, fit_kde=null, pad_token_id=0):
        model(torch.arange(40)[None])
    assert KdeModel.load(null).sha256 == open_log(uri).fit().sha256
    monkeypatch.setenv("WORLD_SIZE", "2")
    null = "s3://AKIAKEY:hunter2@b/null.parquet"
    with (
        pytest.raises(InvalidOption, match="2 ranks count into files") as error,
        observe(model, uri, fit_kde=null),
    ):
        pass
    assert "hunter2" not in str(error.value)


def test_staged_shards_of_a_run_that_went_on_elsewhere_are_refused(
    server, uri, tmp_path, quick, monkeypatch
):
    here = writer(uri, shard_rows=100, store_seconds=0.2)
    server.fault = "deny"
    log_blocks(here, range(5))
    with pytest.raises(WriterFailed):
        here.close()
    server.fault = None
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
        there = writer(uri, resume=True)
        log_blocks(there, range(7))
        there.close()
    with pytest.raises(RouterLogError, match="went on from another machine") as error:
        writer(uri, resume=True)
    assert str(Place.of(uri).folder) in str(error.value) and len(staged(tmp_path)) == 2
    assert len(check_run(uri)) == 70


@pytest.mark.parametrize(("fault", "says"), [("deny", "ACCESS_DENIED"), (None, "NO_SUCH_BUCKET")])
def test_a_store_that_takes_nothing_is_one_line_and_leaves_nothing(
    server, tmp_path, quick, fault, says
):
    server.fault = fault
    bucket = server.bucket if fault else "nosuchbucket"
    uri = f"s3://AKIAKEY:hunter2@{bucket}/run"
    with pytest.raises(RouterLogError, match=says) as error:
        writer(uri)
    text = str(error.value)
    assert f"s3://{bucket}/run: the run cannot be written there" in text
    assert "hunter2" not in text and "AKIAKEY" not in text and "\n" not in text
    assert text.endswith("check the bucket, its endpoint and your credentials")
    assert not list((tmp_path / "cache").rglob("*.*")) and server.files() == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(RouterLogError, match=r"file.*choose another --staging"):
        writer(f"s3://{server.bucket}/run", staging=str(tmp_path / "file"))


def test_a_slow_store_does_not_slow_the_model(server, uri, run, caplog):
    """Paired: the same blocks at the same pace, on disk and to a server that takes its time."""

    def seconds(where: str | Path) -> float:
        log_writer = writer(where, shard_rows=100)
        began = time.monotonic()
        for number in range(40):
            log_writer.submit(make_block(number))
            time.sleep(0.005)
        spent = time.monotonic() - began
        log_writer.close()
        return spent

    on_disk = seconds(run)
    server.delay = 0.02
    with caplog.at_level(logging.WARNING, "bhlog"):
        in_store = seconds(uri)
    server.delay = 0
    assert in_store < 1.2 * on_disk
    assert not caplog.records and len(check_run(uri)) == 400
