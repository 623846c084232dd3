"""A run in DuckDB: views over its files, on a connection that can read them and nothing else.

DuckDB reaches the files through `RunFiles`, a file system that knows the files of the opened runs,
reads them with pyarrow (folders and object stores alike) and cannot write. Everything else is off:
external access, extensions, other settings.
"""

import atexit
import re
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any, Self

import duckdb
import pyarrow as pa

from bhlog.analysis.database.catalog import VIEWS
from bhlog.analysis.database.functions import FUNCTIONS, register_functions
from bhlog.analysis.database.own_tables import as_table
from bhlog.analysis.database.run_files import SCHEME, RunFiles
from bhlog.analysis.database.run_nulls import Nulls
from bhlog.analysis.database.spill import SpillFolder
from bhlog.analysis.database.statement import reading_statement
from bhlog.analysis.database.token_texts import register_token_text, vocabulary_of
from bhlog.analysis.database.views import create_views
from bhlog.analysis.database.waiting import wait_for
from bhlog.analysis.log import Log
from bhlog.capture.contract.errors import CorruptShard, InvalidOption, RouterLogError
from bhlog.capture.contract.null.model import KdeModel

SPILL_LIMIT = "16GB"  # of data that do not fit into memory, unless told otherwise

# What DuckDB raises for files rather than for queries, and Arrow for streams of its results.
_UNREADABLE = (
    duckdb.IOException,
    duckdb.SerializationException,
    duckdb.InternalException,
    duckdb.FatalException,
    pa.ArrowException,
    OSError,
)

# Types that Arrow or polars cannot carry.
_ONLY_DUCKDB = re.compile(r"INTERVAL|BIT|BLOB|UNION|TIME WITH TIME ZONE|BIGNUM|VARIANT")

# DuckDB complains about connections that are open when Python ends.
_open: "weakref.WeakSet[Database]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for database in list(_open):
        database.close()


class Database:
    """Runs opened in DuckDB.

    Attributes:
        runs: the logs by the name that the column `run` gives them.
        connection: the DuckDB connection; `sql` keeps it to reading.
        timeout: seconds after which `batches` stops a query; None: never.
    """

    def __init__(
        self,
        runs: Mapping[str, Log],
        connection: duckdb.DuckDBPyConnection,
        files: RunFiles,
        *,
        timeout: float | None,
        unsafe: bool,
    ) -> None:
        self.runs = dict(runs)
        self.connection = connection
        self.timeout = timeout
        self._failures = files.failures
        self._unsafe = unsafe

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what is still to be read of relations keeps its own."""
        self.connection.close()

    def sql(
        self, query: str, parameters: Mapping[str, Any] | None = None
    ) -> duckdb.DuckDBPyRelation:
        """The result of a query, read as it is asked for: .pl(), .df(), .to_arrow_table(), ...

        Args:
            query: one statement in DuckDB's SQL.
            parameters: values of $name in the query; a polars, pandas or Arrow table among them is
                a table of that name.

        Raises:
            InvalidOption: the query cannot be read, names something that is not there, or does
                something other than reading.
            CorruptShard: a file that it needs is cut short or unreadable.
        """
        return self._ask(query, parameters)[1]

    def _ask(
        self, query: str, parameters: Mapping[str, Any] | None
    ) -> tuple[duckdb.DuckDBPyConnection, duckdb.DuckDBPyRelation]:
        """A query's result, and the connection that it is read on.

        It is one of its own: in a transaction that can only read, and with the caller's tables.
        """
        self._failures.take()  # of a relation that was read elsewhere
        given = dict(parameters or {})
        tables = {name: as_table(value) for name, value in given.items()}
        tables = {name: table for name, table in tables.items() if table is not None}
        values = {name: given[name] for name in given if name not in tables} or None
        with self.errors():
            if self._unsafe:
                for name, table in tables.items():
                    self.connection.register(name, table)
                relation = self.connection.sql(query, params=values)
                if relation is None:  # a statement without rows, such as CREATE VIEW
                    relation = self.connection.sql("SELECT 'done' AS result WHERE false")
                return self.connection, relation
            statement = reading_statement(query)
            connection = self.connection.cursor()
            for name, table in tables.items():
                if name in VIEWS:
                    raise InvalidOption(
                        f"'{name}' is a view of the run; give the table another name"
                    )
                connection.register(name, table)
            connection.execute("BEGIN TRANSACTION READ ONLY").fetchall()
            return connection, connection.sql(statement, params=values)

    def batches(
        self, query: str, parameters: Mapping[str, Any] | None = None
    ) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """(schema, record batches) of a query's result, in flat memory; errors as sql has them.

        Columns that share a name get a number, as in layer, layer_1; types that only DuckDB has,
        such as INTERVAL, become text. Ctrl-C stops the query.
        """
        deadline = None if self.timeout is None else time.monotonic() + self.timeout
        connection, relation = self._ask(query, parameters)

        def started() -> pa.RecordBatchReader:
            return _carried(relation).to_arrow_reader(1 << 14)

        with self.errors():
            reader = wait_for(started, connection, deadline=deadline)

        def following() -> pa.RecordBatch | None:
            return next(reader, None)

        def read() -> Iterator[pa.RecordBatch]:
            while True:
                with self.errors():
                    batch = wait_for(following, connection, deadline=deadline)
                if batch is None:
                    return
                yield batch

        return reader.schema, read()

    def rows(self, run: str) -> int:
        """Routing rows of a run, counted in the footers of its shards."""
        with self.errors():
            ((rows,),) = self.connection.execute(
                "SELECT count(*) FROM routing WHERE run = $run", {"run": run}
            ).fetchall()
        return int(rows)

    def columns(self) -> dict[str, dict[str, str]]:
        """Type of each column of each view."""
        described = self.connection.execute(
            "SELECT table_name, column_name, data_type FROM duckdb_columns() "
            "WHERE NOT internal AND schema_name = 'main' ORDER BY table_oid, column_index"
        ).fetchall()
        views: dict[str, dict[str, str]] = {name: {} for name in VIEWS}
        for view, column, data_type in described:
            views.setdefault(view, {})[column] = data_type
        return views

    def describe(self, view: str) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """Column, type and meaning of each column of a view, as batches gives them."""
        return self.batches(
            "SELECT column_name AS column, data_type AS type, comment AS meaning "
            "FROM duckdb_columns() WHERE schema_name = 'main' AND table_name = $view "
            "ORDER BY column_index",
            {"view": view},
        )

    def errors(self) -> "_Errors":
        """A context that turns DuckDB's errors into one-line errors of bhlog."""
        return _Errors(self)

    def translated(self, error: Exception) -> RouterLogError:
        """The one-line error that says what DuckDB's error means here."""
        failure = self._failures.take()
        if failure is not None:
            return failure
        text = str(error)
        where = re.search(re.escape(SCHEME) + r"://(.+?)/(\w+/[^\"'\s]+?\.parquet)", text)
        if where and where[1] in self.runs:
            return CorruptShard(
                f"{self.runs[where[1]].path}/{where[2]}: cannot be read ({self._plain(text)}); "
                "restore the file, or move it away to read the rest"
            )
        if isinstance(error, _UNREADABLE):
            runs = ", ".join(log.path for log in self.runs.values())
            return CorruptShard(
                f"{runs}: a file cannot be read ({self._plain(text)}); bhlog verify says which"
            )
        return InvalidOption(f"SQL: {self._plain(text)}")

    def _plain(self, text: str) -> str:
        """DuckDB's message in one line, with the nearest right name for a wrong one."""
        lines = [line.strip() for line in text.split("LINE 1:")[0].splitlines() if line.strip()]
        column = re.search(r'Referenced column "([^"]+)" (?:was )?not found', text)
        table = re.search(r"Table with name (\S+) does not exist", text)
        function = re.search(r"Function with name (\S+) does not exist", text)
        if column:
            known = {name for columns in self.columns().values() for name in columns}
            return _no_such("column", column[1], known)
        if table:
            return _no_such("table", table[1], self.columns())
        if function:
            near = re.search(r'Did you mean "([^"]+)"', text)
            return _no_such("function", function[1], FUNCTIONS, near[1] if near else None)
        return re.sub(r"^([A-Z]\w* )+Error: ", "", " ".join(lines))


@dataclass(frozen=True, eq=False)
class _Errors:
    database: Database

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RouterLogError):
            return
        if isinstance(error, (duckdb.Error, pa.ArrowException, OSError)):  # OSError: from a stream
            raise self.database.translated(error) from error


def connect(
    logs: Log | Sequence[Log],
    *,
    kde: KdeModel | None = None,
    tokenizer: str | None = None,
    memory_limit: str | None = None,
    threads: int | None = None,
    temp_dir: str | Path | None = None,
    temp_limit: str = SPILL_LIMIT,
    timeout: float | None = None,
    unsafe: bool = False,
) -> Database:
    """Open runs in DuckDB, with a view for each of VIEWS and the functions beside this module.

    Sealed shards are listed now and read when a query needs them: of a shard only the columns and
    row groups that it needs.

    Args:
        kde: null model of p-values and bh functions; None means each run's own.
        tokenizer: whose texts token_text gives; see analysis.vocabulary. None: of runs whose tokens
            are bytes, those.
        memory_limit: such as "4GB"; beyond it DuckDB spills to temp_dir. None: 80 % of memory.
        threads: None means one a core.
        temp_dir: folder for spilled data; a folder inside it is made, and removed in the end.
        temp_limit: most data that are spilled at a time.
        timeout: seconds after which `batches` stops a query; None: never.
        unsafe: leave external access, writing and settings to the user.

    Raises:
        InvalidOption: a run is given twice, a file of it is a link that leads out of its folder, or
            an option is refused.
        CorruptShard: a run's first shard is unreadable.
    """
    logs = [logs] if isinstance(logs, Log) else list(logs)
    runs = dict(zip(_names(logs), logs, strict=True))
    vocabulary = vocabulary_of(runs, tokenizer)
    files = RunFiles(runs)
    outside = None if unsafe else files.outside()
    if outside:
        raise InvalidOption(
            f"{outside[0]}: a link that leads out of the run, to {outside[1]}; copy the file in "
            "its place, or read it all the same with --unsafe"
        )
    connection = duckdb.connect()
    database = Database(runs, connection, files, timeout=timeout, unsafe=unsafe)
    connection.register_filesystem(files)
    spill = SpillFolder(temp_dir)
    weakref.finalize(files, spill.remove)  # DuckDB keeps files as long as anything reads
    _open.add(database)
    with database.errors():
        connection.execute("SET temp_directory = $folder", {"folder": str(spill.path)})
        connection.execute("SET max_temp_directory_size = $limit", {"limit": temp_limit})
        connection.execute("SET parquet_metadata_cache = true")
        if memory_limit is not None:
            connection.execute("SET memory_limit = $limit", {"limit": memory_limit})
        if threads is not None:
            connection.execute("SET threads = $threads", {"threads": threads})
        register_functions(connection, Nulls(runs, kde), files.failures)
        register_token_text(connection, runs, vocabulary, files.failures)
        create_views(connection, runs, files, kde)
        if not unsafe:
            connection.execute("SET allow_community_extensions = false")
            connection.execute("SET autoinstall_known_extensions = false")
            connection.execute("SET autoload_known_extensions = false")
            connection.execute("SET python_enable_replacements = false")
            connection.execute("SET allowed_directories = [$scheme]", {"scheme": f"{SCHEME}://"})
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
    return database


def _carried(relation: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
    """The relation as Arrow can carry it: with distinct names, and text for DuckDB's own types."""
    names: list[str] = []
    for name in relation.columns:
        twins = (f"{name}_{n}" for n in count(1))
        names.append(name if name not in names else next(t for t in twins if t not in names))
    foreign = [bool(_ONLY_DUCKDB.search(str(data_type))) for data_type in relation.types]
    if names == relation.columns and not any(foreign):
        return relation
    columns = []
    for at, (name, as_text) in enumerate(zip(names, foreign, strict=True), start=1):
        column = duckdb.SQLExpression(f"#{at}")
        columns.append((column.cast("VARCHAR") if as_text else column).alias(name))
    return relation.select(*columns)


def _no_such(kind: str, name: str, known: Iterable[str], near: str | None = None) -> str:
    known = sorted(known)
    close = get_close_matches(name.lower(), known, n=1)
    nearest = close[0] if close else near
    hint = f"did you mean '{nearest}'?" if nearest else f"{kind}s: {', '.join(known)}"
    return f"no {kind} '{name}'; {hint}"


def _names(logs: Sequence[Log]) -> list[str]:
    """A name for each run: the last part of its path, and as many before it as tell it apart."""
    paths = [log.path for log in logs]
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise InvalidOption(f"{twice[0]}: given twice; name each run once")
    parts = [log.location.parts for log in logs]
    names = []
    for own in parts:
        length = 1
        while sum(other[-length:] == own[-length:] for other in parts) > 1 and length < len(own):
            length += 1
        names.append("/".join(own[-length:]).replace("//", "/"))
    return names
