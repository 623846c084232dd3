"""The views of opened runs: what each holds and which files it reads."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.analysis.database.catalog import VIEWS, meaning
from bhlog.analysis.database.run_files import SCHEME, RunFiles
from bhlog.analysis.log import Log
from bhlog.analysis.replay.decisions import SCHEMA as DECISIONS
from bhlog.capture.contract.errors import CorruptManifest, CorruptShard
from bhlog.capture.contract.manifest import Totals
from bhlog.capture.contract.null.file import KDE_SCHEMA
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.schema import routing_schema, schema_difference, tokens_schema

# experts, weights and logits are indexed rather than unnested, so that unused ones are not read.
SELECTIONS = """
CREATE VIEW selections AS
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
FROM (SELECT *, unnest(range(1, len(experts) + 1)) AS k FROM routing);
"""

_SHARDS = """
CREATE VIEW shards AS
SELECT run, folder, parse_filename(path) AS shard, bytes, coalesce(rows, 0) AS rows
FROM internal.files
LEFT JOIN (
    SELECT path, count(*) AS rows
    FROM (SELECT path FROM internal.routing UNION ALL SELECT path FROM internal.tokens)
    GROUP BY path
) AS counted USING (path)
ORDER BY run, folder, shard;
"""

_REPLAYS = pa.schema([pa.field("run", pa.string()), pa.field("replay", pa.string()), *DECISIONS])


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
    """
    connection.execute("CREATE SCHEMA internal").fetchall()
    _create_rows(connection, runs, files, "routing", routing_schema(0))
    _create_rows(connection, runs, files, "tokens", tokens_schema())
    connection.execute(SELECTIONS).fetchall()
    _create_table(connection, "runs", runs_table(runs))
    _create_kde(connection, runs, kde)
    _create_replays(connection, files, runs)
    _create_shards(connection, runs, files)
    _comment(connection)


def runs_table(runs: Mapping[str, Log]) -> pa.Table:
    """A row per run: its manifest, flattened.

    Raises:
        CorruptManifest: a field is not of its kind.
    """
    tables = [RUNS.empty_table()]
    for name, log in runs.items():
        try:
            tables.append(pa.Table.from_pylist([_run_row(name, log)], RUNS))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise CorruptManifest(
                f"{log.path}: a field of its manifest is not of its kind ({reason})"
            ) from error
    return pa.concat_tables(tables)


RUNS = pa.schema(
    [
        ("run", pa.string()),
        ("path", pa.string()),
        ("run_id", pa.string()),
        ("created", pa.string()),
        ("closed", pa.string()),
        ("model", pa.string()),
        ("class_name", pa.string()),
        ("revision", pa.string()),
        ("dtype", pa.string()),
        ("layers", pa.list_(pa.uint16())),
        ("n_experts", pa.uint16()),
        ("top_k", pa.uint16()),
        ("norm_topk_prob", pa.bool_()),
        ("scoring", pa.string()),
        ("routing", pa.string()),
        ("alpha", pa.float64()),
        ("min_k", pa.uint16()),
        ("max_k", pa.uint16()),
        ("temperature", pa.float64()),
        ("renormalize", pa.string()),
        ("p_values", pa.string()),
        ("kde_sha256", pa.string()),
        ("sample_every", pa.uint32()),
        ("token_ids", pa.bool_()),
        *((name, pa.int64()) for name in asdict(Totals())),
        ("error", pa.string()),
        ("versions", pa.map_(pa.string(), pa.string())),
    ]
)


def _run_row(name: str, log: Log) -> dict[str, Any]:
    manifest = log.manifest
    options = manifest.routing.options
    chosen = asdict(options) if options else {}
    if options:
        chosen["renormalize"] = str(options.renormalize).lower()
    row = {
        **asdict(manifest),
        **asdict(manifest.model),
        **asdict(manifest.totals),
        **chosen,
        "run": name,
        "path": log.path,
        "model": manifest.model.name,
        "routing": manifest.routing.kind,
        "kde_sha256": manifest.routing.kde_sha256,
        "versions": list(manifest.versions.items()),
    }
    return {column: row.get(column) for column in RUNS.names}


def _create_rows(
    connection: duckdb.DuckDBPyConnection,
    runs: Mapping[str, Log],
    files: RunFiles,
    folder: str,
    schema: pa.Schema,
) -> None:
    """The view `routing` or `tokens`: the shards of every run, with the run's name before them."""
    relations = []
    for name, log in runs.items():
        paths = list(files.listing(name, folder))
        if paths:
            log.open_shard(folder, paths[0].rpartition("/")[2])
            there = _read(connection, paths, log.schema(folder).names, run=name)
            relations.append(_with_nulls(connection, there, schema))
    if not relations:
        relations = [_empty(connection, pa.schema([pa.field("run", pa.string()), *schema]))]
    _union(relations).create_view(folder)


def _with_nulls(
    connection: duckdb.DuckDBPyConnection, rows: duckdb.DuckDBPyRelation, schema: pa.Schema
) -> duckdb.DuckDBPyRelation:
    """The run's name and the schema's columns, NULL in those that the run has not."""
    missing = [name for name in schema.names if name not in rows.columns]
    if not missing:
        return rows
    empty = _empty(connection, schema)
    types = dict(zip(empty.columns, empty.types, strict=True))
    return rows.select(
        duckdb.ColumnExpression("run"),
        *(
            duckdb.ConstantExpression(None).cast(types[name]).alias(name)
            if name in missing
            else duckdb.ColumnExpression(name)
            for name in schema.names
        ),
    )


def _create_table(connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    connection.from_arrow(table).create(name)


def _create_kde(
    connection: duckdb.DuckDBPyConnection, runs: Mapping[str, Log], kde: KdeModel | None
) -> None:
    tables = [pa.schema([pa.field("run", pa.string()), *KDE_SCHEMA]).empty_table()]
    for name, log in runs.items():
        model = kde or log.kde
        if model is not None:
            rows = model.to_table()
            tables.append(rows.add_column(0, "run", pa.array([name] * len(rows), pa.string())))
    _create_table(connection, "kde", pa.concat_tables(tables))


def _create_replays(
    connection: duckdb.DuckDBPyConnection, files: RunFiles, runs: Mapping[str, Log]
) -> None:
    relations = []
    for name, log in runs.items():
        of_replay: dict[str, list[str]] = {}
        for path in files.listing(name, "replay"):
            of_replay.setdefault(path.split("/")[-2], []).append(path)
        for replay, paths in of_replay.items():
            inside = paths[0].removeprefix(f"{SCHEME}://{name}/")
            _check_decisions(log, inside)
            relations.append(_read(connection, paths, DECISIONS.names, run=name, replay=replay))
    if not relations:
        relations = [_empty(connection, _REPLAYS)]
    _union(relations).create_view("replays")


def _check_decisions(log: Log, path: str) -> None:
    try:
        found = pq.read_schema(log.open_file(path))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CorruptShard(f"{log.path}/{path}: cannot be read ({reason}); move it away") from error
    difference = schema_difference(found, DECISIONS)
    if difference:
        raise CorruptShard(f"{log.path}/{path}: {difference}; bhlog replay --out writes others")


def _create_shards(
    connection: duckdb.DuckDBPyConnection, runs: Mapping[str, Log], files: RunFiles
) -> None:
    """The view `shards`: files, their bytes, and their rows, counted when asked for."""
    listed: list[dict[str, Any]] = [
        {"run": name, "folder": folder, "path": path, "bytes": size}
        for name in runs
        for folder in ("routing", "tokens")
        for path, size in files.listing(name, folder).items()
    ]
    schema = pa.schema(
        [(c, pa.string()) for c in ("run", "folder", "path")] + [("bytes", pa.int64())]
    )
    _create_table(connection, "internal.files", pa.Table.from_pylist(listed, schema))
    for folder in ("routing", "tokens"):
        paths = [row["path"] for row in listed if row["folder"] == folder]
        relation = (
            _read(connection, paths, [], path=duckdb.ColumnExpression("filename"))
            if paths
            else _empty(connection, pa.schema([("path", pa.string())]))
        )
        connection.execute("SET schema = 'internal'").fetchall()  # create_view takes a bare name
        relation.create_view(folder)
        connection.execute("SET schema = 'main'").fetchall()
    connection.execute(_SHARDS).fetchall()


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


def _read(
    connection: duckdb.DuckDBPyConnection,
    paths: list[str],
    names: list[str],
    **columns: str | duckdb.Expression,
) -> duckdb.DuckDBPyRelation:
    """These columns of Parquet files and no others, after columns that are the same in all rows."""
    first = [
        (duckdb.ConstantExpression(value) if isinstance(value, str) else value).alias(name)
        for name, value in columns.items()
    ]
    relation = connection.read_parquet(paths, hive_partitioning=False)
    return relation.select(*first, *map(duckdb.ColumnExpression, names))


def _empty(connection: duckdb.DuckDBPyConnection, schema: pa.Schema) -> duckdb.DuckDBPyRelation:
    """No rows of these columns, of the types that DuckDB reads from Parquet."""
    name = f"internal.no_{len(connection.execute('SHOW ALL TABLES').fetchall())}"
    fields = [
        pa.field(f.name, pa.list_(f.type.value_type))
        if pa.types.is_fixed_size_list(f.type)
        else pa.field(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type)
        for f in schema
    ]
    _create_table(connection, name, pa.schema(fields).empty_table())
    return connection.table(name)


def _union(relations: list[duckdb.DuckDBPyRelation]) -> duckdb.DuckDBPyRelation:
    whole, *others = relations
    for other in others:
        whole = whole.union(other)
    return whole
