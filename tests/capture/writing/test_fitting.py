"""A null model that is ready when the run is closed: the file that a fit of the run makes."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from bhlog.analysis.null.estimate import FitOptions, fit_kde
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import CorruptShard, InvalidOption, WriterFailed
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.observe import new_writer, observe, recording, route
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.writing.fitting import KdeFit
from bhlog.capture.writing.writer import RunWriter, WriterOptions
from tests.capture.blocks import INFO, logit, make_block
from tests.capture.tiny import batch
from tests.synthetic import normal_kde


def speak(model: Any, n: int = 3, patcher: RouterPatcher | None = None) -> None:
    """Generations; with their patcher, each is a shard if shards are small."""
    with torch.no_grad():
        for seed in range(n):
            ids, mask = batch([9, 5], left=True, seed=seed)
            model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
            if patcher is not None and patcher.recorder is not None:
                patcher.recorder.flush()


def afterwards(run: Path, **options: Any) -> bytes:
    """The file of a fit that reads the run."""
    return fit_kde(open_log(run), FitOptions(**options)).to_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trim_high": 2},
        {"trim_low": 1, "trim_high": 2, "kernel": "epanechnikov", "bandwidth": 0.25},
        {"null": "expert"},
        {"null": "expert", "trim_high": 1, "bandwidth": "isj"},
        {"null_from": "central"},
        {"trim_high": 2, "centre": "median"},
    ],
)
@pytest.mark.parametrize("sample_every", [1, 3])
def test_the_file_is_that_of_a_fit_of_the_run(model, tmp_path, options, sample_every):
    out = tmp_path / "null.parquet"
    writing = WriterOptions(sample_every=sample_every, shard_rows=30)
    with observe(model, tmp_path / "run", options=writing, fit_kde=KdeFit(out, **options)) as p:
        speak(model, patcher=p)
    assert len(open_log(tmp_path / "run").shards) > 1
    assert out.read_bytes() == afterwards(tmp_path / "run", **options)
    assert not (tmp_path / "run" / "kde.parquet").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_shards_are_counted_by_pattern(tmp_path, dtype):
    out, run = tmp_path / "null.parquet", tmp_path / "run"
    fit = KdeFit(out)
    writer = new_writer(run, INFO, Routing(), fit=fit)
    for number in range(3):
        writer.submit(make_block(number, tokens=6000, dtype=dtype))
    writer.close()
    fit.finish(writer)
    assert out.read_bytes() == afterwards(run)
    everything = np.concatenate([[logit(1, s, p) for p in range(7)] for s in range(3)])
    assert KdeModel.load(out)[1].curves[0].n == 3 * 6000 * everything.shape[1]


def test_routed_runs_are_fitted_too(model, tmp_path):
    out = tmp_path / "null.parquet"
    with route(model, tmp_path / "run", alpha=0.3, kde=normal_kde(range(3)), fit_kde=str(out)):
        speak(model)
    assert out.read_bytes() == afterwards(tmp_path / "run")
    with (
        pytest.raises(InvalidOption, match="name a run"),
        route(model, alpha=0.3, kde=normal_kde(range(3)), fit_kde=out),
    ):
        pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_run_has_the_null_of_its_rows(model, tmp_path, error):
    out = tmp_path / "null.parquet"
    with pytest.raises(error), observe(model, tmp_path / "run", fit_kde=out):
        speak(model)
        raise error
    assert out.read_bytes() == afterwards(tmp_path / "run")


def test_a_resumed_run_counts_its_earlier_shards(model, tmp_path):
    out, run = tmp_path / "null.parquet", tmp_path / "run"
    patcher, fit = RouterPatcher(model), KdeFit(out, trim_high=1)
    for resume in (False, True, True):  # the first one counts nothing
        fit_now = fit if resume else None
        writer = new_writer(run, patcher.info, Routing(), resume=resume, fit=fit_now)
        with recording(patcher, Routing(), None, writer, fit_now):
            speak(model, 2)
    assert out.read_bytes() == afterwards(run, trim_high=1)


@pytest.mark.parametrize("seen", ["in the block", "at its end"])
def test_a_writers_error_leaves_the_null_of_the_sealed_shards(model, tmp_path, monkeypatch, seen):
    out, run = tmp_path / "null.parquet", tmp_path / "run"
    import bhlog.capture.writing.sealer

    seal, sealed, ending = bhlog.capture.writing.sealer.seal, [], threading.Event()
    close = RunWriter.close

    def fail_later(part: Path) -> None:
        if len(sealed) == 4:
            ending.wait(60)
            raise OSError(28, "No space left on device")
        sealed.append(part)
        seal(part)

    def close_at_the_end(writer: RunWriter, error: BaseException | None = None) -> None:
        ending.set()
        close(writer, error)

    monkeypatch.setattr(bhlog.capture.writing.sealer, "seal", fail_later)
    monkeypatch.setattr(RunWriter, "close", close_at_the_end)
    if seen == "in the block":
        ending.set()
    with (
        pytest.raises(WriterFailed),
        observe(model, run, options=WriterOptions(shard_rows=20, threads=1), fit_kde=out) as p,
    ):
        speak(model, 6, p)
        while seen == "in the block":  # until a forward meets the error
            speak(model, 1, p)
    assert len(open_log(run).shards) == 2
    assert out.read_bytes() == afterwards(run)


def test_mistakes_are_found_before_the_model_runs(model, tmp_path):
    untouched = sorted(tmp_path.iterdir())
    for mistake, says in [
        (KdeFit(tmp_path / "no" / "null.parquet"), "folder does not exist"),
        (KdeFit(tmp_path), "is a folder"),
        (KdeFit(tmp_path / "run" / "kde.parquet"), "inside the run"),
        (KdeFit(tmp_path / "null.parquet", trim_high=8), "leave nothing"),
        (KdeFit(tmp_path / "null.parquet", trim_high=-1), "at least 0"),
        (KdeFit(tmp_path / "null.parquet", kernel="cubic"), "kernel must be"),
    ]:
        with (
            pytest.raises(InvalidOption, match=says),
            observe(model, tmp_path / "run", fit_kde=mistake),
        ):
            pytest.fail("the model ran")
    assert sorted(tmp_path.iterdir()) == untouched


def test_a_run_without_rows_has_no_null_model(model, tmp_path):
    with (
        pytest.raises(InvalidOption, match="no row was logged"),
        observe(model, tmp_path / "run", fit_kde=tmp_path / "null.parquet"),
    ):
        pass
    assert open_log(tmp_path / "run").manifest.closed
    assert not (tmp_path / "null.parquet").exists()


def test_a_shard_that_cannot_be_counted_is_named(tmp_path):
    run = tmp_path / "run"
    writer = new_writer(run, INFO, Routing())
    writer.submit(make_block(0, tokens=500))
    writer.close()
    path = run / "routing" / "rank00000-00000.parquet"
    group = pq.read_metadata(path).row_group(0)
    (logits,) = (c for c in map(group.column, range(12)) if c.path_in_schema.startswith("logits"))
    data = bytearray(path.read_bytes())
    data[logits.data_page_offset + logits.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptShard, match="cannot count in the null model"):
        new_writer(run, INFO, Routing(), resume=True, fit=KdeFit(tmp_path / "null.parquet"))


def test_the_last_of_two_ranks_merges_what_both_counted(tmp_path, monkeypatch):
    out, run = tmp_path / "null.parquet", tmp_path / "run"
    (tmp_path / "null.parquet.rank00001.npz").write_bytes(b"of an earlier launch")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("BHLOG_LAUNCH", "of two ranks")
    fit, writers = KdeFit(out, null="expert"), []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        writers.append(new_writer(run, INFO, Routing(), fit=fit))
    for number in range(1, 5):  # rank 0 has no row
        writers[1].submit(make_block(number, tokens=50))
    for writer in writers:
        assert not out.exists()
        writer.close()
        model = fit.finish(writer)
        assert (model is None) == (writer.rank == 0)
    assert out.read_bytes() == afterwards(run, null="expert")
    assert not list(tmp_path.glob("*.npz*"))
