"""The views of runs for DuckDB's own shell, which has neither bhlog's functions nor its limits."""

import glob
import shlex
from collections.abc import Mapping

from bhlog.analysis.database.run_files import SCHEME, RunFiles
from bhlog.analysis.database.views import null_query, view_queries
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

    def places(run: str, folder: str) -> list[str]:
        return _paths(runs, files, run, folder)

    queries = {**view_queries(runs, places), "kde": null_query(runs, places)}
    statements = [f"CREATE VIEW {view} AS {query};" for view, query in queries.items() if query]
    macro = "CREATE MACRO p_value(logit, layer, expert, run) AS NULL::DOUBLE;"
    return " ".join([macro, *statements] if queries["selections"] else statements)


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
