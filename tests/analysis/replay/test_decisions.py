import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.fold import Scope
from bhlog.analysis.replay import parts
from bhlog.analysis.replay.decisions import setting_name, write_decisions
from bhlog.analysis.replay.parts import Parts
from bhlog.analysis.replay.settings import settings_of
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import CorruptShard, InvalidOption, RunExists
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, normal_null, write_run

LAYERS = (0, 1)
OPTIONS = BhOptions(alpha=0.3, max_k=6, temperature=1.5)


@pytest.fixture
def run(tmp_path):
    logits = np.random.default_rng(0).normal(-0.4, 1.6, (2, 2, 30, 16)).astype(np.float32)
    logits[0, 0, 4] = np.nan
    return write_run(
        tmp_path / "run", layers=LAYERS, n_sequences=2, length=30, logits=logits, options=OPTIONS,
        kde=normal_kde(LAYERS),
    )  # fmt: skip


def tables(folder):
    return [pq.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))]


def test_decisions_at_the_settings_of_the_run_are_the_logged_rows(run, tmp_path):
    (folder,) = write_decisions(open_log(run), [OPTIONS], tmp_path / "out")
    names = ["rank00000-00000.parquet", "rank00000-00001.parquet"]
    assert sorted(path.name for path in folder.iterdir()) == ["_replay.json", *names]
    for mine, logged in zip(tables(folder), tables(run / "routing"), strict=True):
        assert mine == [{name: row[name] for name in mine[0]} for row in logged]


def test_a_row_without_finite_logits_keeps_the_logged_experts_and_weights(tmp_path):
    logits = np.full((1, 1, 4, 16), np.nan, np.float32)
    run = write_run(
        tmp_path / "run", layers=[0], n_sequences=1, length=4, n_shards=1, logits=logits
    )
    log = open_log(run)
    (folder,) = write_decisions(log, [OPTIONS], tmp_path / "out", kde=normal_kde([0]))
    (mine,), (logged,) = tables(folder), tables(run / "routing")
    for row, was in zip(mine, logged, strict=True):
        assert (row["experts"], row["weights"]) == (was["experts"], was["weights"])
        assert (row["n_selected"], row["n_rejected"]) == (8, 0)


def test_pieces_and_threads_change_nothing(run, tmp_path, monkeypatch):
    log = open_log(run)
    (whole,) = write_decisions(log, [OPTIONS], tmp_path / "a", scope=Scope(threads=1))
    monkeypatch.setattr(parts, "_PIECE_LOGITS", 16 * 7)
    (pieces,) = write_decisions(log, [OPTIONS], tmp_path / "b", scope=Scope(threads=3))
    assert tables(pieces) == tables(whole)


def test_names_differ_whenever_settings_do():
    own = BhOptions()
    settings = [
        own,
        BhOptions(alpha=0.1234567),
        BhOptions(alpha=0.12345671),
        BhOptions(min_k=0),
        BhOptions(max_k=4),
        BhOptions(temperature=2.0),
        BhOptions(renormalize=True),
        BhOptions(renormalize=False),
    ]
    names = [setting_name(options, 16) for options in settings]
    names += [setting_name(own, 16, null) for null in ("empirical", "kde-12345678")]
    assert len({*names}) == 10
    assert names[0] == "alpha-0.05_k-1-16"


def test_another_null_model_is_told_by_the_name(run, tmp_path):
    log = open_log(run)
    other = KdeModel({i: normal_null(i, sd=2.0) for i in LAYERS})
    kdes = (None, normal_kde(LAYERS), other)
    folders = []
    for i, kde in enumerate(kdes):
        folders += write_decisions(log, [OPTIONS], tmp_path / str(i), kde=kde)
    own, same, foreign = [folder.name for folder in folders]
    assert own == same == "alpha-0.3_k-1-6_t-1.5"
    assert foreign.startswith(f"{own}_kde-")


def test_nothing_is_overwritten_or_written_twice(run, tmp_path):
    log = open_log(run)
    write_decisions(log, [OPTIONS], tmp_path / "out")
    with pytest.raises(RunExists, match="choose --out"):
        write_decisions(log, [OPTIONS], tmp_path / "out")
    with pytest.raises(InvalidOption, match="twice"):
        write_decisions(log, settings_of(log, [0.1, 0.1]), tmp_path / "out")
    with pytest.raises(InvalidOption, match="on this machine"):
        write_decisions(log, [OPTIONS], Path("s3://bucket/out"))
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOption, match="cannot write there"):
        write_decisions(log, [OPTIONS], tmp_path / "file")


def damage(run):
    path = run / "routing" / "rank00000-00001.parquet"
    group = pq.read_metadata(path).row_group(1)
    columns = [group.column(i) for i in range(group.num_columns)]
    start = next(c.data_page_offset for c in columns if c.path_in_schema.startswith("logits"))
    data = bytearray(path.read_bytes())
    data[start + 60 : start + 80] = bytes(20)
    path.write_bytes(data)


def interrupt(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "_table", stop)


@pytest.mark.parametrize("failure", ["damaged shard", "interrupt"])
def test_a_write_that_fails_leaves_nothing_behind(run, tmp_path, monkeypatch, failure):
    log, out = open_log(run), tmp_path / "out"
    if failure == "damaged shard":
        damage(run)
        with pytest.raises(CorruptShard, match=r"rank00000-00001.parquet: row group 1"):
            write_decisions(log, settings_of(log, [0.1, 0.2]), out)
    else:
        interrupt(monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            write_decisions(log, settings_of(log, [0.1, 0.2]), out)
    assert [*out.iterdir()] == []


@pytest.mark.parametrize("when", ["writing", "done"])
def test_two_writers_of_one_replay_do_not_mix(run, tmp_path, monkeypatch, when):
    """The second one starts in the middle of the first one, or ends before it."""
    log, out, refused = open_log(run), tmp_path / "out", []
    write_all = Parts.write_all

    def interrupted(*arguments):
        seals = write_all(*arguments)
        monkeypatch.setattr(Parts, "write_all", write_all)
        if when == "writing":
            with pytest.raises(RunExists, match="another command is writing this replay") as error:
                write_decisions(log, [OPTIONS], out)
            refused.append(str(error.value))
        else:
            (whole,) = write_decisions(log, [OPTIONS], tmp_path / "other")
            whole.rename(out / whole.name)
        return seals

    monkeypatch.setattr(Parts, "write_all", interrupted)
    if when == "writing":
        (folder,) = write_decisions(log, [OPTIONS], out)
    else:
        with pytest.raises(RunExists, match="this replay is there already"):
            write_decisions(log, [OPTIONS], out)
        folder = out / setting_name(OPTIONS, 16)
    assert len(refused) == (when == "writing")
    for mine, logged in zip(tables(folder), tables(run / "routing"), strict=True):
        assert mine == [{name: row[name] for name in mine[0]} for row in logged]
    assert [path.name for path in out.iterdir()] == [folder.name]


def test_what_a_killed_write_left_is_no_replay_and_is_replaced(run):
    stale = run / "replay" / ".part" / setting_name(OPTIONS, 16)
    stale.mkdir(parents=True)
    first = run / "routing" / "rank00000-00000.parquet"
    (stale / first.name).write_bytes(first.read_bytes())
    log = open_log(run)
    assert log.sql("SELECT count(*) FROM replays").fetchall() == [(0,)]
    (folder,) = write_decisions(log, [OPTIONS], run / "replay")
    assert not (run / "replay" / ".part").exists()
    found = open_log(run).sql("SELECT replay, count(*) FROM replays GROUP BY replay").fetchall()
    assert found == [(folder.name, 120)]


FAMILIES = {
    "softmax over all": "OlmoeTopKRouter",
    "softmax, renormalized": "MixtralTopKRouter",
    "softmax, floored": "Ernie4_5_MoeTopKRouter",
    "softmax, scaled": "DeepseekV2TopkRouter",
    "softmax over the chosen": "GraniteMoeTopKRouter",
    "sigmoid, renormalized and scaled": "DeepseekV3TopkRouter",
    "sigmoid, eps of 1e-6": "Lfm2MoeTopKRouter",
}


def routed(family, folder, renormalize):
    torch = pytest.importorskip("torch", reason="a routed model needs torch")
    from bhlog.capture.observe import route
    from bhlog.capture.routers.search import find_routers
    from tests.capture.families import build, inputs

    model = build(family)
    options = {"alpha": 0.4, "max_k": 5, "temperature": 1.3, "renormalize": renormalize}
    kde = normal_kde([router.layer for router in find_routers(model)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels that are not there
        with torch.no_grad(), route(model, folder, kde=kde, **options):
            model(**inputs(model))
    return open_log(folder), BhOptions(**options)


@pytest.mark.parametrize("renormalize", ["model", True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_that_the_model_used(tmp_path, family, renormalize):
    log, options = routed(FAMILIES[family], tmp_path / "run", renormalize)
    (folder,) = write_decisions(log, [options], tmp_path / "out")
    for mine, logged in zip(tables(folder), tables(tmp_path / "run" / "routing"), strict=True):
        for row, was in zip(mine, logged, strict=True):
            assert row["experts"] == was["experts"]
            # float32 of two libraries; the eps of one family is not in the manifest
            assert row["weights"] == pytest.approx(was["weights"], rel=3e-6)


def test_a_formula_that_the_run_does_not_hold_is_refused(tmp_path):
    log, options = routed("Inkling2TopKRouter", tmp_path / "run", "model")
    with pytest.raises(InvalidOption, match=r"a formula \(function\) that the run"):
        write_decisions(log, [options], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(log.replay(0.4))
