"""kill -9 at random moments: what is sealed stays whole, and the next process goes on."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from bhlog.analysis.run import open_log
from bhlog.capture.contract.manifest import Routing, Totals
from bhlog.capture.observe import new_writer, recording
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.writing.writer import WriterOptions
from tests.capture.blocks import LAYERS, check_run, make_block, no_errors, writer
from tests.capture.tiny import batch, check_logits, read, tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


# Forks a child for each line of arguments and prints its process id: torch is imported once.
_NURSERY = """
import os, signal, sys, tests.capture.tiny, tests.capture.writing.MODULE as tests
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
    log_writer = writer(run, resume=bool(int(resume)), shard_rows=400)
    number = log_writer.next_sequence
    while True:
        log_writer.submit(make_block(number, 5 + number % 7))
        number += 1
        if number % 32 == 0:
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
    """Starts children quickly, whose functions are of a module of this folder."""

    def __init__(self, module: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY.replace("MODULE", module)],
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
    nursery = Nursery("test_kill")
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
        if turn % 4 == 0:  # however slow the machine, some get far
            wait_for(lambda before=before: int(notes.read_text() or 0) > before)
        time.sleep(rng.uniform(0.0, 0.5))
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
