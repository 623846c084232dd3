"""The views of runs for DuckDB's own shell, which has neither bhlog's functions nor its limits."""

import glob
import shlex
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from bhlog.analysis.database.run_files import SCHEME, RunFiles
from bhlog.analysis.database.views import RUNS, SELECTIONS, runs_table
from bhlog.analysis.log import Log


def shell_command(runs: Mapping[str, Log]) -> str:
    """A command line that opens the views of these runs in `duckdb`."""
    return f"duckdb -cmd {shlex.quote(shell_statements(runs))}"


def shell_statements(runs: Mapping[str, Log]) -> str:
    """SQL that creates the views over the runs' files, those that have files.

    p_value is NULL there, and `shards` is left out. Names, paths and facts of
    manifests are the only values in it, and are quoted. An object store is reached as the shell is
    set up to reach it.
    """
    files = RunFiles(runs)
    routing = _view("routing", [_rows(runs, files, name, "routing") for name in runs])
    statements = [
        routing,
        "CREATE MACRO p_value(logit, layer, expert, run) AS NULL::DOUBLE" if routing else "",
        SELECTIONS.strip().rstrip(";") if routing else "",
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
    """A SELECT over the files of a run; "" if there are none."""
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
    """What read_parquet takes: a pattern for the shards of a folder, as commands have a length."""
    log = runs[run]
    scheme = "" if log.is_local else log.path.partition("://")[0] + "://"
    start = f"{SCHEME}://{run}/"
    patterns = []
    for path in files.listing(run, folder):
        inside, _, name = path.removeprefix(start).rpartition("/")
        in_run = glob.escape(f"{log.location}/{inside}".rstrip("/"))
        patterns.append(f"{scheme}{in_run}/{_SHARDS if inside else name}")
    return list(dict.fromkeys(patterns))


_SHARDS = "rank[0-9][0-9][0-9][0-9][0-9]-[0-9]*.parquet"


def _run(row: dict[str, Any]) -> str:
    row = {**row, "versions": dict(row["versions"])}
    columns = [
        f"{_literal(row[field.name])}::{_TYPES.get(field.type, 'VARCHAR')} AS {field.name}"
        for field in RUNS
    ]
    return "SELECT " + ", ".join(columns)


_TYPES = {
    pa.int64(): "BIGINT",
    pa.uint16(): "USMALLINT",
    pa.uint32(): "UINTEGER",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.list_(pa.uint16()): "USMALLINT[]",
    pa.map_(pa.string(), pa.string()): "MAP(VARCHAR, VARCHAR)",
}


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, dict):
        return f"map({_literal(list(value))}, {_literal(list(value.values()))})"
    return _text(str(value))


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
