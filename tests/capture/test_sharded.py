"""A model over several processes is logged once, whichever way it is spread. See sharded.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bhlog.capture import parallel
from bhlog.capture.contract.errors import InvalidOption, RouterLogError
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.parallel import Group
from tests.capture.tiny import TRANSFORMERS_4

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(TRANSFORMERS_4, reason="its plans for OLMoE are others")
@pytest.mark.parametrize(
    "mode, processes",
    [("dp", 2), ("fsdp", 2), ("tp", 2), ("ep", 2), ("mismatch", 2), ("grid", 4)],
)
def test_each_token_is_logged_once(tmp_path, mode, processes):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc-per-node={processes}", str(Path(__file__).with_name("sharded.py")), mode],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SHARDED_DIR": str(tmp_path),
             "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    kinds = ["rank 0 refused", "rank 1 refused"] if mode == "mismatch" else ["observe", "route"]
    assert all(kind in done.stdout for kind in kinds)


class _Mesh:
    """2 x 2 devices, seen from rank 3."""

    def __init__(self, *names: str) -> None:
        self.mesh_dim_names = names or None
        self.ndim = 2
        self.mesh = torch.arange(4).reshape(2, 2)

    def get_coordinate(self) -> list[int]:
        return [1, 1]


@pytest.mark.parametrize(
    "names, ranks",
    [
        (("dp", "tp"), [2, 3]),
        (("tp", "fsdp"), [1, 3]),
        (("pp", "tp"), [0, 1, 2, 3]),
        (("dp_replicate", "dp_shard"), [3]),
        ((), [0, 1, 2, 3]),
    ],
)
def test_a_mesh_says_which_ranks_see_the_same_tokens(names, ranks):
    assert parallel._same_tokens(_Mesh(*names)) == ranks


def test_a_dimension_of_an_unknown_kind_is_refused():
    with pytest.raises(InvalidOption, match='"cp" is not known'):
        parallel._same_tokens(_Mesh("dp", "cp"))


def test_a_model_that_is_not_spread_is_a_group_of_its_own():
    group = Group.of(nn.Linear(2, 2))
    assert group == Group((0,), 0, 0, 1) and group.writes
    group.check_alike(Routing(), iter(()))
    assert group.once(lambda: (7, "seven")) == (7, "seven")


@pytest.fixture
def said(monkeypatch):
    """What ranks say, in place of a store: (what, rank) -> text."""
    texts: dict[str, dict[int, str]] = {}

    def exchange(what, mine, ranks):
        if mine is not None:
            texts.setdefault(what, {})[1] = mine
        return {r: texts[what][r] for r in ranks}

    monkeypatch.setattr(parallel, "_exchange", exchange)
    return texts


def test_a_rank_hears_of_the_run_and_of_its_failure(said):
    follower = Group((0, 1), 1, 0, 1)
    said["once 0"] = {0: "made 12"}
    assert follower.once(lambda: pytest.fail("it writes nothing")) == (None, "12")
    said["once 0"] = {0: "failed no room"}
    with pytest.raises(RouterLogError, match="rank 0 made no run: no room"):
        follower.once(lambda: pytest.fail("it writes nothing"))


def test_thresholds_that_differ_by_a_bit_are_refused(said):
    group = Group((0, 1), 1, 0, 1)
    group_alone = Group((1,), 1, 0, 1)
    said["thresholds 0"] = {0: "other"}
    with pytest.raises(InvalidOption, match="ranks 0, 1 see the same tokens"):
        group.check_alike(Routing(), [b"bits"])
    group_alone.check_alike(Routing(), [b"bits"])
    said["thresholds 0"][0] = said["thresholds 0"][1]
    group.check_alike(Routing(), [b"bits"])
