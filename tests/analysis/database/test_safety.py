"""SQL on a stranger's log: attacks beyond those that test_database tries on every kind of query."""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.database.connection import connect
from bhlog.analysis.database.shell import shell_statements
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import RouterLogError
from tests.synthetic import write_run

SECRET = "hunter2"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a run, a secret beside it, and links inside the run that lead out of it."""
    folder = tmp_path_factory.mktemp("safety")
    write_run(folder / "demo", n_sequences=2, length=5, n_shards=1)
    write_run(folder / "other", n_sequences=2, length=5, n_shards=1)
    (folder / "secret.csv").write_text(f"word\n{SECRET}\n")
    (folder / "demo" / "link.csv").symlink_to(folder / "secret.csv")
    (folder / "demo" / "out").symlink_to(folder, target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def database(place):
    with connect(open_log(place / "demo")) as opened:
        yield opened


def answer(database, query):
    return [row for batch in database.batches(query)[1] for row in batch.to_pylist()]


READERS = [
    "read_text",
    "read_blob",
    "read_csv",
    "read_json",
    "read_parquet",
    "parquet_scan",
    "read_duckdb",
    "sniff_csv",
    "read_ndjson",
    "read_json_objects",
    "read_single_csv_file",
    "read_single_json_file",
    "parquet_metadata",
    "parquet_schema",
    "parquet_kv_metadata",
    "parquet_file_metadata",
    "parquet_full_metadata",
]
PLACES = (
    "{place}/secret.csv",
    "{place}/demo/../secret.csv",
    "{place}/demo/link.csv",
    "{place}/demo/out/secret.csv",
    "{place}/other/routing/rank00000-00000.parquet",
    "file://{place}/secret.csv",
    "bhlog://{place}/secret.csv",
    "bhlog://demo/../secret.csv",
    "bhlog://demo/link.csv",
    "bhlog://demo/out/secret.csv",
    "bhlog://other/routing/rank00000-00000.parquet",
    "bhlog://demo/routing/../../secret.csv",
    "http://127.0.0.1:9/secret.csv",
    "https://127.0.0.1:9/secret.csv",
    "s3://bucket/secret.csv",
    "memory://secret.csv",
    "simplecache::file://{place}/secret.csv",
    "/proc/self/environ",
    "/dev/stdin",
    "~/.ssh/id_rsa",
)


@pytest.mark.parametrize("where", PLACES)
def test_no_reader_reaches_a_file_that_is_not_of_the_run(place, database, where):
    path = where.format(place=place)
    for call in [f"{reader}('{path}')" for reader in READERS] + [f"'{path}'", f"glob('{path}')"]:
        try:
            rows = answer(database, f"SELECT * FROM {call}")
        except RouterLogError as error:
            assert SECRET not in str(error) and "\n" not in str(error)
        else:
            assert rows == [], call


REFUSED = (
    "SELECT getenv('HOME')",
    "SELECT * FROM duckdb_secrets(); CREATE SECRET s (TYPE s3, KEY_ID 'k', SECRET 'x')",
    "DROP SECRET s",
    "FORCE INSTALL httpfs FROM 'http://127.0.0.1:9'",
    "UPDATE EXTENSIONS",
    "PRAGMA database_list; SET enable_external_access = true",
    "SET file_search_path = '/'",
    "SET home_directory = '{place}'",
    "SET extension_directory = '{place}'",
    "SET secret_directory = '{place}'",
    "SET custom_extension_repository = 'http://127.0.0.1:9'",
    "SET log_query_path = '{place}/log'",
    "SET python_enable_replacements = true",
    "SET python_scan_all_frames = true",
    "SET allow_unsigned_extensions = true",
    "SET disabled_filesystems = ''",
    "SET SESSION memory_limit = '1TB'",
    "SET VARIABLE x = (SELECT content FROM read_text('{place}/secret.csv'))",
    "RESET enable_external_access",
    "RESET lock_configuration",
    "PRAGMA enable_checkpoint_on_shutdown",
    "PRAGMA import_database('{place}')",
    "VACUUM",
    "USE system",
    "DETACH memory",
    "ATTACH ':memory:' AS x",
    "ATTACH OR REPLACE '{place}/x.db' AS x",
    "COPY (SELECT 1) TO '/dev/stdout'",
    "COPY runs FROM '{place}/secret.csv'",
    "COPY FROM DATABASE memory TO memory",
    "EXPORT DATABASE '{place}/dump' (FORMAT parquet)",
    "UPDATE runs SET path = 'x'",
    "TRUNCATE runs",
    "ALTER TABLE runs ADD COLUMN x INTEGER",
    "EXECUTE p",
    "CALL enable_profiling('json', save_location = '{place}/profile')",
    "SELECT * FROM enable_logging('QueryLog', storage = 'file', storage_path = '{place}/log')",
    "SELECT * FROM which_secret('s3://bucket', 's3')",
    "CALL create_external_resource('file')",
    "CALL add_grammar_extension('x')",
    "CALL force_checkpoint()",
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM pandas_scan(1)",
    "PRAGMA copy_database('memory', '{place}/x.db')",
    "SELECT * FROM query('COPY (SELECT 1) TO ''{place}/x.csv''')",
    "SELECT * FROM query_table('{place}/secret.csv')",
    "SELECT * FROM sqlite_scan('{place}/x.db', 't')",
    "SELECT * FROM python_map_function()",
    "CREATE TABLE x AS FROM '{place}/secret.csv'",
    "CREATE VIEW x AS FROM read_text('{place}/secret.csv'); FROM x",
    "CREATE MACRO m() AS TABLE FROM read_text('{place}/secret.csv'); FROM m()",
    "SELECT 1; SELECT 2",
    "CREATE VIEW x AS SELECT 1",
    "CREATE TEMP TABLE x AS SELECT 1",
    "SET VARIABLE x = 1",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "PRAGMA table_info('routing')",
    "CALL duckdb_views()",
    "DROP VIEW routing",
    "WITH gone AS (DELETE FROM runs RETURNING *) SELECT * FROM gone",
    "WITH more AS (INSERT INTO runs SELECT * FROM runs RETURNING *) SELECT * FROM more",
    "WITH other AS (UPDATE runs SET path = 'x' RETURNING *) SELECT * FROM other",
    "EXPLAIN ANALYZE WITH gone AS (DELETE FROM runs RETURNING *) SELECT * FROM gone",
    "EXPLAIN ANALYZE DELETE FROM runs",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{place}/x.csv'",
    "EXPLAIN /* a /* b */ SELECT 1 */ ANALYZE COPY (SELECT 1) TO '{place}/x.csv'",
    "EXPLAIN /* /* */ */ ANALYZE /* */ CREATE TABLE x AS SELECT 1",
    "/* /* */ SELECT 1; -- */ EXPLAIN ANALYZE COPY (SELECT 1) TO '{place}/x.csv'",
    "EXPLAIN ANALYZE -- SELECT 1\n COPY (SELECT 1) TO '{place}/x.csv'",
    "EXPLAIN (FORMAT json) CREATE TABLE x AS SELECT 1",
    "EXPLAIN (FORMAT json, ANALYZE) COPY (SELECT 1) TO '{place}/x.csv'",
    "EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{place}/x.csv'",
    "EXPLAIN ANALYZE ATTACH '{place}/x.db'",
    "EXPLAIN ANALYZE SET threads = 1",
    "COPY (PIVOT routing ON layer USING sum(n_selected)) TO '{place}/x.csv'",
    "EXPLAIN ANALYZE COPY (PIVOT routing ON layer USING sum(n_selected)) TO '{place}/x.csv'",
    "CREATE TABLE x AS PIVOT routing ON layer USING sum(n_selected)",
    "DELETE FROM runs WHERE 1 IN (SELECT 1 FROM (PIVOT routing ON layer USING count(*)))",
    "INSERT INTO runs FROM (PIVOT runs ON top_k USING count(*))",
    "SELECT * FROM (PIVOT routing ON layer USING count(*)); COPY (SELECT 1) TO '{place}/x.csv'",
    "PIVOT (WITH gone AS (DELETE FROM runs RETURNING *) FROM gone) ON top_k USING count(*)",
    "MERGE INTO runs USING runs AS r ON (true) WHEN MATCHED THEN DELETE",
    "COPY (SELECT 1) TO '{spill}/x.csv'",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{spill}/x.csv'",
    "SELECT current_setting('temp_directory')",
    "SELECT \"current_setting\" ('temp_directory')",
    "SELECT 'temp_directory'.current_setting()",
    "SELECT * FROM read_text(current_setting('temp_directory') || '/*')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM pg_catalog.pg_settings",
    "SUMMARIZE pg_settings",
    "SHOW temp_directory",
    "SHOW allowed_directories",
    "SELECT * FROM duckdb_temporary_files()",
    "SELECT * FROM query('SELECT * FROM duckdb_settings()')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('FROM duckdb_settings()'))",
)


def spill_of(database) -> str:
    query = "SELECT current_setting('temp_directory')"
    return database.connection.sql(query).fetchall()[0][0]


@pytest.mark.parametrize("attempt", REFUSED)
def test_sql_is_refused_what_reaches_beyond_the_run(place, database, attempt):
    spill = spill_of(database)
    before = sorted(place.rglob("*"))
    with pytest.raises(RouterLogError) as error:
        answer(database, attempt.format(place=place, spill=spill))
    assert SECRET not in str(error.value) and "\n" not in str(error.value)
    assert sorted(place.rglob("*")) == before
    assert not list(Path(spill).glob("x*"))
    assert answer(database, "SELECT count(*) AS n FROM runs") == [{"n": 1}]
    assert spill not in str(error.value) or spill in attempt.format(place=place, spill=spill)


@pytest.mark.parametrize(
    "query",
    [
        "SELECT 1",
        "SELECT 1; -- and no more",
        "/* a /* b */ c */ FROM runs",
        "VALUES (1)",
        "TABLE runs",
        "DESCRIBE routing",
        "SHOW TABLES",
        "SHOW ALL TABLES",
        "SUMMARIZE tokens",
        "WITH a AS (SELECT 1) SELECT * FROM a",
        "EXPLAIN SELECT 1",
        "explain analyze /* /* */ */ select 1",
        "EXPLAIN (FORMAT json) SELECT 1",
        "EXPLAIN ANALYZE (SELECT 1)",
        "PIVOT routing ON layer USING sum(n_selected) GROUP BY position",
        "PIVOT routing ON layer IN (0, 1) USING sum(n_selected) GROUP BY position;",
        "SELECT path AS query, 'current_setting(' AS text FROM runs",
    ],
)
def test_what_only_reads_is_answered(database, query):
    assert answer(database, query)


@pytest.mark.slow
def test_what_spills_is_bounded(tmp_path):
    run = write_run(tmp_path / "demo", n_sequences=1, length=2, n_shards=1)
    big = "SELECT hash(range)::VARCHAR AS h, count(*) AS n FROM range(3000000) GROUP BY h"
    options = {"memory_limit": "40MB", "threads": 1, "temp_dir": tmp_path}
    with connect(open_log(run), temp_limit="1MB", **options) as database:
        with pytest.raises(RouterLogError) as error:
            answer(database, big)
        assert "\n" not in str(error.value)
    with connect(open_log(run), **options) as database:
        assert len(answer(database, big)) == 3_000_000
    with pytest.raises(RouterLogError):
        connect(open_log(run), temp_limit="much")


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_uses_is_not(tmp_path):
    run = write_run(tmp_path / "demo", n_sequences=1, length=2, n_shards=1)
    spill = tmp_path / "spill"
    spill.mkdir()
    script = (
        "import sys, time; from bhlog.analysis.run import open_log\n"
        "from bhlog.analysis.database.connection import connect\n"
        "database = connect(open_log(sys.argv[1]), temp_dir=sys.argv[2])\n"
        "print('open', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(run), str(spill)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        (theirs,) = (path for path in spill.iterdir() if path.is_dir())
        (theirs / "data").write_text("spilled")
        connect(open_log(run), temp_dir=spill).close()
        assert (theirs / "data").exists()
        process.kill()
        process.wait()
    with connect(open_log(run), temp_dir=spill):
        assert not theirs.exists() and len(list(spill.iterdir())) == 2
    gc.collect()
    assert not list(spill.iterdir())


def test_the_configuration_cannot_be_opened_again(place, database):
    for query in (
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "SET allowed_directories = ['/']",
        "RESET allowed_directories",
        f"ATTACH '{place}/x.db'",
        f"FROM read_text('{place}/secret.csv')",
        "LOAD httpfs",
    ):
        with pytest.raises(duckdb.Error):
            database.connection.execute(query)


@pytest.mark.parametrize("name", ["o'brien", 'a"b', "x'; DROP VIEW routing; --", "$run", "a b;c"])
def test_a_name_of_a_run_is_text_and_nothing_else(tmp_path, name):
    run = write_run(tmp_path / name, n_sequences=1, length=2, n_shards=1)
    with connect(open_log(run)) as database:
        assert answer(database, "SELECT DISTINCT run FROM selections") == [{"run": name}]
        assert answer(database, "SELECT sum(rows)::INT AS n FROM shards") == [{"n": 8}]
    with duckdb.connect() as shell:
        shell.execute(shell_statements({name: open_log(run)}))
        assert shell.execute("SELECT DISTINCT run FROM routing").fetchall() == [(name,)]


def test_a_manifest_is_text_and_nothing_else(tmp_path):
    evil = "'); COPY (SELECT 1) TO 'x.csv'; --\"$x"
    run = write_run(tmp_path / "demo", n_sequences=1, length=2, n_shards=1)
    path = run / "run.json"
    manifest = json.loads(path.read_text())
    manifest["model"]["name"] = manifest["run_id"] = evil
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    with connect(open_log(run)) as database:
        assert answer(database, "SELECT model FROM runs") == [{"model": evil}]
    with duckdb.connect() as shell:
        shell.execute(shell_statements({"demo": open_log(run)}))
        assert shell.execute("SELECT model, run_id FROM runs").fetchall() == [(evil, evil)]
    manifest["model"]["layers"] = ["0; DROP VIEW routing"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(RouterLogError):
        connect(open_log(run))


def test_files_with_odd_names_are_not_of_the_run(tmp_path):
    run = write_run(tmp_path / "demo", n_sequences=1, length=2, n_shards=1)
    shard = run / "routing" / "rank00000-00000.parquet"
    for name in ("x'; DROP VIEW routing; --.parquet", "*.parquet", "rank00000-00001.parquet.part"):
        shutil.copy(shard, run / "routing" / name)
    odd = run / "replay" / "alpha'; DROP VIEW routing; --"
    odd.mkdir(parents=True)
    (odd / "notes.txt").write_text("x")
    with connect(open_log(run)) as database:
        assert answer(database, "SELECT count(*) AS n FROM routing") == [{"n": 6}]
        assert answer(database, "SELECT * FROM replays") == []


@pytest.mark.parametrize("linked", ["routing/rank00000-00000.parquet", "routing"])
def test_a_shard_that_is_a_link_out_of_the_run_is_not_read(tmp_path, linked):
    other = write_run(tmp_path / "other", n_sequences=3, length=7, n_shards=1)
    run = write_run(tmp_path / "demo", n_sequences=1, length=2, n_shards=1)
    place = run / linked
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(other / linked)
    for where in (str(run), run.as_uri()):
        with pytest.raises(RouterLogError, match="leads out of the run") as error:
            connect(open_log(where))
        assert "\n" not in str(error.value)
    with (
        pytest.raises(RouterLogError, match="outside of the run, which is not followed"),
        connect(open_log(run), unsafe=True) as database,
    ):
        answer(database, "SELECT count(*) AS n FROM routing")


def test_a_link_to_the_run_itself_is_followed(tmp_path):
    run = write_run(tmp_path / "demo", n_sequences=1, length=2, n_shards=1)
    (tmp_path / "latest").symlink_to(run, target_is_directory=True)
    with connect(open_log(tmp_path / "latest")) as database:
        assert answer(database, "SELECT count(*) AS n FROM routing") == [{"n": 6}]


def test_unsafe_opens_files_settings_and_writing(place, tmp_path, capsys):
    out = tmp_path / "x.csv"
    query = f"COPY (SELECT * FROM read_csv('{place}/secret.csv')) TO '{out}'"
    with pytest.raises(SystemExit) as stop:
        main(["sql", str(place / "demo"), query])
    assert stop.value.code == 1 and "--unsafe" in capsys.readouterr().err and not out.exists()
    with pytest.raises(SystemExit) as stop:
        main(["sql", str(place / "demo"), query, "--unsafe"])
    assert stop.value.code == 0 and SECRET in out.read_text()
    with pytest.raises(SystemExit):
        main(["sql", "--help"])
    assert "--unsafe" in capsys.readouterr().out
