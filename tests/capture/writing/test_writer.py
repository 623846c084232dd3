"""The writer: what goes in comes out, memory is bounded, and nothing is lost unseen."""

import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bhlog.capture.writing.writer as writer_module
from bhlog.analysis.log import logits_of
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption, RouterLogError, RunExists
from bhlog.capture.contract.manifest import Routing, Totals
from bhlog.capture.writing.buffer import Buffer
from bhlog.capture.writing.stage import PinnedPool, Staged
from bhlog.capture.writing.writer import RunWriter, WriterOptions
from tests.capture.blocks import EXPERTS, INFO, LAYERS, check_run, logit, make_block, writer
from tests.synthetic import normal_kde


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding", [0, 3])
def test_rows_come_out_as_they_went_in(run, dtype, padding):
    log_writer = writer(run)
    for number in range(3):
        log_writer.submit(make_block(number, dtype=dtype, padding=padding))
    log_writer.close()
    assert check_run(run) == [(s, p) for s in range(3) for p in range(10)]
    log = open_log(run)
    for row in log.tokens().to_pylist():
        s, p = row["sequence"], row["position"]
        assert row == {
            "rank": 0, "sequence": s, "position": p, "token_id": 100 * s + p, "phase": "prefill",
            "forward": s, "nll": None if p == 0 else p / 8, "source": f"text {s % 3}",
            "parent": None, "sample_id": None, "role": None,
        }  # fmt: skip
    for batch in log.batches(["experts", "weights", "n_selected", "n_rejected", "rank"]):
        for row in batch.to_pylist():
            assert row["experts"] == [EXPERTS - 1, EXPERTS - 2]
            assert row["weights"] == [0.5, 0.25]
            assert (row["n_selected"], row["n_rejected"], row["rank"]) == (2, None, 0)
    assert log.manifest.totals == Totals(rows=60, tokens=30, shards=1, forwards=3)


def test_bh_rows_keep_what_was_chosen(run):
    log_writer = writer(run)
    log_writer.submit(make_block(0, n_selected=True))
    log_writer.close()
    for batch in open_log(run).batches(["position", "experts", "weights", "n_rejected"]):
        for row in batch.to_pylist():
            n = row["position"] % 3
            assert row["experts"] == [EXPERTS - 1, EXPERTS - 2][:n]
            assert row["weights"] == [0.5, 0.25][:n]
            assert row["n_rejected"] == row["position"] % 5


def test_duckdb_and_polars_read_a_shard(run):
    log_writer = writer(run)
    log_writer.submit(make_block(5, n_selected=True))
    log_writer.close()
    path = run / "routing" / "rank00000-00000.parquet"
    truth = pq.read_table(path).to_pylist()
    assert pl.read_parquet(path).to_dicts() == truth
    relation = duckdb.sql(f"SELECT * FROM '{path}'")
    found = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    assert [{**row, "logits": list(row["logits"])} for row in found] == truth


def test_columns_of_many_values_are_split_into_byte_streams(run):
    log_writer = writer(run)
    log_writer.submit(make_block(0, 100))
    log_writer.close()
    group = pq.ParquetFile(run / "routing" / "rank00000-00000.parquet").metadata.row_group(0)
    encodings = {
        group.column(i).path_in_schema: group.column(i).encodings for i in range(group.num_columns)
    }
    for name in ("logits.list.element", "weights.list.element"):
        assert "BYTE_STREAM_SPLIT" in encodings[name]
    assert group.column(0).statistics.min == group.column(0).statistics.max == LAYERS[0]


@pytest.mark.parametrize("kind", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nonfinite_rows_are_written_and_counted(run, kind, dtype):
    block = make_block(0, dtype=dtype)
    block.staged.tensors["logits"][0, 3, 2] = kind
    block.staged.tensors["logits"][0, 3, 4] = kind
    block.staged.tensors["logits"][1, 9, 0] = kind
    log_writer = writer(run)
    log_writer.submit(block)
    log_writer.close()
    log = open_log(run)
    assert log.manifest.totals.nonfinite == 2
    (rows,) = list(log.batches(["logits"], layers=[LAYERS[0]]))
    np.testing.assert_array_equal(logits_of(rows)[3, [2, 4]], [kind, kind])


def test_large_finite_logits_are_not_counted_as_nonfinite(run):
    block = make_block(0)
    block.staged.tensors["logits"][:] = 3e38
    log_writer = writer(run)
    log_writer.submit(block)
    log_writer.close()
    assert open_log(run).manifest.totals.nonfinite == 0


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=8),
    sample_every=st.integers(1, 5),
    shard_rows=st.integers(1, 100),
    threads=st.integers(1, 3),
)
def test_sampling_and_shards_of_any_size(
    tmp_path_factory, sizes, sample_every, shard_rows, threads
):
    run = tmp_path_factory.mktemp("runs") / "run"
    log_writer = writer(run, sample_every=sample_every, shard_rows=shard_rows, threads=threads)
    for number, (tokens, padding) in enumerate(sizes):
        log_writer.submit(make_block(number, tokens, padding=padding))
    log_writer.close()
    expected = [
        (number, position)
        for number, (tokens, _) in enumerate(sizes)
        for position in range(0, tokens, sample_every)
    ]
    assert check_run(run) == expected
    totals = open_log(run).manifest.totals
    assert totals.tokens == len(expected)
    assert totals.tokens + totals.sampled_out + totals.dropped == sum(n for n, _ in sizes)


def test_forwards_with_and_without_token_ids_share_a_shard(run):
    log_writer = writer(run)
    log_writer.submit(make_block(0, token_id=None))
    log_writer.submit(make_block(1, nll=None))
    log_writer.close()
    rows = open_log(run).tokens().to_pylist()
    assert [row["token_id"] for row in rows] == [None] * 10 + list(range(100, 110))
    assert [row["nll"] for row in rows[10:]] == [None] * 10
    check_run(run)


def test_token_ids_are_withheld(run):
    log_writer = writer(run, token_ids=False)
    log_writer.submit(make_block(1))
    log_writer.close()
    log = open_log(run)
    assert {row["token_id"] for row in log.tokens().to_pylist()} == {None}
    assert {v.as_py() for b in log.batches(["token_id"]) for v in b["token_id"]} == {None}
    assert not log.manifest.token_ids


def test_pinned_buffers_may_be_used_again_after_a_block_is_gathered():
    block = make_block(0)
    tensors = dict(block.staged.tensors)
    pinned = Staged(block.staged.tensors, 1, None, [], PinnedPool())
    buffer = Buffer(0)
    buffer.add(
        type(block)(**{**vars(block), "staged": pinned}),
        sample_every=1,
        token_ids=True,
    )
    for tensor in tensors.values():
        tensor.zero_()
    (first, *_) = [t.to_pylist() for t in buffer.routing_tables()]
    assert [row["logits"] for row in first] == [logit(1, 0, p).tolist() for p in range(10)]
    assert [row["experts"] for row in first] == [[EXPERTS - 1, EXPERTS - 2]] * 10


class Gate:
    """Holds the writer's gathering thread until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        add = Buffer.add

        def slow(buffer: Buffer, *args: Any, **kwargs: Any) -> Totals:
            self.open.wait(20)
            return add(buffer, *args, **kwargs)

        monkeypatch.setattr(Buffer, "add", slow)


def test_a_full_queue_makes_the_model_wait(run, monkeypatch):
    gate = Gate(monkeypatch)
    size = make_block(0).staged.n_bytes
    log_writer = writer(run, queue_bytes=3 * size)
    most = 0
    done = threading.Event()

    def feed() -> None:
        for number in range(12):
            log_writer.submit(make_block(number))
        done.set()

    threading.Thread(target=feed, daemon=True).start()
    for _ in range(20):
        most = max(most, log_writer._queue.bytes)
        time.sleep(0.01)
    assert most == 3 * size and not done.is_set()
    gate.open.set()
    assert done.wait(20)
    log_writer.close()
    assert len(check_run(run)) == 120
    assert open_log(run).manifest.totals.dropped == 0


def test_a_block_larger_than_the_queue_still_goes_in(run):
    log_writer = writer(run, queue_bytes=1)
    for number in range(3):
        log_writer.submit(make_block(number))
    log_writer.close()
    assert len(check_run(run)) == 30


@pytest.mark.parametrize("sample_every", [1, 4])
def test_a_full_queue_drops_and_counts(run, monkeypatch, sample_every):
    gate = Gate(monkeypatch)
    size = make_block(0).staged.n_bytes
    log_writer = writer(run, queue_bytes=2 * size, on_full="drop", sample_every=sample_every)
    for number in range(12):
        log_writer.submit(make_block(number, padding=2))
    gate.open.set()
    log_writer.close()
    totals = open_log(run).manifest.totals
    kept = check_run(run)
    assert totals.dropped > 0
    per_block = len(range(0, 10, sample_every))
    assert totals.dropped % per_block == 0 and len(kept) % per_block == 0
    assert totals.tokens + totals.dropped + totals.sampled_out == 120
    assert totals.tokens + totals.dropped == 12 * per_block


def test_flush_seals_what_was_submitted(run):
    log_writer = writer(run)
    log_writer.submit(make_block(0))
    log_writer.flush()
    assert len(check_run(run)) == 10
    log_writer.flush()  # nothing new: no empty shard
    log_writer.submit(make_block(1))
    log_writer.close()
    log_writer.close()
    assert open_log(run).manifest.totals.shards == 2
    assert len(check_run(run)) == 20


def test_shards_end_at_checkpoints(run):
    log_writer = writer(run, shard_rows=30)
    log_writer.checkpoint()
    for number in range(5):  # 20 rows each
        log_writer.submit(make_block(number))
        if number in (0, 3):
            log_writer.checkpoint()
    log_writer.close()
    log = open_log(run)
    assert [entry.tokens for entry in log.manifest.shards] == [40, 10]
    assert len(check_run(run)) == 50


@pytest.mark.parametrize("flushed", [False, True])
def test_a_run_that_an_error_closes_ends_at_its_last_checkpoint(run, flushed):
    log_writer = writer(run)
    log_writer.checkpoint()
    log_writer.submit(make_block(0))
    log_writer.checkpoint()
    log_writer.submit(make_block(1, n_selected=False))
    if flushed:  # what is sealed stands
        log_writer.flush()
    log_writer.submit(make_block(2))
    log_writer.close(KeyboardInterrupt())
    kept = 2 if flushed else 1
    assert len(check_run(run)) == 10 * kept
    totals = open_log(run).manifest.totals
    assert (totals.tokens, totals.forwards, totals.dropped) == (10 * kept, kept, 0)
    assert writer(run, resume=True).next_sequence == kept


def test_threads_that_count_at_once_lose_nothing(run):
    log_writer = writer(run)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:

        def count() -> None:
            for _ in range(2000):
                log_writer._count(Totals(dropped=1))

        threads = [threading.Thread(target=count) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    log_writer.close()
    assert open_log(run).manifest.totals.dropped == 4000


def test_an_empty_run_closes(run):
    writer(run).close()
    log = open_log(run)
    assert log.manifest.closed and log.shards == () and log.tokens().num_rows == 0


def test_shards_are_sealed_in_order_though_encoded_side_by_side(run, monkeypatch):
    import bhlog.capture.writing.sealer as module

    order: list[str] = []
    write_part, seal = module.write_part, module.seal

    def slow_first(path: Path, groups: Any) -> Path:
        if path.name.endswith("00000.parquet"):
            time.sleep(0.3)
        return write_part(path, groups)

    def noted(part: Path) -> None:
        order.append(f"{part.parent.name}/{seal(part).name}")

    monkeypatch.setattr(module, "write_part", slow_first)
    monkeypatch.setattr(module, "seal", noted)
    log_writer = writer(run, shard_rows=1, threads=3)
    for number in range(4):
        log_writer.submit(make_block(number))
    log_writer.close()
    pairs = [(n, folder) for n in range(4) for folder in ("tokens", "routing")]
    assert order == [f"{folder}/rank00000-0000{n}.parquet" for n, folder in pairs]
    assert len(check_run(run)) == 40


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_rows_are_sealed_when_they_are_old_though_no_more_come(run):
    log_writer = writer(run, seal_seconds=0.05)
    for number in range(3):
        log_writer.submit(make_block(number))
        wait_for(lambda number=number: len(open_log(run).shards) == number + 1)
    assert check_run(run) == [(s, p) for s in range(3) for p in range(10)]  # killed now, it has all
    log_writer.close()
    assert len(open_log(run).shards) == 3


def test_age_seals_at_checkpoints_alone_once_there_are_some(run):
    log_writer = writer(run, seal_seconds=0.05)
    log_writer.checkpoint()
    log_writer.submit(make_block(0))
    time.sleep(0.2)  # old by now, but it may be half a batch
    assert open_log(run).shards == ()
    log_writer.checkpoint(windows=1)
    wait_for(lambda: len(open_log(run).shards) == 1)
    log_writer.close(KeyboardInterrupt())
    assert check_run(run) == [(0, p) for p in range(10)]


def test_a_long_run_that_logs_slowly_gets_few_shards(run, monkeypatch):
    """Age seals after 30 s or a twentieth of the run's time: a day makes some 117 shards."""
    now = [0.0]
    log_writer = writer(run)
    log_writer._began = 0.0
    monkeypatch.setattr(writer_module.time, "monotonic", lambda: now[0])
    sealed = 0
    for hour in (1, 24):
        while now[0] < hour * 3600:
            if log_writer._oldest is None:
                log_writer._oldest = now[0]
            now[0] += 1
            if log_writer._seconds_left() <= 0:
                sealed, log_writer._oldest = sealed + 1, None
        times = math.log(now[0] / 600)  # 20 shards up to then, then by twentieths
        assert 20 + 19 * times - 1 < sealed < 20 + 20 * times + 1
    monkeypatch.undo()
    log_writer._oldest = None
    log_writer.close()


def test_next_numbers_follow_what_was_submitted(run):
    log_writer = writer(run)
    assert (log_writer.next_sequence, log_writer.next_forward) == (0, 0)
    log_writer.submit(make_block(6))
    assert (log_writer.next_sequence, log_writer.next_forward) == (7, 7)
    log_writer.close()


@pytest.mark.parametrize("how", ["file", "full", "run"])
def test_a_folder_in_use_is_refused(run, how):
    if how == "file":
        run.write_text("")
    elif how == "full":
        run.mkdir()
        (run / "x").write_text("")
    else:
        writer(run).close()
    before = sorted(run.rglob("*"))
    with pytest.raises(RunExists):
        writer(run)
    assert sorted(run.rglob("*")) == before


def test_an_empty_folder_is_used(run):
    run.mkdir()
    writer(run).close()
    assert open_log(run).manifest.closed


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RouterLogError, match="cannot be written") as caught:
        writer(tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)


def test_a_folder_without_permission_leaves_nothing(run, monkeypatch):
    mkdir = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name == "tokens":
            raise PermissionError(13, "Permission denied")
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RouterLogError, match="Permission denied"):
        writer(run)
    assert not run.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"sample_every": 0},
        {"shard_rows": 0},
        {"queue_bytes": 0},
        {"threads": 0},
        {"on_full": "x"},
        {"seal_seconds": 0},
        {"seal_seconds": float("nan")},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(InvalidOption, match=next(iter(options))):
        WriterOptions(**options)


def test_the_null_model_is_kept_with_the_run(run):
    kde = normal_kde(LAYERS)
    RunWriter(run, INFO, Routing(), kde=kde).close()
    log = open_log(run)
    assert log.kde.to_bytes() == kde.to_bytes()
    assert log.manifest.routing.kde_sha256 is not None
