"""The views of runs for DuckDB's own shell, which has neither bhlog's functions nor its limits."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from analysis.database.run_files import SCHEME, RunFiles
from analysis.database.views import RUNS, SELECTIONS, runs_table
from analysis.log import Log


def shell_command(runs: Mapping[str, Log]) -> str:
    """A command line that opens the views of these runs in `duckdb`."""
    return f"duckdb -cmd {shlex.quote(shell_statements(runs))}"


def shell_statements(runs: Mapping[str, Log]) -> str:
    """SQL that creates the views over the runs' files; p_value is NULL there.

    Run names and paths are the only values in it, and are quoted.
    """
    files = RunFiles(runs)
    statements = [
        _view("routing", [_rows(runs, files, name, "routing") for name in runs]),
        "CREATE MACRO p_value(logit, layer, expert, run) AS NULL::DOUBLE",
        SELECTIONS.strip().rstrip(";"),
        _view("tokens", [_rows(runs, files, name, "tokens") for name in runs]),
        _view("runs", [_run(row) for row in runs_table(runs).to_pylist()]),
        _view("kde", [_rows(runs, files, name, "kde.parquet") for name in runs]),
        _view("replays", [_replays(runs, files, name) for name in runs]),
    ]
    return "; ".join(" ".join(s.split()) for s in statements if s) + ";"


def _view(name: str, selects: list[str]) -> str:
    parts = [select for select in selects if select]
    return f"CREATE VIEW {name} AS " + " UNION ALL BY NAME ".join(parts) if parts else ""


def _rows(runs: Mapping[str, Log], files: RunFiles, run: str, folder: str) -> str:
    """A SELECT over the files of a run as they are now; "" if there are none."""
    paths = _paths(runs, files, run, folder)
    return (
        f"SELECT {_text(run)} AS run, * FROM read_parquet([{', '.join(map(_text, paths))}], "
        "hive_partitioning = false)"
        if paths
        else ""
    )


def _replays(runs: Mapping[str, Log], files: RunFiles, run: str) -> str:
    paths = _paths(runs, files, run, "replay")
    return (
        f"SELECT {_text(run)} AS run, parse_path(filename)[-2] AS replay, * EXCLUDE (filename) "
        f"FROM read_parquet([{', '.join(map(_text, paths))}], filename = true, "
        "hive_partitioning = false)"
        if paths
        else ""
    )


def _paths(runs: Mapping[str, Log], files: RunFiles, run: str, folder: str) -> list[str]:
    start = f"{SCHEME}://{run}/"
    given = runs[run].path
    folder_of_run = given.rstrip("/") if "://" in given else str(Path(given).expanduser().resolve())
    return [f"{folder_of_run}/{path.removeprefix(start)}" for path in files.listing(run, folder)]


def _run(row: dict[str, object]) -> str:
    columns = [
        f"{_literal(row[field.name])}::{_TYPES.get(field.type, 'VARCHAR')} AS {field.name}"
        for field in RUNS
        if field.name != "versions"
    ]
    return "SELECT " + ", ".join(columns)


_TYPES = {
    pa.int64(): "BIGINT",
    pa.uint16(): "USMALLINT",
    pa.uint32(): "UINTEGER",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.list_(pa.uint16()): "USMALLINT[]",
}


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool | int | float | list):
        return str(value)
    return _text(str(value))


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
