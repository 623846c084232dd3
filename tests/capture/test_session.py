from dataclasses import replace
from typing import Any

import pytest
import torch

from bhlog.analysis.run import open_log
from bhlog.capture.checkpoint import load_model
from bhlog.capture.contract.errors import (
    InvalidOption,
    KdeMismatch,
    RouterLogError,
    RunExists,
)
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.documents import Document
from bhlog.capture.session import CaptureOptions, capture
from bhlog.capture.text import windows
from bhlog.capture.writing.writer import WriterOptions
from tests.synthetic import normal_kde

TEXTS = [Document("prose", "The quick brown fox jumps over the dog. " * 3), Document("code", "x=1")]


@pytest.fixture
def texts(demo):
    return windows(TEXTS, demo.tokenizer, max_length=40)


def test_every_token_is_logged_once_at_every_layer_with_its_source(demo, texts, tmp_path):
    manifest = capture(demo, texts, tmp_path / "run", options=CaptureOptions(batch_size=2))
    n = sum(len(window.token_ids) for window in texts)
    assert (manifest.totals.tokens, manifest.totals.rows) == (n, 4 * n)
    rows = open_log(tmp_path / "run").tokens().to_pylist()
    for number, window in enumerate(texts):
        mine = [row for row in rows if row["sequence"] == number]
        assert [row["token_id"] for row in mine] == list(window.token_ids)
        assert [row["position"] for row in mine] == list(range(len(window.token_ids)))
        assert {row["source"] for row in mine} == {window.source}


def test_loss_is_the_models_own(demo, texts, tmp_path):
    capture(demo, texts, tmp_path / "run")
    rows = open_log(tmp_path / "run").tokens(["sequence", "position", "nll"]).to_pylist()
    ids = torch.tensor([texts[0].token_ids])
    with torch.no_grad():
        logits = demo.model(ids).logits[0].float()
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    mine = [row["nll"] for row in rows if row["sequence"] == 0]
    assert mine[0] is None
    # a batch of other shape sums in another order
    assert mine[1:] == pytest.approx(expected.tolist(), abs=1e-4)


def test_generated_tokens_follow_the_prompt(demo, texts, tmp_path):
    capture(demo, texts, tmp_path / "run", options=CaptureOptions(generate=5))
    rows = open_log(tmp_path / "run").tokens(["sequence", "position", "phase"]).to_pylist()
    for number, window in enumerate(texts):
        mine = [row for row in rows if row["sequence"] == number]
        n = len(window.token_ids)
        # the last generated token is never fed back
        assert [row["position"] for row in mine] == list(range(n + 4))
        assert [row["phase"] for row in mine] == ["prefill"] * n + ["decode"] * 4


def test_sampling_by_position_and_withheld_ids_are_in_the_manifest(demo, texts, tmp_path):
    options = CaptureOptions(writer=WriterOptions(sample_every=3, token_ids=False))
    manifest = capture(demo, texts, tmp_path / "run", options=options)
    rows = open_log(tmp_path / "run").tokens().to_pylist()
    assert {row["position"] % 3 for row in rows} == {0}
    assert {row["token_id"] for row in rows} == {None}
    total = sum(len(window.token_ids) for window in texts)
    assert manifest.totals.tokens + manifest.totals.sampled_out == total
    assert (manifest.sample_every, manifest.token_ids) == (3, False)


def test_a_run_resumes_after_its_last_sealed_shard(demo, texts, tmp_path):
    options = CaptureOptions(batch_size=1)
    capture(demo, texts[:2], tmp_path / "cut", options=options)
    capture(demo, texts, tmp_path / "cut", options=options, resume=True)
    capture(demo, texts, tmp_path / "whole", options=options)
    cut, whole = open_log(tmp_path / "cut"), open_log(tmp_path / "whole")
    assert len(cut.shards) == 2
    assert cut.tokens().drop(["source"]).equals(whole.tokens().drop(["source"]))
    assert replace(cut.manifest.totals, shards=1) == whole.manifest.totals


@pytest.mark.parametrize("generate", [0, 6])
@pytest.mark.parametrize("shard_rows", [1, 1 << 18])
def test_an_interrupted_run_goes_on_at_a_whole_batch(demo, texts, tmp_path, generate, shard_rows):
    """Stopped within the second batch, at its third forward if it generates."""
    writer = WriterOptions(shard_rows=shard_rows)
    options = CaptureOptions(batch_size=1, generate=generate, writer=writer)
    capture(demo, texts, tmp_path / "whole", options=options)
    left = [1 + 3 if generate == 0 else 6 + 3]

    def stop(module: Any, args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    handle = demo.model.model.layers[-1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        capture(demo, texts, tmp_path / "cut", options=options)
    handle.remove()
    before = open_log(tmp_path / "cut")
    assert set(before.tokens()["sequence"].to_pylist()) == set(range(3 if generate == 0 else 1))
    capture(demo, texts, tmp_path / "cut", options=options, resume=True)
    cut, whole = open_log(tmp_path / "cut"), open_log(tmp_path / "whole")
    columns = ["sequence", "position", "token_id", "phase", "nll"]
    assert cut.tokens(columns).equals(whole.tokens(columns))
    assert cut.manifest.totals.tokens == whole.manifest.totals.tokens


def test_windows_that_take_many_sequences_are_neither_skipped_nor_repeated(
    demo, texts, tmp_path, monkeypatch
):
    """Without a cache, each token generated is fed as part of a new sequence."""
    monkeypatch.setattr(demo.model.generation_config, "use_cache", False)
    options = CaptureOptions(batch_size=1, generate=3)

    def stop(tokens: int, writer: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(demo, texts, tmp_path / "cut", options=options, progress=stop)
    assert len(set(open_log(tmp_path / "cut").tokens()["sequence"].to_pylist())) > 1
    capture(demo, texts, tmp_path / "cut", options=options, resume=True)
    capture(demo, texts, tmp_path / "whole", options=options)
    cut, whole = (
        open_log(tmp_path / name).tokens(["sequence", "position", "token_id"])
        for name in ("cut", "whole")
    )
    assert cut.equals(whole)


def test_a_run_resumes_with_as_many_processes_as_it_had(demo, texts, tmp_path, monkeypatch):
    capture(demo, texts, tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(InvalidOption, match="processes is 1, cannot resume with 2"):
            capture(demo, texts, tmp_path / "run", resume=True)


def test_a_run_is_never_overwritten(demo, texts, tmp_path):
    capture(demo, texts, tmp_path / "run")
    with pytest.raises(RunExists, match="not empty"):
        capture(demo, texts, tmp_path / "run")


@pytest.mark.parametrize(
    ("routing", "kde", "error", "says"),
    [
        (Routing("bh", BhOptions(max_k=65)), [0, 1, 2, 3], InvalidOption, "max_k is 65"),
        (Routing("bh", BhOptions()), None, KdeMismatch, "needs a null model"),
        (Routing("bh", BhOptions()), [0, 1], KdeMismatch, "layers 0-1, but not 2-3"),
    ],
)
def test_bad_settings_leave_nothing_behind(demo, texts, tmp_path, routing, kde, error, says):
    null = None if kde is None else normal_kde(kde)
    with pytest.raises(error, match=says):
        capture(demo, texts, tmp_path / "run", routing=routing, kde=null)
    assert not (tmp_path / "run").exists()


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(RouterLogError, match="no such folder"):
        load_model(str(tmp_path / "nothing"))
