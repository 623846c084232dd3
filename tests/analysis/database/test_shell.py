"""The views that `bhlog sql --shell-command` opens in plain DuckDB are those of bhlog."""

import shlex

import duckdb
import pytest

from bhlog.analysis.database.connection import connect
from bhlog.analysis.database.shell import shell_command, shell_statements
from bhlog.analysis.null.estimate import fit_kde
from bhlog.analysis.replay.decisions import write_decisions
from bhlog.analysis.run import open_log
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, with_many_shards, write_run

LAYERS = (0, 1, 2)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A native run with replays and a BH run with a null model, in folders with odd names."""
    folder = tmp_path_factory.mktemp("it's a place")
    shared = {"n_sequences": 4, "length": 5, "n_shards": 2}
    write_run(folder / "native", kde=normal_kde(LAYERS), **shared)
    write_run(folder / "b h", options=BhOptions(0.3, max_k=4), kde=normal_kde(LAYERS), **shared)
    settings = [BhOptions(alpha, max_k=8) for alpha in (0.05, 0.2)]
    write_decisions(open_log(folder / "native"), settings, folder / "native" / "replay")
    return {name: open_log(folder / name) for name in ("native", "b h")}


def rows(connection, query):
    return sorted(map(repr, connection.sql(query).fetchall()))


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM routing",
        "SELECT * EXCLUDE (p_value) FROM selections",
        "SELECT * FROM tokens",
        "SELECT * FROM runs",
        "SELECT * FROM kde",
        "SELECT * FROM replays",
        "SELECT column_name, column_type FROM (DESCRIBE routing)",
        "SELECT column_name, column_type FROM (DESCRIBE runs)",
    ],
)
def test_the_views_hold_the_same_rows(logs, query):
    with duckdb.connect() as shell, connect(list(logs.values())) as ours:
        shell.execute(shell_statements(logs)).fetchall()
        expected = rows(ours.connection, query)
        assert rows(shell, query) == expected
        assert expected


def test_the_view_of_null_models_tells_what_a_central_and_a_centred_one_are(tmp_path):
    run = write_run(tmp_path / "plain", n_sequences=2, length=16, kde=normal_kde(LAYERS))
    log = open_log(run)
    kinds = {"central": FitOptions(null_from="central"), "centred": FitOptions(centre="median")}
    logs = {"plain": log}
    for name, options in kinds.items():
        kde = fit_kde(log, options)
        logs[name] = open_log(write_run(tmp_path / name, n_sequences=2, length=16, kde=kde))
    query = "SELECT run, layer, pi0, sigma0, len(lfdr), centre FROM kde"
    expected = []
    for name, one in logs.items():
        for layer, null in one.kde.items():
            (curve,) = null.curves
            known = curve.central
            centre = None if name == "plain" else curve.centre
            numbers = (known.pi0, known.sigma0, len(curve.lfdr)) if known else (None,) * 3
            expected.append(str((name, layer, *numbers, centre)))
    with duckdb.connect() as shell, connect([*logs.values()]) as ours:
        shell.execute(shell_statements(logs)).fetchall()
        assert rows(shell, query) == rows(ours.connection, query) == sorted(expected)


def test_p_values_need_bhlog(logs):
    with duckdb.connect() as shell:
        shell.execute(shell_statements(logs)).fetchall()
        assert rows(shell, "SELECT DISTINCT p_value FROM selections") == ["(None,)"]


def test_the_command_line_is_one_line_that_a_shell_splits_back(logs):
    line = shell_command(logs)
    assert "\n" not in line
    assert shlex.split(line) == ["duckdb", "-cmd", shell_statements(logs)]


def test_a_thousand_shards_fit_a_command_line(tmp_path):
    run = with_many_shards(write_run(tmp_path / "demo", n_sequences=1, length=2, n_shards=1))
    for folder in ("routing", "tokens"):
        (run / folder / "rank00000-01000.parquet.part").write_text("not sealed")
    statements = shell_statements({"demo": open_log(run)})
    assert len(statements) < 10_000
    with duckdb.connect() as shell:
        shell.execute(statements).fetchall()
        assert shell.sql("SELECT count(*) FROM tokens").fetchall() == [(2000,)]


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?", "run{1}", "it's"])
def test_a_name_that_is_a_pattern_is_that_folder_alone(tmp_path, name):
    write_run(tmp_path / name, n_sequences=1, length=2, n_shards=1, kde=normal_kde(LAYERS))
    write_run(tmp_path / "run1", n_sequences=1, length=3, n_shards=1)
    with duckdb.connect() as shell:
        shell.execute(shell_statements({"a": open_log(tmp_path / name)})).fetchall()
        assert shell.sql("SELECT count(*) FROM tokens").fetchall() == [(2,)]
        assert shell.sql("SELECT count(*) FROM kde").fetchall() == [(3,)]


@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_views_without_files_are_left_out(tmp_path):
    run = write_run(tmp_path / "demo", n_sequences=1, length=2, n_shards=1)
    for shard in run.glob("routing/*"):
        shard.unlink()
    with duckdb.connect() as shell:
        shell.execute(shell_statements({"demo": open_log(run)})).fetchall()
        assert {name for (name,) in shell.sql("SHOW TABLES").fetchall()} == {"tokens", "runs"}
