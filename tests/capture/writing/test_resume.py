"""A run that stopped is continued: numbers and counts go on, mistakes are refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import bhlog.capture.writing.writer as writer_module
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import CorruptShard, InvalidOption, RouterLogError, WriterFailed
from bhlog.capture.contract.manifest import Routing, Totals
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.observe import new_writer, recording
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.writing.buffer import Texts
from bhlog.capture.writing.folder import PROGRESS, Standing
from bhlog.capture.writing.writer import RunWriter, WriterOptions
from tests.capture.blocks import INFO, LAYERS, check_run, make_block, no_errors, writer
from tests.capture.tiny import batch, check_logits, read
from tests.synthetic import normal_kde


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
    ids, _ = batch([4, 4])
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


def test_a_run_whose_shards_say_nothing_of_progress_cannot_be_resumed(run, monkeypatch):
    monkeypatch.setattr(writer_module.Standing, "metadata", lambda self: {})
    first = writer(run, shard_rows=1)
    for number in range(3):
        first.submit(make_block(number))
    first.flush()
    first.close()
    with pytest.raises(
        CorruptShard, match=r"rank00000-00000.parquet: cannot resume after a broken"
    ):
        writer(run, resume=True)


def of_version_1(run):
    """A run that an earlier bhlog began."""
    first = writer(run)
    first._manifest = replace(first.manifest, schema_version=1)
    first._buffer.version = 1
    first.submit(make_block(0))
    first.close()


def test_a_run_of_an_earlier_version_is_resumed_in_it(run):
    of_version_1(run)
    second = writer(run, resume=True)
    second.submit(make_block(1))
    second.close()
    log = open_log(run)
    assert log.manifest.schema_version == 1
    shards = [log.open_shard("tokens", name) for name in log.token_shards]
    assert [shard.schema_arrow.names[-1] for shard in shards] == ["source", "source"]
    no_errors(run)


def test_what_an_earlier_version_cannot_hold_is_not_dropped_in_silence(run):
    of_version_1(run)
    second = writer(run, resume=True)
    named = {"sample_id": Texts(np.zeros(10, np.int32), ("q-1",))}
    second.submit(replace(make_block(1), texts=named))
    with pytest.raises(WriterFailed, match="schema version 1, which has no column sample_id"):
        second.close()


def test_a_run_of_a_newer_version_is_not_resumed(run):
    writer(run).close()
    manifest = open_log(run).manifest
    replace(manifest, schema_version=9).write(run)
    with pytest.raises(InvalidOption, match=r"of schema version 9, cannot resume with \d+: resume"):
        writer(run, resume=True)


def test_progress_is_told_by_the_footer_and_never_guessed():
    progress = Standing(next_sequence=5, windows=2)
    footer = {name.encode(): text.encode() for name, text in progress.metadata().items()}
    assert Standing.of(footer) == progress
    for broken in (None, {}, {PROGRESS.encode(): b"{"}, {PROGRESS.encode(): b'{"windows": -1}'}):
        with pytest.raises(ValueError):
            Standing.of(broken)


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
