"""Things that go wrong while a run is written: what is sealed stays whole, and the caller knows."""

import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import capture.shard
import capture.writer as writer_module
from analysis.log import open_log
from analysis.verification import verify
from capture.bh import BhOptions
from capture.buffer import Buffer
from capture.errors import CorruptShard, InvalidOption, RouterLogError, WriterFailed
from capture.manifest import Routing, Totals
from capture.patch import RouterPatcher
from capture.run import new_writer, observe, recording, route
from capture.writer import Block, RunWriter, WriterOptions
from tests.capture.blocks import EXPERTS, INFO, LAYERS, check_run, make_block, writer
from tests.capture.tiny import batch, check_logits, observed, read, real_tokens, tiny_model
from tests.synthetic import normal_kde

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def no_errors(run: Path) -> None:
    findings = [finding for finding in verify(open_log(run)) if finding.status == "error"]
    assert findings == []


# Forks a child for each line of arguments and prints its process id: torch is imported once.
_NURSERY = """
import os, signal, sys, tests.capture.tiny, tests.capture.test_faults as tests
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        name, *args = line.split()
        getattr(tests, name)(*args)
        os._exit(0)
    print(pid, flush=True)
"""


def log_blocks_for_ever(run: str, resume: str, notes: str) -> None:
    """A child: logs hand-made blocks, and notes after each flush how many are on disk."""
    log_writer = writer(Path(run), resume=bool(int(resume)), shard_rows=200)
    number = log_writer.next_sequence
    while True:
        log_writer.submit(make_block(number, 5 + number % 7))
        number += 1
        if number % 16 == 0:
            log_writer.flush()
            Path(notes).write_text(str(number))
        time.sleep(0.002)  # keeps the run small


def log_a_model_for_ever(run: str, resume: str, notes: str) -> None:
    """A child: generates with a real model."""
    torch.set_num_threads(1)
    model = tiny_model()
    patcher = RouterPatcher(model)
    options = WriterOptions(shard_rows=200)
    log_writer = new_writer(run, patcher.info, Routing(), options=options, resume=bool(int(resume)))
    with torch.no_grad(), recording(patcher, Routing(), None, log_writer):
        while True:
            ids, mask = batch([4, 7, 2], left=True, seed=log_writer.next_sequence)
            model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)


class Nursery:
    """Starts children quickly."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def start(self, *args: object) -> int:
        """The process id of a child that does what args say."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, args)) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def kill(child: int) -> None:
    """kill -9, and wait until it is gone."""
    os.kill(child, signal.SIGKILL)
    with suppress(ProcessLookupError):
        while True:
            os.kill(child, 0)
            time.sleep(0.001)


def drop_orphan(run: Path) -> None:
    """Killed between the two renames of a pair, the last tokens shard stands alone."""
    log = open_log(run)
    orphans = set(log.token_shards) - set(log.shards)
    assert orphans <= set(log.token_shards[-1:])
    for name in orphans:
        (run / "tokens" / name).unlink()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_twenty_times_at_random_moments_and_resumed(run, tmp_path, nursery):
    """kill -9: what is sealed reads and pairs up, and the next process goes on behind it."""
    rng, notes = random.Random(0), tmp_path / "notes"
    notes.write_text("0")
    before = 0
    for turn in range(20):
        child = nursery.start("log_blocks_for_ever", run, int(turn > 0), notes)
        wait_for(lambda: (run / "run.json").exists())
        time.sleep(rng.uniform(0.0, 0.7))
        flushed = int(notes.read_text() or 0)
        kill(child)
        no_errors(run)
        assert open_log(run).manifest.closed is None
        drop_orphan(run)
        tokens = check_run(run)
        # a prefix of what was logged, without a gap: only unsealed rows are missing
        sequences = 1 + max((sequence for sequence, _ in tokens), default=-1)
        assert tokens == [(s, p) for s in range(sequences) for p in range(5 + s % 7)]
        assert sequences >= max(flushed, before)
        before = sequences
    assert before > 20
    last = writer(run, resume=True)
    assert last.next_sequence == last.next_forward == before
    last.close()
    totals = open_log(run).manifest.totals
    assert totals == Totals(
        rows=len(tokens) * len(LAYERS), tokens=len(tokens), shards=totals.shards, forwards=before
    )
    assert not list(run.rglob("*.part"))
    no_errors(run)


def test_killed_while_a_model_generates_and_resumed(run, tmp_path, nursery, model):
    for turn in range(3):
        child = nursery.start("log_a_model_for_ever", run, int(turn > 0), tmp_path / "notes")
        wait_for(
            lambda turn=turn: (run / "run.json").exists() and len(open_log(run).shards) > 2 * turn
        )
        kill(child)
        no_errors(run)
        drop_orphan(run)
        logged = read(run, closed=False)
        forwards = [f for by in logged.forward.values() for f in by.values()]
        assert set(range(max(forwards) + 1)) == set(forwards)
    check_logits(model, logged, sorted(logged.tokens)[:6])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs privileges")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def noise(number: int) -> Block:
    """A block that zstd cannot shrink much."""
    falling = torch.randn(len(LAYERS), 200, EXPERTS).sort(dim=-1).values  # as its experts are
    return make_block(number, 200, logits=falling)


def write_until_it_fails(log_writer: RunWriter) -> int:
    """Submit until the error arrives; how many blocks that took."""
    for number in range(10_000):
        try:
            log_writer.submit(noise(number))
        except WriterFailed:
            return number + 1
    raise AssertionError("the writer never failed")


def after_failure(run: Path, log_writer: RunWriter, words: str, submitted: int) -> None:
    """The error came once; what was sealed is whole, and the manifest says what happened."""
    log_writer.submit(make_block(0, 1))  # goes nowhere, quietly
    log_writer.flush()
    log_writer.close()
    assert not list(run.glob("*/*.part"))
    log = open_log(run)
    assert log.shards == log.token_shards
    assert sum(batch.num_rows for batch in log.batches(["logits"])) == log.tokens().num_rows * 2
    assert [f for f in verify(log) if f.status == "error"] == []
    if log.manifest.closed:
        assert words in log.manifest.error
        totals = log.manifest.totals
        assert totals.shards == len(log.shards)
        assert totals.tokens + totals.dropped == submitted


def test_a_full_disk_stops_the_log_and_spares_what_is_sealed(small_disk):
    run = small_disk / "run"
    log_writer = writer(run, shard_rows=400)
    with pytest.raises(WriterFailed, match="No space left"):
        for number in range(10_000):
            log_writer.submit(noise(number))
    after_failure(run, log_writer, "No space left", 200 * (number + 1) + 1)
    assert open_log(run).shards


@pytest.mark.parametrize("folder", ["tokens", "routing"])
@pytest.mark.parametrize("moment", ["open", "write", "seal"])
def test_a_shard_that_fails_at_any_moment_leaves_no_half(run, monkeypatch, folder, moment):
    full = OSError(errno.ENOSPC, "No space left on device")
    log_writer = writer(run, shard_rows=20, threads=1)
    log_writer.submit(make_block(0))
    log_writer.flush()

    def fails(name: str, real: Any) -> Any:
        def call(path: Path, *args: Any) -> Any:
            if path.parent.name == folder:
                if name == "write":
                    next(iter(args[0]))
                raise full
            return real(path, *args)

        return call

    if moment == "seal":
        monkeypatch.setattr(writer_module, "seal", fails("seal", capture.shard.seal))
    else:
        monkeypatch.setattr(writer_module, "write_part", fails(moment, capture.shard.write_part))
    with pytest.raises(WriterFailed, match="No space left"):
        log_writer.submit(make_block(1))
        log_writer.flush()
    monkeypatch.undo()
    after_failure(run, log_writer, "No space left", 21)
    assert len(check_run(run)) == 10
    resumed = writer(run, resume=True)
    resumed.submit(make_block(1))
    resumed.close()
    assert len(check_run(run)) == 20
    no_errors(run)


def test_a_file_limit_in_the_middle_of_a_shard(run):
    """The real thing: the system refuses to let the file grow."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log_writer = writer(run, shard_rows=4000)
    log_writer.submit(make_block(0))
    log_writer.flush()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        blocks = write_until_it_fails(log_writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, before)
    after_failure(run, log_writer, "File too large", 10 + 200 * blocks + 1)
    assert len(check_run(run)) == 10


def test_a_manifest_that_cannot_be_written_is_told_at_close(run, monkeypatch):
    log_writer = writer(run)
    log_writer.submit(make_block(0))

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module.Manifest, "write", full)
    with pytest.raises(WriterFailed, match="No space left"):
        log_writer.close()
    log_writer.close()
    assert len(check_run(run)) == 10
    assert open_log(run).manifest.closed is None


def break_gathering(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    calls = 0
    add = Buffer.add

    def broken(buffer: Buffer, *args: Any, **kwargs: Any) -> Totals:
        nonlocal calls
        calls += 1
        if calls > after:
            raise RuntimeError("out of ink")
        return add(buffer, *args, **kwargs)

    monkeypatch.setattr(Buffer, "add", broken)


def test_a_writer_error_reaches_the_next_forward_once(model, run, monkeypatch):
    break_gathering(monkeypatch, after=1)
    monkeypatch.setattr("capture.recorder._BULK_ROWS", 1)
    ids, _ = batch([5])
    raised = 0
    with observed(model, run, options=WriterOptions(shard_rows=1)) as patcher:
        before = None
        for _ in range(20):
            try:
                output = model(ids).logits
                assert before is None or torch.equal(output, before)
                before = output
            except WriterFailed as error:
                raised += 1
                assert "out of ink" in str(error) and isinstance(error.__cause__, RuntimeError)
            time.sleep(0.01)
        writer_ = patcher.recorder.writer
    assert raised == 1
    assert not writer_._queue and writer_._queued_bytes == 0  # later rows do not pile up
    log = open_log(run)
    assert log.manifest.error == "RuntimeError: out of ink"
    assert log.tokens().num_rows == 5
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_a_writer_error_at_the_end_reaches_the_caller_at_close(model, run, monkeypatch):
    break_gathering(monkeypatch, after=0)
    with pytest.raises(WriterFailed, match="out of ink"), observed(model, run):
        model(batch([5])[0])
    assert open_log(run).manifest.error == "RuntimeError: out of ink"


def test_a_waiting_submit_is_let_go_by_an_error(run, monkeypatch):
    hold = threading.Event()

    def broken(*args: Any, **kwargs: Any) -> None:
        hold.wait(20)
        raise RuntimeError("out of ink")

    monkeypatch.setattr(Buffer, "add", broken)
    log_writer = writer(run, queue_bytes=1)
    log_writer.submit(make_block(0))
    threading.Timer(0.1, hold.set).start()
    with pytest.raises(WriterFailed, match="out of ink"):
        log_writer.submit(make_block(1))
    log_writer.close()


def test_the_callers_error_goes_before_the_writers(model, run, monkeypatch):
    break_gathering(monkeypatch, after=0)
    with pytest.raises(ZeroDivisionError), observed(model, run):
        model(batch([5])[0])
        raise ZeroDivisionError
    assert open_log(run).manifest.error == "RuntimeError: out of ink"


@pytest.mark.parametrize("where", ["first layer", "last layer", "router", "head", "before"])
def test_a_model_that_fails_keeps_what_came_before(model, run, where):
    ids, mask = batch([6, 4])
    modules = {
        "first layer": model.model.layers[0],
        "last layer": model.model.layers[-1].mlp.experts,
        "router": model.model.layers[1].mlp.gate,
        "head": model.lm_head,
        "before": model.model.embed_tokens,
    }

    class Boom(RuntimeError):
        pass

    def boom(module: Any, args: Any, *output: Any) -> None:
        raise Boom

    with pytest.raises(Boom), observed(model, run):
        model(ids, attention_mask=mask)
        handle = modules[where].register_forward_hook(boom)
        try:
            model(ids, attention_mask=mask)
        finally:
            handle.remove()
    logged = read(run)
    assert list(logged.sequences.values()) == real_tokens(ids, mask)
    manifest = logged.log.manifest
    assert manifest.closed and manifest.error == "Boom" and manifest.totals.forwards == 1
    no_errors(run)
    with torch.no_grad():
        model(ids, attention_mask=mask)


def test_a_failed_forward_is_forgotten_and_the_next_is_logged(model, run):
    ids, _ = batch([6])
    with observed(model, run):
        with pytest.raises(IndexError):
            model(torch.tensor([[10**6]]))
        model(ids)
    assert list(read(run).sequences.values())[-1] == ids[0].tolist()


@pytest.mark.parametrize("moment", ["between", "inside"])
def test_ctrl_c_leaves_a_closed_run(model, run, moment):
    ids, mask = batch([6, 4])

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), observed(model, run):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        if moment == "between":
            raise KeyboardInterrupt
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        try:
            model(ids, attention_mask=mask)
        finally:
            handle.remove()
    logged = read(run)
    assert logged.log.manifest.closed
    assert logged.log.manifest.error == "KeyboardInterrupt"
    assert len(logged.tokens) == 2
    no_errors(run)
    with torch.no_grad():  # nothing of the interrupted forward is left
        model(ids, attention_mask=mask)


def test_resume_goes_on_with_numbers_and_counts(run):
    first = writer(run, sample_every=2, shard_rows=30)
    for number in range(5):
        first.submit(make_block(number))
    first.close(KeyboardInterrupt())
    before = open_log(run).manifest
    assert before.error == "KeyboardInterrupt"
    second = writer(run, sample_every=2, shard_rows=30, resume=True)
    assert (second.next_sequence, second.next_forward) == (5, 5)
    for number in range(5, 8):
        second.submit(make_block(number))
    second.close()
    after = open_log(run).manifest
    assert check_run(run) == [(s, p) for s in range(8) for p in range(0, 10, 2)]
    assert (after.run_id, after.created, after.error) == (before.run_id, before.created, None)
    assert after.totals == Totals(
        rows=80, tokens=40, shards=len(after.shards), forwards=8, sampled_out=40
    )
    names = [shard.name for shard in after.shards]
    assert names == [f"rank00000-{i:05d}.parquet" for i in range(len(names))]


def test_a_resumed_model_goes_on_with_its_numbers(model, run):
    ids, mask = batch([4, 3], left=True)
    patcher = RouterPatcher(model)
    for resume in (False, True, True):
        log_writer = new_writer(run, patcher.info, Routing(), resume=resume)
        with torch.no_grad(), recording(patcher, Routing(), None, log_writer):
            model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    logged = read(run)
    assert list(logged.sequences) == list(range(6))
    assert {f for by in logged.forward.values() for f in by.values()} == set(range(9))
    check_logits(model, logged)


def test_one_writer_for_two_patches_gives_no_number_twice(model, run):
    ids, _ = batch([4, 3])
    patcher = RouterPatcher(model)
    log_writer = new_writer(run, patcher.info, Routing())
    for _ in range(2):
        patcher.attach(Routing(), writer=log_writer)
        with patcher, torch.no_grad():
            model(ids)
    log_writer.close()
    assert list(read(run).sequences.values()) == ids.tolist() * 2


def test_resume_cleans_up_and_replaces_half_a_pair(run):
    first = writer(run, shard_rows=1)
    for number in range(3):
        first.submit(make_block(number))
    first.close()
    (run / "routing" / "rank00000-00002.parquet").unlink()
    (run / "routing" / "rank00000-00003.parquet.part").write_bytes(b"PAR1")
    (run / "run.json.part").write_text("{")
    second = writer(run, resume=True)
    assert second.next_sequence == 2
    second.submit(make_block(2))
    second.close()
    assert len(check_run(run)) == 30
    assert not list(run.rglob("*.part"))
    no_errors(run)


def test_resume_of_a_run_whose_shards_say_nothing_of_progress(run, monkeypatch):
    monkeypatch.setattr(writer_module.Progress, "metadata", lambda self: {})
    first = writer(run, shard_rows=1)
    for number in range(3):
        first.submit(make_block(number))
    first.flush()
    second = writer(run, resume=True)
    assert (second.next_sequence, second.next_forward) == (3, 3)
    second.close()
    assert open_log(run).manifest.totals == Totals(rows=60, tokens=30, shards=3, forwards=3)
    first.close()


def test_resume_refuses_what_does_not_fit(run, tmp_path):
    with pytest.raises(RouterLogError, match="no run to resume"):
        writer(tmp_path / "nothing", resume=True)
    kde, other = normal_kde(LAYERS), normal_kde(range(9))
    routing = Routing("bh", BhOptions(alpha=0.3))
    RunWriter(run, INFO, routing, kde=kde).close()
    RunWriter(run, INFO, routing, kde=kde, resume=True).close()
    for mistake in (
        {"options": WriterOptions(sample_every=3)},
        {"options": WriterOptions(token_ids=False)},
        {"routing": Routing()},
        {"routing": Routing("bh", BhOptions(alpha=0.2))},
        {"kde": other},
    ):
        arguments: dict[str, Any] = {"routing": routing, "kde": kde, **mistake}
        with pytest.raises(InvalidOption, match="resume"):
            RunWriter(run, INFO, arguments.pop("routing"), resume=True, **arguments)


def test_resume_stops_at_a_broken_shard(run):
    first = writer(run)
    first.submit(make_block(0))
    first.close()
    path = run / "routing" / "rank00000-00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptShard, match="broken shard"):
        writer(run, resume=True)


def test_no_thread_outlives_its_run(model, run):
    before = set(threading.enumerate())
    with observe(model, run), torch.no_grad():
        model(batch([4])[0])
    with route(model, alpha=0.3, kde=normal_kde(range(3))), torch.no_grad():
        model(batch([4])[0])
    assert [thread for thread in threading.enumerate() if thread not in before] == []
