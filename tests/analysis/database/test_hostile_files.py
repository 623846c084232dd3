"""A run whose files were made to do harm: each is read, or refused in one line; nothing crashes."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.database.connection import connect
from bhlog.analysis.run import open_log
from bhlog.capture.contract.checksum import with_checksum
from bhlog.capture.contract.errors import CorruptKde, CorruptManifest, CorruptShard, RouterLogError
from tests.synthetic import normal_kde, write_run

QUERIES = (
    "SELECT count(*) FROM routing",
    "SELECT * FROM routing",
    "SELECT * FROM selections",
    "SELECT bh_count(logits, layer, 0.1), bh_experts(logits, layer, 0.1), p_values(logits, layer), "
    "router_entropy(logits), softmax(logits), n_shared(experts, experts) FROM routing",
    "SELECT * FROM tokens",
    "SELECT * FROM runs",
    "SELECT * FROM kde",
    "SELECT * FROM shards",
    "SELECT * FROM replays",
)


@pytest.fixture
def run(tmp_path):
    kde = normal_kde((0, 1, 2))
    return write_run(tmp_path / "demo", n_sequences=2, length=4, n_shards=2, kde=kde)


def ask_all(run):
    """Ask every view; gives the errors, of which each is one line of bhlog's own."""
    errors = []
    with connect(open_log(run)) as database:
        for query in QUERIES:
            try:
                for _ in database.batches(query)[1]:
                    pass
            except RouterLogError as error:
                assert "\n" not in str(error)
                errors.append(error)
    return errors


MANIFESTS = {
    "a number in words": lambda m: m["model"].update(n_experts="x"),
    "less than no experts": lambda m: m["model"].update(n_experts=-1),
    "more experts than memory": lambda m: m["model"].update(n_experts=10**12),
    "a part of an expert": lambda m: m["model"].update(n_experts=16.5),
    "a layer beyond the schema": lambda m: m["model"].update(layers=[10**9]),
    "layers in words": lambda m: m["model"].update(layers="abc"),
    "more rows than can be": lambda m: m["totals"].update(rows=10**30),
    "versions as a list": lambda m: m.update(versions=["a"]),
    "a version as a number": lambda m: m.update(versions={"a": 1}),
    "a name as a list": lambda m: m["model"].update(name=["a"]),
    "a flag in words": lambda m: m.update(token_ids="no"),
    "a shard outside": lambda m: m["shards"][0].update(name="../../secret.parquet"),
}


@pytest.mark.parametrize("change", MANIFESTS)
def test_a_manifest_with_wrong_values_is_refused(run, change):
    manifest = json.loads((run / "run.json").read_text())
    MANIFESTS[change](manifest)
    (run / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptManifest) as error:
        connect(open_log(run))
    assert "\n" not in str(error.value) and str(run) in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "\x00", '{"schema_version": ' + "9" * 5000])
def test_a_manifest_that_is_none_is_refused(run, text):
    (run / "run.json").write_text(text)
    with pytest.raises(CorruptManifest, match=r"run\.json: not a manifest"):
        open_log(run)


def replaced(name, value, data_type):
    def change(table):
        at = table.schema.get_field_index(name)
        return table.set_column(at, name, pa.array([value] * len(table), data_type))

    return change


floats, uint16s = pa.list_(pa.float32()), pa.list_(pa.uint16())
SHARDS = {
    "a layer in words": (replaced("layer", "x", pa.string()), "column 'layer' is string"),
    "no logits": (lambda t: t.drop_columns(["logits"]), "no column 'logits'"),
    "logits in words": (replaced("logits", "x", pa.string()), "column 'logits' is string"),
    "no lists of logits": (replaced("logits", None, floats), None),
    "lists of nothing": (replaced("logits", [None] * 16, floats), None),
    "fewer logits": (replaced("logits", [1.0, 2.0], floats), None),
    "experts that are not": (replaced("experts", [65535, 0], uint16s), None),
    "nothing selected": (replaced("experts", [None, 1], uint16s), None),
    "its own run": (lambda t: t.append_column("run", pa.array(["x"] * len(t))), None),
    "a name that is SQL": (
        lambda t: t.append_column('a"; DROP VIEW runs; --', pa.array(["x"] * len(t))),
        None,
    ),
}


@pytest.mark.parametrize("change", SHARDS)
@pytest.mark.parametrize("number", [0, 1])
def test_a_shard_of_other_columns_is_named_or_read(run, change, number):
    path = run / "routing" / f"rank00000-0000{number}.parquet"
    alter, line = SHARDS[change]
    pq.write_table(alter(pq.read_table(path)), path)
    try:
        errors = ask_all(run)
    except CorruptShard as error:  # the first shard is looked at before anything is asked
        assert number == 0
        errors = [error]
    for error in errors:
        assert isinstance(error, CorruptShard) and f"{path.name}: " in str(error)
        assert line is None or line in str(error)
    assert errors or line is None


def test_columns_that_the_schema_does_not_have_are_not_shown(run):
    for path in run.glob("routing/*"):
        table = pq.read_table(path)
        extra = pa.array(["x"] * len(table))
        pq.write_table(table.append_column("run", extra).append_column("evil", extra), path)
    with connect(open_log(run)) as database:
        assert database.sql("SELECT DISTINCT run FROM routing").fetchall() == [("demo",)]
        assert "evil" not in database.columns()["routing"]


@pytest.mark.slow
def test_no_change_to_a_footer_crashes(run):
    path = run / "routing" / "rank00000-00001.parquet"
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    rng = np.random.default_rng(0)
    named = 0
    for _ in range(15):
        data = bytearray(whole)
        for at in rng.integers(len(data) - 8 - footer, len(data) - 8, 4):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        named += sum(path.name in str(error) for error in ask_all(run))
    assert named > 15


@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_what_is_no_file_is_no_shard(run):
    routing = run / "routing"
    os.mkfifo(routing / "rank00000-00002.parquet")
    (routing / "rank00000-00003.parquet").mkdir()
    (routing / "rank00000-00004.parquet").symlink_to("/nonexistent")
    (routing / "rank00000-00005.parquet").symlink_to(routing / "rank00000-00005.parquet")
    (run / "up").symlink_to(run)
    assert ask_all(run) == []


@pytest.mark.parametrize("content", ["columns", "garbage"])
def test_a_replay_of_other_columns_is_named(run, content, monkeypatch):
    monkeypatch.setattr("bhlog.analysis.run_folder._NO_LISTS", 2)  # it has none
    path = run / "replay" / "mine" / "rank00000-00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"a": [1]}), path)
    if content == "garbage":
        path.write_bytes(b"PAR1")
    with pytest.raises(CorruptShard, match=r"replay/mine/rank00000-00000\.parquet: ") as error:
        connect(open_log(run))
    assert "\n" not in str(error.value)


def tails(change):
    def alter(table):
        values = [change(np.array(tail)).tolist() for tail in table["tail"].to_pylist()]
        at = table.schema.get_field_index("tail")
        return table.set_column(at, table.schema.field(at), pa.array(values, table["tail"].type))

    return alter


def column(name, values):
    def alter(table):
        at = table.schema.get_field_index(name)
        field = table.schema.field(at)
        return table.set_column(at, field, pa.array(values, field.type))

    return alter


KDES = {
    "NaN": tails(lambda tail: tail * np.nan),
    "a rising tail": tails(lambda tail: tail[::-1]),
    "a tail of one point": tails(lambda tail: tail[:1]),
    "no grid": column("dx", [0.0] * 3),
    "a grid out of reach": column("x0", [np.inf] * 3),
    "experts missing": column("expert", [65535] * 3),
    "the same layer twice": lambda table: pa.concat_tables([table, table]),
    "no layer": lambda table: table.slice(0, 0),
    "a kernel in SQL": column("kernel", ["'; DROP VIEW runs; --"] * 3),
}


@pytest.mark.parametrize("change", KDES)
def test_a_null_model_that_breaks_its_rules_is_refused(run, change):
    path = run / "kde.parquet"
    pq.write_table(KDES[change](pq.read_table(path)), path)
    with pytest.raises(CorruptKde, match=r"kde\.parquet: ") as error:
        connect(open_log(run))
    assert "\n" not in str(error.value)
    with connect(open_log(run), kde=normal_kde((0, 1, 2))) as database:
        assert database.sql("SELECT count(*) FROM kde").fetchall() == [(3,)]


def test_a_null_model_of_other_layers_is_said_when_it_is_needed(run):
    path = run / "kde.parquet"
    pq.write_table(with_checksum(column("layer", [7, 8, 9])(pq.read_table(path))), path)
    lines = {str(error) for error in ask_all(run)}
    assert lines and all("the null model has layers 7-9, but not" in line for line in lines)


def test_links_in_a_circle_in_place_of_a_replays_part_are_refused(run):
    open_log(run).replay(0.3, out=run / "replay", threads=1)
    (part, *_) = sorted(run.glob("replay/*/*.parquet"))
    part.unlink()
    part.symlink_to(part)
    with pytest.raises(CorruptShard, match=part.name) as error:
        ask_all(run)
    assert str(error.value).isprintable()
