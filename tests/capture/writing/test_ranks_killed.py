"""kill -9 of one of two gloo ranks, or of both: verify names what is missing, a resume goes on."""

import os
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.writing.writer import RunWriter, WriterOptions
from tests.capture.blocks import INFO, LAYERS, logit, make_block
from tests.capture.writing.test_kill import Nursery, kill, wait_for

pytestmark = pytest.mark.slow

TURNS = 15  # a third of them kills both: 20 kills


def log_as_rank(run: str, rank: str, meeting: str, resume: str, last: str) -> None:
    """A child: one of two ranks, which logs blocks up to the `last`, or until told to stop."""
    os.environ.update(RANK=rank, WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
    writer = RunWriter(
        run,
        INFO,
        Routing(),
        options=WriterOptions(shard_rows=200),
        rank=int(rank),
        resume=bool(int(resume)),
    )
    Path(f"{meeting}.{rank}").touch()
    number = writer.next_sequence
    while number < int(last) and not Path(f"{meeting}.stop").exists():
        token_id = torch.arange(5 + number % 7) + 100 * number + 1_000_000 * int(rank)
        writer.submit(make_block(number, len(token_id), token_id=token_id))
        writer.checkpoint()
        number += 1
        time.sleep(0.002)
    writer.close()
    Path(f"{meeting}.{rank}.closed").touch()
    os._exit(0)  # the other may be dead


def logged(run: Path, rank: int) -> int:
    """How many whole blocks a rank has logged, each as it was made."""
    log = open_log(run)
    tokens = [
        (row["sequence"], row["position"])
        for row in log.tokens().to_pylist()
        if row["rank"] == rank
    ]
    blocks = 1 + max((sequence for sequence, _ in tokens), default=-1)
    assert tokens == [(s, p) for s in range(blocks) for p in range(5 + s % 7)]
    for batch in log.batches(["rank", "layer", "sequence", "position", "logits"]):
        for row in batch.to_pylist():
            expected = logit(row["layer"], row["sequence"], row["position"])
            assert row["layer"] in LAYERS and row["logits"] == expected.tolist()
    return blocks


def test_killed_twenty_times_one_or_both_and_resumed(run, tmp_path):
    nursery = Nursery("test_ranks_killed")
    dice = random.Random(0)
    before = [0, 0]
    killed = {(0,): 0, (1,): 0, (0, 1): 0}
    for turn in range(TURNS + 1):
        meeting, resume = tmp_path / f"meeting{turn}", int(turn > 0)
        last = 10**6 if turn < TURNS else max(before) + 10
        children = [
            nursery.start("log_as_rank", run, rank, meeting, resume, last) for rank in (0, 1)
        ]
        if turn == TURNS:
            wait_for(lambda m=meeting: all(Path(f"{m}.{r}.closed").exists() for r in (0, 1)))
            break
        wait_for(lambda m=meeting: all(Path(f"{m}.{r}").exists() for r in (0, 1)))
        time.sleep(dice.uniform(0.0, 0.2))
        victims = list(killed)[turn % 3]
        killed[victims] += 1
        for rank in victims:
            kill(children[rank])
        Path(f"{meeting}.stop").touch()
        for rank in {0, 1} - {*victims}:
            wait_for(lambda m=meeting, r=rank: Path(f"{m}.{r}.closed").exists())
        findings = verify(open_log(run))
        said = [f for f in findings if f.status == "error"]
        assert said == [], said
        assert any("not closed" in f.detail for f in findings if f.status != "ok"), findings
        now = [logged(run, rank) for rank in (0, 1)]
        assert all(n >= b for n, b in zip(now, before, strict=True))
        before = now
    assert min(killed.values()) == 5 and min(before) > 20
    assert [logged(run, rank) for rank in (0, 1)] == [max(before) + 10] * 2
    assert [f for f in verify(open_log(run)) if f.status == "error"] == []
    assert open_log(run).manifest.closed
    nursery.close()
