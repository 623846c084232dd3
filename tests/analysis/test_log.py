import dataclasses
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bhlog.analysis.fold as module
import bhlog.analysis.log as log_module
from bhlog.analysis.cli import main
from bhlog.analysis.fold import Scope, fold
from bhlog.analysis.log import layer_of, logits_of
from bhlog.analysis.run import open_log
from bhlog.capture.contract import schema
from bhlog.capture.contract.errors import CorruptKde, CorruptShard, InvalidOption
from bhlog.capture.contract.files import write_shard
from bhlog.capture.contract.manifest import Manifest
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.contract.schema import Column
from tests.synthetic import normal_kde, without_logits, write_run

LAYERS = (0, 1, 4)
COLUMNS = ("layer", "sequence", "position", "logits")


class Seen:
    """Keeps what a fold showed: the rows in order, and the batches they came in."""

    def __init__(self):
        self.rows, self.batches, self.logits = [], [], []

    def update(self, batch):
        layer = layer_of(batch)
        assert set(batch["layer"].to_pylist()) == {layer}
        self.batches.append((layer, batch.num_rows))
        self.rows += batch.select(["layer", "sequence", "position"]).to_pylist()
        self.logits.append(logits_of(batch).copy())

    def merge(self, other):
        self.rows += other.rows
        self.batches += other.batches
        self.logits += other.logits


@pytest.fixture
def run(tmp_path):
    return write_run(
        tmp_path / "run", layers=LAYERS, n_experts=8, n_sequences=6, length=10, n_shards=3,
        decode_from=7, options=BhOptions(alpha=0.3), kde=normal_kde(LAYERS),
    )  # fmt: skip


def in_order(run, columns=("layer", "sequence", "position", "logits", "phase")):
    """Rows of the shards, file by file."""
    tables = [pq.read_table(path) for path in sorted((run / "routing").iterdir())]
    return pa.concat_tables(tables).select(list(columns)).to_pylist()


@pytest.mark.parametrize("threads", [1, 2, 5, 40])
@pytest.mark.parametrize("piece", [8, 8 * 7, 8 * 1000])
def test_a_fold_shows_every_row_once_in_log_order(run, monkeypatch, threads, piece):
    monkeypatch.setattr(module, "PIECE_LOGITS", piece)
    seen = fold(open_log(run), Seen, COLUMNS, Scope(threads=threads))
    logged = in_order(run)
    assert seen.rows == [{name: row[name] for name in seen.rows[0]} for row in logged]
    logits = np.array([row["logits"] for row in logged], np.float32)
    assert np.array_equal(np.concatenate(seen.logits), logits)
    assert max(rows for _, rows in seen.batches) == min(20, piece // 8)


def test_whole_groups_come_whole(run, monkeypatch):
    monkeypatch.setattr(module, "PIECE_LOGITS", 8)
    seen = fold(open_log(run), Seen, COLUMNS, whole_groups=True)
    assert seen.batches == [(layer, 20) for _ in range(3) for layer in LAYERS]


def test_layers_and_a_condition_choose_rows(run):
    log = open_log(run)
    seen = fold(log, Seen, COLUMNS, Scope([4, 1], "phase = 'decode' AND sequence > 2"))
    expected = [
        row
        for row in in_order(run)
        if row["layer"] in (1, 4) and row["phase"] == "decode" and row["sequence"] > 2
    ]
    assert seen.rows == [{name: row[name] for name in seen.rows[0]} for row in expected]
    assert fold(log, Seen, COLUMNS, Scope(where="position > 100")).rows == []
    twice = Scope(where="position > 3 AND position < 5")
    assert {row["position"] for row in fold(log, Seen, COLUMNS, twice).rows} == {4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, "no layer 2 in .*; it has layers 0, 1, 4"),
        ({"where": "lyer = 1"}, "no column 'lyer'; did you mean 'layer'"),
        ({"where": "layer ="}, "where: cannot read 'layer ='"),
        ({"where": "position + 1"}, "expected a condition"),
        ({"where": "phase > 1"}, "phase > 1"),
    ],
)
def test_rows_that_cannot_be_chosen_say_why(run, options, message):
    with pytest.raises(InvalidOption, match=message):
        fold(open_log(run), Seen, COLUMNS, Scope(**options))


def test_progress_adds_up_to_the_rows(run, monkeypatch):
    monkeypatch.setattr(module, "PIECE_LOGITS", 8 * 7)
    done = []
    fold(open_log(run), Seen, COLUMNS, Scope(threads=2, progress=done.append))
    assert sum(done) == 180


def test_a_sampled_run_is_read_as_it_is(run):
    manifest = Manifest.from_json((run / "run.json").read_text(), "run.json")
    dataclasses.replace(manifest, sample_every=3).write(run)
    assert len(fold(open_log(run), Seen, COLUMNS).rows) == 180
    frame = open_log(run).replay(0.3)
    assert frame["logged_jaccard"].to_list() == [1.0] * 4


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def flip(path):
    group = pq.read_metadata(path).row_group(1)
    columns = [group.column(i) for i in range(group.num_columns)]
    start = next(c.data_page_offset for c in columns if c.path_in_schema.startswith("logits"))
    data = bytearray(path.read_bytes())
    data[start + 60 : start + 80] = bytes(20)
    path.write_bytes(data)


def mix(path):
    pq.write_table(pq.read_table(path), path)  # one row group of all layers


DAMAGE = {
    r"rank00000-00001.parquet: no readable Parquet footer": cut,
    r"rank00000-00001.parquet: row group 1 cannot be read": flip,
    r"rank00000-00001.parquet: row group 0 holds several layers": mix,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_shard_is_named(run, message):
    DAMAGE[message](run / "routing" / "rank00000-00001.parquet")
    for threads in (1, 3):
        with pytest.raises(CorruptShard, match=message):
            fold(open_log(run), Seen, COLUMNS, Scope(threads=threads))


def test_an_error_stops_the_other_threads(run, monkeypatch):
    monkeypatch.setattr(module, "PIECE_LOGITS", 8)
    lock, updates = threading.Lock(), []

    class Failing(Seen):
        def update(self, batch):
            with lock:
                updates.append(batch.num_rows)
                if len(updates) == 3:
                    raise InvalidOption("third")
            time.sleep(0.002)

    with pytest.raises(InvalidOption, match="third"):
        fold(open_log(run), Failing, COLUMNS, Scope(threads=2))
    assert len(updates) < 60  # of 180 pieces


def test_few_accumulators_are_alive_at_once(run, monkeypatch):
    alive, most = [0], [0]

    class Counting(Seen):
        def __init__(self):
            super().__init__()
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __del__(self):
            alive[0] -= 1

    fold(open_log(run), Counting, COLUMNS, Scope(threads=1))  # 8 stretches
    assert most[0] <= 5


def test_what_a_run_should_have_and_has_not_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "run", n_sequences=6, n_shards=3)
    names = open_log(run).shards
    assert open_log(run).missing == ()
    (run / "tokens" / names[1]).unlink()
    (run / "routing" / names[2]).unlink()
    with pytest.warns(
        UserWarning, match=f"2 files are missing, from routing/{names[2]} on"
    ) as told:
        assert open_log(run).missing == (f"routing/{names[2]}", f"tokens/{names[1]}")
    assert told[0].filename == __file__
    with pytest.raises(SystemExit):
        main(["sql", str(run), "SELECT count(*) FROM tokens"])
    assert f"2 files are missing, from routing/{names[2]} on" in capsys.readouterr().err


def test_a_run_without_logits_reads_but_for_them(run):
    log = open_log(without_logits(run))
    assert not log.has_logits
    seen = [batch.to_pylist() for batch in log.batches(["layer", "experts"])]
    assert sum(map(len, seen)) == 3 * 60
    with pytest.raises(InvalidOption, match=r"run has no logits, only the experts"):
        log.require_logits()
    for where, columns in ((None, COLUMNS), ("logits IS NULL", ["layer"])):
        with pytest.raises(InvalidOption, match="has no logits"):
            list(log.batches(columns, where=where))
    assert log.sql("SELECT count(*), count(logits), count(experts) FROM routing").fetchall() == [
        (180, 0, 180)
    ]


def test_a_column_newer_than_the_run_holds_nulls(run, monkeypatch):
    manifest = Manifest.from_json((run / "run.json").read_bytes(), "run.json")
    dataclasses.replace(manifest, schema_version=1).write(run)
    newer = Column("mood", schema.TEXT, "of the token", since=2, nullable=True)
    grown = {folder: (*columns, newer) for folder, columns in schema.COLUMNS.items()}
    monkeypatch.setattr(schema, "COLUMNS", grown)
    monkeypatch.setattr(log_module, "COLUMNS", grown)
    log = open_log(run)
    (first, *_) = log.batches(["mood", "layer"], where="position < 2")
    assert first.schema.names == ["mood", "layer"]
    assert first.to_pylist() == [{"mood": None, "layer": 0}] * 4
    assert log.tokens(["mood"])["mood"].null_count == log.tokens(["rank"]).num_rows == 60
    assert log.tokens().schema.names[-1] == "mood"


@pytest.mark.parametrize(
    ("folder", "column", "value"),
    [
        ("routing", "logits", None),
        ("routing", "experts", None),
        ("routing", "position", None),
        ("tokens", "phase", None),
    ],
)
def test_a_shard_that_lacks_values_is_corrupt(run, folder, column, value):
    path = run / folder / "rank00000-00001.parquet"
    with pq.ParquetFile(path) as shard:
        groups = [shard.read_row_group(i) for i in range(shard.num_row_groups)]
    for i, table in enumerate(groups):
        index, type = table.schema.names.index(column), table.schema.field(column).type
        values = pa.array([value, *table[column].to_pylist()[1:]], type)
        groups[i] = table.set_column(index, pa.field(column, type), values)
    write_shard(path, groups)
    log = open_log(run)
    with pytest.raises(
        CorruptShard, match=rf"{folder}/{path.name}: column '{column}' (may lack|lacks) values"
    ):
        list(log.batches(["layer", column])) if folder == "routing" else log.tokens()


def test_a_null_model_that_the_run_was_not_routed_by_is_refused(run):
    assert open_log(run).kde is not None
    normal_kde((0, 1, 4, 5)).save(run / "kde.parquet")
    with pytest.raises(CorruptKde, match=r"kde.parquet: sha256 is \w{12}\.\.\., the manifest says"):
        open_log(run).replay(0.2)


@pytest.mark.parametrize("folder", ["routing", "tokens"])
def test_a_shard_that_lacks_a_column_of_its_version_is_corrupt(run, folder):
    path = run / folder / "rank00000-00001.parquet"
    pq.write_table(pq.read_table(path).drop(["forward"]), path)
    with pytest.raises(CorruptShard, match=r"rank00000-00001.parquet: no column 'forward'"):
        open_log(run).open_shard(folder, path.name)


@pytest.mark.parametrize("layers", [None, [0]])
def test_rows_of_some_layers_are_told_by_the_manifest(run, layers):
    log = open_log(run)
    assert log.rows_listed(layers) == sum(group.rows for group in log.row_groups(layers))
    with pytest.raises(InvalidOption, match="no layer 77"):
        log.rows_listed([77])
