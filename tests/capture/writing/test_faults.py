"""Things that go wrong while a run is written: what is sealed stays whole, and the caller knows."""

import errno
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bhlog.capture.contract.files
import bhlog.capture.writing.sealer as sealer_module
import bhlog.capture.writing.writer as writer_module
from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify
from bhlog.capture.contract.errors import WriterFailed
from bhlog.capture.contract.manifest import Totals
from bhlog.capture.observe import observe, route
from bhlog.capture.writing.buffer import Buffer
from bhlog.capture.writing.writer import Block, RunWriter, WriterOptions
from tests.capture.blocks import EXPERTS, LAYERS, check_run, make_block, no_errors, writer
from tests.capture.tiny import batch, observed, read, real_tokens
from tests.synthetic import normal_kde


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
        monkeypatch.setattr(sealer_module, "seal", fails("seal", bhlog.capture.contract.files.seal))
    else:
        monkeypatch.setattr(
            sealer_module, "write_part", fails(moment, bhlog.capture.contract.files.write_part)
        )
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
    assert open_log(run).manifest.totals.dropped == 0  # what was lost is there now
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
    monkeypatch.setattr("bhlog.capture.recorder._BULK_ROWS", 1)
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
    assert writer_._queue.close() == [] and writer_._queue.bytes == 0  # later rows do not pile up
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
    manifest = logged.manifest
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
    assert logged.manifest.closed
    assert logged.manifest.error == "KeyboardInterrupt"
    assert len(logged.tokens) == 2
    no_errors(run)
    with torch.no_grad():  # nothing of the interrupted forward is left
        model(ids, attention_mask=mask)


def test_no_thread_outlives_its_run(model, run):
    before = set(threading.enumerate())
    with observe(model, run), torch.no_grad():
        model(batch([4])[0])
    with route(model, alpha=0.3, kde=normal_kde(range(3))), torch.no_grad():
        model(batch([4])[0])
    assert [thread for thread in threading.enumerate() if thread not in before] == []
