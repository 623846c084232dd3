from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest

from bhlog.analysis.database.catalog import VIEWS, meaning
from bhlog.analysis.database.connection import connect
from bhlog.analysis.log import Log
from bhlog.analysis.replay.decisions import write_decisions
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import CorruptShard, InvalidOption, MissingRun, RouterLogError
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, with_many_shards, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sql") / "demo"
    options = BhOptions(alpha=0.1, max_k=6)
    return write_run(folder, options=options, kde=normal_kde((0, 1, 2)), decode_from=40)


@pytest.fixture(scope="module")
def database(run):
    with connect(open_log(run)) as opened:
        yield opened


def test_every_view_is_there_and_says_its_run(database):
    columns = database.columns()
    assert list(columns) == list(VIEWS) or set(columns) == set(VIEWS)
    for view in VIEWS:
        assert next(iter(columns[view])) == "run"
    assert columns["routing"]["logits"] == "FLOAT[]"
    assert columns["routing"]["phase"] == "VARCHAR"


def test_every_column_says_what_it_means(database):
    for view, columns in database.columns().items():
        (batch,) = database.describe(view)[1]
        assert [(row["column"], row["type"]) for row in batch.to_pylist()] == list(columns.items())
        assert all(row["meaning"] == meaning(view, row["column"]) for row in batch.to_pylist())
    comments = dict(database.sql("SELECT view_name, comment FROM duckdb_views()").fetchall())
    assert comments["selections"] == VIEWS["selections"]
    assert {name for (name,) in database.sql("SHOW TABLES").fetchall()} == set(VIEWS)


def test_routing_holds_the_rows_of_the_log(run, database):
    log = open_log(run)
    found = database.sql("SELECT * FROM routing ORDER BY layer, rank, sequence, position")
    rows = found.to_arrow_table().to_pylist()
    expected = [row for batch in log.batches(list(rows[0])[1:]) for row in batch.to_pylist()]
    expected.sort(key=lambda r: (r["layer"], r["rank"], r["sequence"], r["position"]))
    assert [{**row, "run": "demo"} for row in expected] == rows


def test_selections_have_a_row_per_selected_expert(run, database):
    log = open_log(run)
    found = database.sql(
        "SELECT layer, sequence, position, k, expert, weight, logit, p_value FROM selections "
        "ORDER BY layer, sequence, position, k"
    ).fetchall()
    expected = []
    for batch in log.batches(["layer", "sequence", "position", "logits", "experts", "weights"]):
        for row in batch.to_pylist():
            for k, (e, w) in enumerate(zip(row["experts"], row["weights"], strict=True), start=1):
                logit = np.float32(row["logits"][e])
                p = float(log.kde[row["layer"]].p_value(logit))
                at = (row["layer"], row["sequence"], row["position"])
                expected.append((*at, k, e, w, float(logit), p))
    assert found == sorted(expected)


def test_log_sql_gives_a_relation_for_polars_pandas_and_arrow(run):
    log = open_log(run)
    relation = log.sql("SELECT layer, count(*) AS n FROM routing GROUP BY layer ORDER BY layer")
    assert relation.pl()["n"].to_list() == [200, 200, 200]
    assert relation.df()["n"].tolist() == [200, 200, 200]
    assert relation.to_arrow_table().num_rows == 3
    assert log.sql("SELECT $x AS x", x=3).fetchall() == [(3,)]


def test_a_relation_outlives_the_database_it_came_from(run):
    relation = connect(open_log(run), temp_dir=None).sql("SELECT count(*) FROM routing")
    assert relation.fetchall() == [(600,)]


def test_runs_that_share_a_name_are_told_apart_by_their_folders(tmp_path):
    for parent, seed in (("a", 0), ("b", 1)):
        write_run(tmp_path / parent / "demo", n_sequences=2, length=3, n_shards=1, seed=seed)
    logs = [open_log(tmp_path / parent / "demo") for parent in "ab"]
    with connect(logs) as database:
        found = database.sql("SELECT run, count(*) FROM routing GROUP BY run ORDER BY run")
        assert found.fetchall() == [("a/demo", 18), ("b/demo", 18)]
        assert [r[0] for r in database.sql("SELECT run FROM runs").fetchall()] == list(
            database.runs
        )
    with pytest.raises(InvalidOption, match="given twice"):
        connect([logs[0], logs[0]])


def test_runs_with_different_numbers_of_experts_open_together(tmp_path):
    for n_experts in (8, 16):
        folder = tmp_path / f"e{n_experts}"
        write_run(folder, n_experts=n_experts, top_k=2, n_sequences=2, length=3, n_shards=1)
    with connect([open_log(tmp_path / "e8"), open_log(tmp_path / "e16")]) as database:
        found = database.sql(
            "SELECT run, max(len(logits)), avg(router_entropy(logits)) > 0 FROM routing "
            "GROUP BY run ORDER BY run"
        )
        assert found.fetchall() == [("e16", 16, True), ("e8", 8, True)]


@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_an_empty_run_has_views_without_rows(tmp_path):
    write_run(tmp_path / "empty", n_sequences=2, length=3, n_shards=1)
    for folder in ("routing", "tokens"):
        for shard in (tmp_path / "empty" / folder).iterdir():
            shard.rename(shard.with_name(shard.name + ".part"))  # never sealed
    write_run(tmp_path / "full", n_sequences=2, length=3, n_shards=1)
    with connect(open_log(tmp_path / "empty")) as database:
        for view in ("routing", "selections", "tokens", "replays", "shards", "kde"):
            assert database.sql(f"SELECT * FROM {view}").fetchall() == []
        assert database.columns()["routing"]["logits"] == "FLOAT[]"
    with connect([open_log(tmp_path / name) for name in ("empty", "full")]) as database:
        found = database.sql("SELECT DISTINCT run FROM selections").fetchall()
        assert found == [("full",)]


def test_replays_are_read_by_their_settings(tmp_path):
    write_run(tmp_path / "demo", kde=normal_kde((0, 1, 2)), n_sequences=4, length=5, n_ranks=2)
    log = open_log(tmp_path / "demo")
    settings = [BhOptions(alpha=a, max_k=8) for a in (0.05, 0.2)]
    write_decisions(log, settings, tmp_path / "demo" / "replay")
    with connect(open_log(tmp_path / "demo")) as database:
        found = database.sql(
            "SELECT replay, count(*), sum(p.n_selected) FROM replays AS p "
            "JOIN routing USING (run, layer, rank, sequence, position) "
            "GROUP BY replay ORDER BY replay"
        ).fetchall()
        counted = database.sql(
            "SELECT sum(bh_count(logits, layer, 0.05, 1, 8)), "
            "sum(bh_count(logits, layer, 0.2, 1, 8)) FROM routing"
        ).fetchall()
    assert [row[:2] for row in found] == [("alpha-0.05_k-1-8", 60), ("alpha-0.2_k-1-8", 60)]
    assert [row[2] for row in found] == list(counted[0])


def test_a_cut_shard_is_named(tmp_path):
    write_run(tmp_path / "demo", n_shards=2)
    shard = tmp_path / "demo" / "routing" / "rank00000-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    database = connect(open_log(tmp_path / "demo"))
    assert database.sql("SELECT count(*) FROM tokens").fetchall() == [(200,)]
    with pytest.raises(CorruptShard, match=r"rank00000-00001\.parquet: no readable") as error:
        for _ in database.batches("SELECT avg(n_selected) FROM routing")[1]:
            pass
    assert "\n" not in str(error.value)
    first = tmp_path / "demo" / "routing" / "rank00000-00000.parquet"
    first.write_bytes(b"PAR1")
    with pytest.raises(CorruptShard, match=r"rank00000-00000\.parquet"):
        connect(open_log(tmp_path / "demo"))


def test_pages_that_cannot_be_read_name_their_shard(tmp_path):
    write_run(tmp_path / "demo", n_shards=1)
    shard = tmp_path / "demo" / "routing" / "rank00000-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[4:4000] = bytes(len(data[4:4000]))
    shard.write_bytes(data)
    database = connect(open_log(tmp_path / "demo"))
    with pytest.raises(CorruptShard, match=r"rank00000-00000\.parquet: row group 0 cannot be read"):
        for _ in database.batches("SELECT avg(list_sum(logits)) FROM routing")[1]:
            pass


def plan(database, query: str) -> str:
    return database.sql(f"EXPLAIN ANALYZE {query}").fetchall()[0][1]


def test_a_question_about_one_layer_reads_its_row_groups(database):
    assert "Row Groups Scanned: 2 / 6" in plan(
        database, "SELECT avg(n_selected) FROM routing WHERE layer = 1"
    )
    assert "Row Groups Scanned: 2 / 6" in plan(
        database, "SELECT avg(logit) FROM selections WHERE layer = 1"
    )


def test_a_question_about_selections_asks_for_no_logits(database):
    for query in (
        "SELECT expert, count(*) FROM selections GROUP BY expert",
        "SELECT k, avg(weight) FROM selections GROUP BY k",
        "SELECT count(*) FROM selections WHERE layer = 1",
    ):
        assert "logits" not in plan(database, query)
    assert "logits" in plan(database, "SELECT avg(logit) FROM selections")


def test_a_count_and_an_average_read_no_logits(tmp_path, monkeypatch):
    write_run(tmp_path / "demo", n_experts=64, length=2000, n_shards=1, top_k=4)
    size = sum(f.stat().st_size for f in (tmp_path / "demo" / "routing").iterdir())
    read = []

    class Counting:
        def __init__(self, file):
            self.file = file

        def read_at(self, n, position):
            data = self.file.read_at(n, position)
            read.append(len(data))
            return data

        def __getattr__(self, name):
            return getattr(self.file, name)

    opened = Log.open_file
    monkeypatch.setattr(Log, "open_file", lambda log, path: Counting(opened(log, path)))
    with connect(open_log(tmp_path / "demo")) as database:
        read.clear()  # the footers
        database.sql("SELECT count(*) FROM routing").fetchall()
        database.sql("SELECT layer, avg(n_selected) FROM routing GROUP BY layer").fetchall()
        without = sum(read)
        database.sql("SELECT avg(list_max(logits)) FROM routing").fetchall()
        assert without < size / 20 < size / 2 < sum(read) - without


OUTSIDE = [
    "ATTACH '{out}/x.db'",
    "ATTACH 'bhlog://x.db'",
    "COPY (SELECT 1) TO '{out}/x.csv'",
    "COPY (SELECT 1) TO '{run}/x.csv'",
    "COPY routing TO '{run}/routing/rank00000-00000.parquet'",
    "COPY (SELECT 1) TO 'bhlog://demo/routing/rank00000-00000.parquet'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{run}/x.csv'",
    "explain /* */ (format json) copy (SELECT 1) TO '{run}/x.csv'",
    "SELECT 1; COPY (SELECT 1) TO '{run}/x.csv'",
    "PREPARE p AS COPY (SELECT 1) TO '{run}/x.csv'",
    "EXPORT DATABASE '{out}/x'",
    "IMPORT DATABASE '{out}'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "INSTALL '{out}/x.duckdb_extension'",
    "SELECT * FROM read_text('{out}/secret.txt')",
    "SELECT * FROM read_csv('{run}/../secret.txt')",
    "SELECT * FROM read_json('{run}/run.json')",
    "SELECT * FROM '{out}/secret.txt'",
    "SELECT * FROM glob('{out}/*')",
    "SELECT * FROM sniff_csv('{out}/secret.txt')",
    "SELECT * FROM parquet_metadata('{run}/routing/rank00000-00000.parquet')",
    "SELECT * FROM local_in_python",
    "SET enable_external_access = true",
    "SET allowed_directories = ['/']",
    "SET lock_configuration = false",
    "RESET allowed_directories",
    "SET temp_directory = '{out}'",
    "SET GLOBAL threads = 1",
    "PRAGMA enable_profiling",
    "PRAGMA profile_output = '{out}/p.json'",
    "PRAGMA memory_limit = '1GB'",
    "CALL enable_logging('QueryLog', storage = 'file', storage_path = '{out}/log')",
    "CREATE SECRET s (TYPE s3)",
    "CREATE PERSISTENT SECRET s (TYPE s3)",
    "INSERT INTO runs SELECT * FROM runs",
    "DELETE FROM runs",
    "CREATE TABLE x AS SELECT * FROM read_csv('{out}/secret.txt')",
]


@pytest.mark.parametrize("attempt", OUTSIDE)
def test_sql_cannot_leave_the_run_nor_write(run, database, attempt):
    local_in_python = [1]  # noqa: F841  # DuckDB would find it by name if it were let
    secret = run.parent / "secret.txt"
    secret.write_text("a\n1\n")
    before = sorted(run.parent.rglob("*")), (run / "run.json").stat().st_mtime_ns
    query = attempt.format(out=run.parent, run=run)
    with pytest.raises(RouterLogError) as error:
        for _ in database.batches(query)[1]:
            pass
    assert "secret.txt\n" not in str(error.value)
    assert before == (sorted(run.parent.rglob("*")), (run / "run.json").stat().st_mtime_ns)
    assert database.sql("SELECT count(*) FROM routing").fetchall() == [(600,)]


@pytest.mark.parametrize(
    "path", ["demo/../secret.txt", "demo/run.json", "demo/routing/*.parquet", "../etc/passwd"]
)
def test_a_path_that_is_no_sealed_file_of_a_run_finds_nothing(run, database, path):
    (run.parent / "secret.txt").write_text("hunter2")
    try:
        found = database.sql(f"SELECT * FROM read_blob('bhlog://{path}')").fetchall()
    except InvalidOption as refused:  # DuckDB refuses some paths itself, which ones by version
        found = []
        assert "Cannot access file" in str(refused) and "\n" not in str(refused)
    assert found == []


def test_the_connection_itself_refuses_writes_to_the_files_of_the_run(run, database):
    path = "bhlog://demo/routing/rank00000-00000.parquet"
    for query in (
        f"COPY (SELECT 1) TO '{path}'",
        f"COPY (SELECT 1) TO '{run}/x.csv'",
        "ATTACH 'bhlog://demo/x.db'",
    ):
        with pytest.raises(duckdb.Error):
            database.connection.execute(query)


def test_unsafe_leaves_files_and_settings_to_the_user(run, tmp_path):
    with connect(open_log(run), unsafe=True) as database:
        database.sql(f"COPY (SELECT count(*) AS n FROM routing) TO '{tmp_path}/x.csv'")
        database.sql("SET threads = 1")
    assert (tmp_path / "x.csv").read_text() == "n\n600\n"


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ("SELECT lyer FROM routing", "no column 'lyer'; did you mean 'layer'?"),
        ("SELECT * FROM rooting", "no table 'rooting'; did you mean 'routing'?"),
        ("SELECT bh_cont(logits, layer, 0.1) FROM routing", "did you mean 'bh_count'?"),
        ("SELECT FROM WHERE", "syntax error"),
        ("", "the query is empty"),
        ("SELECT * FROM routing WHERE layer = 'x'", "SQL: "),
    ],
)
def test_a_wrong_query_gets_one_line_with_the_nearest_right_name(database, query, line):
    with pytest.raises(InvalidOption) as error:
        for _ in database.batches(query)[1]:
            pass
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_grouping_larger_than_the_memory_limit_spills_and_leaves_nothing_behind(tmp_path):
    write_run(tmp_path / "demo", n_experts=64, n_sequences=8, length=4000, n_shards=4, top_k=8)
    spill = tmp_path / "spill"
    spill.mkdir()
    database = connect(open_log(tmp_path / "demo"), memory_limit="20MB", threads=1, temp_dir=spill)
    counted, spilled = 0, 0
    for batch in database.batches("SELECT logits, count(*) AS n FROM routing GROUP BY logits")[1]:
        counted += sum(batch.column("n").to_pylist())
        spilled = max(spilled, sum(f.stat().st_size for f in spill.rglob("*") if f.is_file()))
    assert counted == 96_000 and spilled > 1_000_000
    database.close()
    del database, batch
    assert not [f for f in spill.rglob("*") if f.is_file()]


def test_a_run_of_a_thousand_shards_is_one_table(tmp_path):
    run = with_many_shards(write_run(tmp_path / "demo", n_sequences=1, length=4, n_shards=1))
    database = connect(open_log(run))  # tests/bench/sql.py measures it: under half a second
    assert database.sql("SELECT count(*) FROM routing").fetchall() == [(12_000,)]


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(MissingRun):
        connect(open_log(tmp_path / "nothing"))
    write_run(tmp_path / "demo", n_sequences=1, length=2, n_shards=1)
    with pytest.raises(InvalidOption, match="no folder for spilled data"):
        connect(open_log(tmp_path / "demo"), temp_dir=tmp_path / "nothing")
    with pytest.raises(InvalidOption):
        connect(open_log(tmp_path / "demo"), memory_limit="much")


@pytest.mark.parametrize("kind", ["polars", "lazy", "pandas", "arrow", "batch"])
@pytest.mark.parametrize("unsafe", [False, True])
def test_a_table_of_the_callers_can_be_joined(run, kind, unsafe):
    frame = pl.DataFrame({"position": [0, 3], "label": ["first", "fourth"]})
    table = {
        "polars": frame,
        "lazy": frame.lazy(),
        "pandas": frame.to_pandas(),
        "arrow": frame.to_arrow(),
        "batch": frame.to_arrow().combine_chunks().to_batches()[0],
    }[kind]
    query = "SELECT label, count(*) FROM routing JOIN df USING (position) WHERE layer = $layer "
    with connect(open_log(run), unsafe=unsafe) as database:
        relation = database.sql(query + "GROUP BY label ORDER BY label", {"df": table, "layer": 1})
        assert relation.fetchall() == [("first", 4), ("fourth", 4)]
    found = open_log(run).sql(query + "GROUP BY label ORDER BY label", df=table, layer=1)
    del table
    assert found.fetchall() == [("first", 4), ("fourth", 4)]


def test_a_table_of_the_callers_is_seen_by_its_own_query_alone(database):
    frame = pl.DataFrame({"x": [1]})
    assert database.sql("FROM df", {"df": frame}).fetchall() == [(1,)]
    with pytest.raises(InvalidOption, match="no table 'df'"):
        database.sql("FROM df")
    with pytest.raises(InvalidOption, match="'routing' is a view of the run"):
        database.sql("FROM routing", {"routing": frame})
    with pytest.raises(InvalidOption, match="no table 'frame'"):  # nor is a variable by its name
        database.sql("FROM frame")


def test_null_models_with_more_columns_stand_beside_those_without(tmp_path):
    write_run(tmp_path / "a", layers=(0,), n_experts=8, top_k=2, seed=1)
    log = open_log(tmp_path / "a")
    options = FitOptions(trim_high=2, centre="median")
    kde = log.fit(options)
    database = connect(log, kde=kde, temp_dir=None)
    ((n,),) = database.sql("SELECT count(*) FROM kde WHERE rule = 'scott'").fetchall()
    assert n == 1
    counts = database.sql("SELECT bh_count(logits, layer, 0.3) FROM routing").fetchall()
    (summary,) = log.replay(alpha=0.3, kde=kde).head(1).rows(named=True)
    assert sum(c for (c,) in counts) / len(counts) == pytest.approx(summary["mean_experts"])
