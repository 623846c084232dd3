"""Processes that are forked inside a block: they have the hooks, but neither writer nor run."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bhlog.capture.contract.errors import AlreadyPatched, WriterFailed
from bhlog.capture.observe import observe, route
from tests.capture.tiny import LAYERS, batch, observed, read, tiny_model
from tests.synthetic import normal_kde

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def forked(work: Callable[[], Any]) -> Any:
    """What work returns, or the error it ends with, in a forked process."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def run() -> None:
        torch.set_num_threads(1)
        try:
            there.send(work())
        except Exception as error:
            there.send(error)

    process = context.Process(target=run)
    process.start()
    assert here.poll(60)
    answer = here.recv()
    process.join(60)
    assert process.exitcode == 0
    return answer


@pytest.fixture(autouse=True)
def one_thread():
    """A pool of threads does not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_forked_process_is_told_at_its_first_forward(tmp_path):
    model = tiny_model()
    ids, _ = batch([4])
    with observed(model, tmp_path / "run"):
        error = forked(lambda: model(ids).logits.sum().item())
        assert isinstance(error, WriterFailed)
        assert "forked inside the block" in str(error) and "\n" not in str(error)
        model(ids)
    assert list(read(tmp_path / "run").sequences.values()) == ids.tolist()


def test_a_forked_process_that_leaves_the_block_leaves_the_run_alone(tmp_path):
    model, run = tiny_model(), tmp_path / "run"
    ids, _ = batch([4])
    block = observe(model, run)
    with torch.no_grad():
        block.__enter__()
        model(ids)

        def leave() -> bool:
            block.__exit__(None, None, None)
            return "_bhlog_patched" not in vars(model)

        assert forked(leave) is True
        model(ids)
        block.__exit__(None, None, None)
    logged = read(run)
    assert list(logged.sequences.values()) == ids.tolist() * 2
    assert logged.manifest.closed and logged.manifest.error is None


def test_a_forked_process_can_be_routed_where_nothing_is_logged():
    model = tiny_model()
    ids, _ = batch([4])
    with torch.no_grad(), route(model, alpha=0.3, kde=normal_kde(range(LAYERS))):
        truth = model(ids).logits.sum().item()
        assert forked(lambda: model(ids).logits.sum().item()) == truth


def test_a_forked_process_that_observes_again_is_refused(tmp_path):
    model = tiny_model()

    def again() -> None:
        with observe(model, tmp_path / "other"):
            pass

    with observe(model, tmp_path / "run"):
        assert isinstance(forked(again), AlreadyPatched)
    assert not (tmp_path / "other").exists()
