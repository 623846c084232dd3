"""Several processes write one run, told apart by rank."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify
from bhlog.capture.contract.errors import InvalidOption, RunExists, WriterFailed
from bhlog.capture.contract.manifest import Manifest
from bhlog.capture.writing import meeting
from bhlog.capture.writing import writer as writing
from tests.capture.blocks import INFO, check_run, make_block, writer

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def launch(monkeypatch):
    """Ranks of one process, which no launcher started."""
    monkeypatch.setenv(meeting.LAUNCH, "test")


# what each of two processes does, under torchrun
_RANK = """
import json, os, sys, warnings
from pathlib import Path
warnings.simplefilter("error")
import torch
import torch.distributed as dist
from bhlog.capture.contract.errors import RunExists
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.observe import new_writer, observe, recording
from tests.capture.tiny import batch, tiny_model

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
torch.set_num_threads(1)
model = tiny_model()
told = {}

def log(name):
    try:
        with torch.no_grad(), observe(model, folder / name):
            for step in range(2 + rank):
                ids, mask = batch([3 + step, 2], left=True, seed=10 * rank + step)
                model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        told[name] = "written"
    except RunExists as error:
        told[name] = str(error)

dist.init_process_group("gloo")
log("together")
dist.barrier()
log("together")  # it is there now
patcher = RouterPatcher(model)
log_writer = new_writer(folder / "together", patcher.info, Routing(), resume=True)
with torch.no_grad(), recording(patcher, Routing(), None, log_writer):
    model(batch([4], seed=20 + rank)[0])
dist.barrier()
dist.destroy_process_group()
log("apart")
log("stale")
(folder / f"told{rank}.json").write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_two_processes_under_torchrun(tmp_path):
    writer(tmp_path / "stale").close()
    before = (tmp_path / "stale" / "run.json").read_bytes()
    script = tmp_path / "script.py"
    script.write_text(_RANK)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(script), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        told = json.loads((tmp_path / f"told{rank}.json").read_text())
        assert "is not empty" in told["together"] or "has written here" in told["together"]
        assert told["apart"] == "written"
        assert "not empty" in told["stale"] or "earlier launch" in told["stale"]
    assert (tmp_path / "stale" / "run.json").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "stale").iterdir()) == [
        "README.md", "routing", "run.json", "tokens",
    ]  # fmt: skip
    for name, sequences in (("together", {0: 5, 1: 7}), ("apart", {0: 4, 1: 6})):
        log = open_log(tmp_path / name)
        assert [finding for finding in verify(log) if finding.status == "error"] == []
        assert log.manifest.closed is not None
        rows = log.tokens().to_pylist()
        assert log.manifest.totals.tokens == len(rows)
        for rank, count in sequences.items():
            mine = [(r["sequence"], r["position"]) for r in rows if r["rank"] == rank]
            assert len(mine) == len(set(mine))
            assert {sequence for sequence, _ in mine} == set(range(count))
        assert {shard[:9] for shard in log.shards} == {"rank00000", "rank00001"}


@pytest.mark.slow
def test_ranks_that_hold_windows_of_equal_shape_verify(tmp_path):
    """Each rank counts sequences from 0: shards of two may tell of the same places."""
    text = tmp_path / "even.txt"
    text.write_text("".join(f"line {i:03d}: the same length each.\n" for i in range(32)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--no-python", str(Path(sys.executable).with_name("bhlog")), "capture", "demo",
         "--text", str(text), "--max-length", "128",
         "--out", str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    log = open_log(tmp_path / "run")
    places = [
        log.read_tokens(name, ["sequence", "position", "forward"]).to_pylist()
        for name in log.token_shards
    ]
    assert len(places) == 2 and places[0] == places[1]
    assert {finding.status for finding in verify(log)} == {"ok"}


def test_ranks_of_one_launch_share_a_run(run):
    first, second = writer(run, rank=0), writer(run, rank=1)
    first.submit(make_block(0))
    second.submit(make_block(1))
    first.close()
    assert open_log(run).manifest.closed is None  # one still writes
    second.close()
    assert sorted(check_run(run)) == [(s, p) for s in (0, 1) for p in range(10)]
    manifest = open_log(run).manifest
    assert manifest.closed and manifest.totals.tokens == 20 and len(manifest.shards) == 2


def test_a_rank_waits_for_rank_0_and_then_gives_up(run, monkeypatch):
    monkeypatch.setattr(meeting, "RANK_WAIT_SECONDS", 0.2)
    with pytest.raises(WriterFailed, match="rank 0 wrote no manifest"):
        writer(run, rank=1)


@pytest.mark.parametrize("stale", ["closed", "open", "written by this rank"])
@pytest.mark.parametrize("hours", [-2, 0, 2])
def test_a_rank_refuses_a_run_of_another_launch_whatever_clocks_say(run, stale, hours, monkeypatch):
    leader = writer(run)
    if stale == "written by this rank":
        writer(run, rank=1).close()
    else:
        made = (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")
        manifest = Manifest.from_json((run / "run.json").read_bytes(), "")
        replace(manifest, created=made, closed=made if stale == "closed" else None).write(run)
        monkeypatch.setenv(meeting.LAUNCH, "another")
        monkeypatch.setattr(meeting, "RANK_WAIT_SECONDS", 0.2)
    before = {path: path.read_bytes() for path in run.glob("*.json")}
    with pytest.raises(RunExists):
        writer(run, rank=1)
    assert {path: path.read_bytes() for path in run.glob("*.json")} == before
    leader.close()


def test_a_rank_of_an_unknown_launch_is_refused(run, monkeypatch):
    monkeypatch.delenv(meeting.LAUNCH)
    writer(run)
    with pytest.raises(InvalidOption, match="rank 1, but of which launch is not known"):
        writer(run, rank=1)


def test_a_slurm_step_is_a_launch(run, monkeypatch):
    monkeypatch.delenv(meeting.LAUNCH)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    first, second = writer(run), writer(run, rank=1)
    first.close()
    second.close()
    assert open_log(run).manifest.launch == "slurm 7.1"


@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_a_rank_that_wrote_nothing_is_missed(run, monkeypatch):
    monkeypatch.setattr(writing, "world_size", lambda: 2)
    first = writer(run)
    first.submit(make_block(0))
    (finding,) = (f for f in verify(open_log(run)) if "number 1 wrote nothing" in f.detail)
    assert finding.status == "warning"  # it may come
    first.close()
    assert open_log(run).missing == ("run.rank00001.json",)
    (finding,) = (f for f in verify(open_log(run)) if f.status == "error")
    assert finding.where == "run.rank00001.json" and "number 1 wrote nothing" in finding.detail


def test_a_rank_that_had_not_written_joins_a_resumed_run(run):
    writer(run).close()
    leader, late = writer(run, resume=True), writer(run, rank=1, resume=True)
    late.submit(make_block(3))
    late.close()
    leader.close()
    manifest = open_log(run).manifest
    assert manifest.totals.tokens == 10 and manifest.model == INFO
    assert check_run(run) == [(3, p) for p in range(10)]
