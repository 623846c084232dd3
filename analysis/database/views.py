"""The views of opened runs, as SQL over their files: for bhlog's connection and for a shell's."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import duckdb
import pyarrow as pa

from bhlog.analysis.database.catalog import VIEWS, meaning
from bhlog.analysis.database.run_files import RunFiles
from bhlog.analysis.database.runs_table import RUNS, runs_table
from bhlog.analysis.log import Log
from bhlog.analysis.replay.parts import SCHEMA as DECISIONS
from bhlog.capture.contract.null.file import MORE_SCHEMA, schema_of
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.schema import shard_schema

# experts, weights and logits are indexed rather than unnested, so that unused ones are not read.
_SELECTIONS = """
SELECT
    run,
    layer,
    sequence,
    position,
    token_id,
    phase,
    forward,
    k::USMALLINT AS k,
    experts[k] AS expert,
    weights[k] AS weight,
    logits[experts[k]::INTEGER + 1] AS logit,
    p_value(logits[experts[k]::INTEGER + 1], layer, experts[k], run) AS p_value,
    rank
FROM (SELECT *, unnest(range(1, len(experts) + 1)) AS k FROM routing)
"""

_SHARDS = """
CREATE VIEW shards AS
SELECT run, folder, parse_filename(path) AS shard, bytes, coalesce(rows, 0) AS rows
FROM internal.files
LEFT JOIN internal.counted USING (path)
ORDER BY run, folder, shard
"""

# Where the files of a run lie for read_parquet: given a run and one of its folders or files.
Places = Callable[[str, str], list[str]]


def create_views(
    connection: duckdb.DuckDBPyConnection,
    runs: Mapping[str, Log],
    files: RunFiles,
    kde: KdeModel | None,
) -> None:
    """Create each of VIEWS over the files of these runs.

    Args:
        kde: null model that stands in for the runs' own in the view kde.

    Raises:
        CorruptShard: the first shard of a run is unreadable or has other columns.
        CorruptKde: a run's null model is unreadable.
    """
    connection.execute("CREATE SCHEMA internal").fetchall()
    views = view_queries(runs, lambda run, folder: list(files.listing(run, folder)))
    # what was read whole and checked, which kde.parquet in a shell is not
    connection.from_arrow(_kde_table(runs, kde)).create("internal.kde")
    views["kde"] = "SELECT * FROM internal.kde"
    schemas = {
        "routing": shard_schema("routing", 0),
        "tokens": shard_schema("tokens", 0),
        "kde": MORE_SCHEMA,
        "replays": pa.schema([pa.field("replay", pa.string()), *DECISIONS]),
    }
    for view, schema in schemas.items():
        query = views[view] or _no_rows([pa.field("run", pa.string()), *schema])
        connection.execute(f"CREATE VIEW {view} AS {query}").fetchall()
    connection.execute(f"CREATE VIEW selections AS {_SELECTIONS}").fetchall()
    connection.execute(f"CREATE VIEW runs AS {views['runs'] or _no_rows(RUNS)}").fetchall()
    _create_shards(connection, runs, files)
    _comment(connection)


def view_queries(runs: Mapping[str, Log], places: Places) -> dict[str, str]:
    """A query for each view of shards and manifests, in one line; "" where there are none."""
    routing = _union(_rows(name, log, "routing", places) for name, log in runs.items())
    return {
        "routing": routing,
        "selections": " ".join(_SELECTIONS.split()) if routing else "",
        "tokens": _union(_rows(name, log, "tokens", places) for name, log in runs.items()),
        "runs": _runs(runs),
        "replays": _union(
            _read(name, places(name, "replay"), DECISIONS, "parse_path(filename)[-2] AS replay")
            for name in runs
        ),
    }


def _rows(run: str, log: Log, folder: str, places: Places) -> str:
    there = log.schema(folder).names
    return _read(run, places(run, folder), shard_schema(folder, log.n_experts), there=there)


def null_query(runs: Mapping[str, Log], places: Places) -> str:
    """A query for the view kde, as view_queries has one for each of the others.

    Raises:
        CorruptKde: a run's null model is unreadable.
    """
    return _union(_null(name, log, places) for name, log in runs.items())


def _null(run: str, log: Log, places: Places) -> str:
    there = schema_of(log.kde or {}).names
    return _read(run, places(run, "kde.parquet"), MORE_SCHEMA, there=there)


def _read(
    run: str,
    paths: list[str],
    schema: pa.Schema,
    first: str | None = None,
    *,
    there: Iterable[str] | None = None,
) -> str:
    """A SELECT of a schema's columns and no others from files of a run; "" if there are none.

    Args:
        first: a column before those of the schema, which may use `filename`.
        there: the columns that the files have, the others are NULL; None: all.
    """
    if not paths:
        return ""
    there = schema.names if there is None else list(there)
    columns = [
        field.name if field.name in there else f"NULL::{sql_type(field.type)} AS {field.name}"
        for field in schema
    ]
    named = [f"{text(run)} AS run", *([first] if first else []), *columns]
    listed = ", ".join(map(text, paths))
    options = "hive_partitioning = false" + (", filename = true" if first else "")
    return f"SELECT {', '.join(named)} FROM read_parquet([{listed}], {options})"


def _union(selects: Iterable[str]) -> str:
    return " UNION ALL ".join(select for select in selects if select)


def _no_rows(schema: Iterable[pa.Field]) -> str:
    columns = ", ".join(f"NULL::{sql_type(field.type)} AS {field.name}" for field in schema)
    return f"SELECT {columns} WHERE false"


def _runs(runs: Mapping[str, Log]) -> str:
    if not runs:
        return ""
    rows = [
        "(" + ", ".join(_literal(_value(row[column])) for column in RUNS.names) + ")"
        for row in runs_table(runs).to_pylist()
    ]
    columns = ", ".join(f"{field.name}::{sql_type(field.type)} AS {field.name}" for field in RUNS)
    names = ", ".join(RUNS.names)
    return f"SELECT {columns} FROM (VALUES {', '.join(rows)}) AS opened ({names})"


def _value(value: Any) -> Any:
    """A value of a row of RUNS; a map, which Arrow gives as pairs, as a dict."""
    pairs = isinstance(value, list) and bool(value) and isinstance(value[0], tuple)
    return dict(value) if pairs else value


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool | int | float):
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, dict):
        return f"map({_literal(list(value))}, {_literal(list(value.values()))})"
    return text(str(value))


def text(value: str) -> str:
    """A text as SQL writes it."""
    return "'" + value.replace("'", "''") + "'"


_TYPES = {
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.uint16(): "USMALLINT",
    pa.uint32(): "UINTEGER",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.bool_(): "BOOLEAN",
    pa.string(): "VARCHAR",
}


def sql_type(data_type: pa.DataType) -> str:
    """The type that DuckDB reads a column of Parquet as."""
    if pa.types.is_dictionary(data_type):
        return sql_type(data_type.value_type)
    if pa.types.is_map(data_type):
        return f"MAP({sql_type(data_type.key_type)}, {sql_type(data_type.item_type)})"
    if pa.types.is_list(data_type) or pa.types.is_fixed_size_list(data_type):
        return f"{sql_type(data_type.value_type)}[]"
    return _TYPES[data_type]


def _create_shards(
    connection: duckdb.DuckDBPyConnection, runs: Mapping[str, Log], files: RunFiles
) -> None:
    """The view `shards`: files, their bytes, and their rows, counted when asked for."""
    listed = [
        {"run": name, "folder": folder, "path": path, "bytes": size}
        for name in runs
        for folder in ("routing", "tokens")
        for path, size in files.listing(name, folder).items()
    ]
    schema = pa.schema(
        [(c, pa.string()) for c in ("run", "folder", "path")] + [("bytes", pa.int64())]
    )
    connection.from_arrow(pa.Table.from_pylist(listed, schema)).create("internal.files")
    counts = [
        f"SELECT filename AS path, count(*) AS rows FROM read_parquet([{', '.join(paths)}], "
        "hive_partitioning = false, filename = true) GROUP BY filename"
        for folder in ("routing", "tokens")
        if (paths := [text(str(row["path"])) for row in listed if row["folder"] == folder])
    ]
    none = "SELECT NULL::VARCHAR AS path, NULL::BIGINT AS rows WHERE false"
    connection.execute(f"CREATE VIEW internal.counted AS {_union(counts) or none}").fetchall()
    connection.execute(_SHARDS).fetchall()


def _kde_table(runs: Mapping[str, Log], kde: KdeModel | None) -> pa.Table:
    tables = [pa.schema([pa.field("run", pa.string()), *MORE_SCHEMA]).empty_table()]
    for name, log in runs.items():
        model = kde or log.kde
        if model is not None:
            rows = model.to_table().replace_schema_metadata(None)
            tables.append(rows.add_column(0, "run", pa.array([name] * len(rows), pa.string())))
    return pa.concat_tables(tables, promote_options="default")


def _comment(connection: duckdb.DuckDBPyConnection) -> None:
    """Write what views and columns mean into the database, where duckdb_columns() shows it."""
    described = connection.execute(
        "SELECT table_name, column_name, table_name IN (SELECT view_name FROM duckdb_views()) "
        "FROM duckdb_columns() WHERE NOT internal AND schema_name = 'main'"
    ).fetchall()
    statements = []
    for view, column, is_view in described:
        text = meaning(view, column).replace("'", "''")
        statements.append(f"COMMENT ON COLUMN {view}.{column} IS '{text}'")
        kind = "VIEW" if is_view else "TABLE"
        about = VIEWS[view].replace("'", "''")
        statements.append(f"COMMENT ON {kind} {view} IS '{about}'")
    connection.execute("; ".join(dict.fromkeys(statements))).fetchall()
