"""What a query may be: one statement that reads. DuckDB's own parser decides, no pattern does."""

import re
from collections.abc import Iterator
from itertools import pairwise

import duckdb

from bhlog.capture.contract.errors import InvalidOption

# What names the folder that data spill to, and functions that run text which nobody has looked at.
_SETTINGS = frozenset({"temp_directory", "allowed_directories", "allowed_paths", "pg_settings"})
_FUNCTIONS = frozenset(
    {
        "current_setting",
        "duckdb_settings",
        "duckdb_temporary_files",
        "query",
        "query_table",
        "json_execute_serialized_sql",
    }
)
_OPTIONS = re.compile(r"\(\s*(?:FORMAT|ANALYZE)\b[\w\s,']*\)", re.IGNORECASE)


def reading_statement(query: str) -> duckdb.Statement:
    """The one statement of a query, if its kind is one that reads.

    A kind alone does not make it harmless (`WITH ... DELETE` is a SELECT): it must run in a
    read-only transaction. EXPLAIN and PIVOT, inside which another statement can stand, are put
    together again from a part that was parsed on its own.

    Raises:
        InvalidOption: there is none or more than one, or it does something other than reading.
        duckdb.Error: it cannot be parsed.
    """
    statement = _only(query)
    kind = _kind(statement)
    if kind == "EXPLAIN":
        statement = _only(_explained(query))
    elif kind == "MULTI":  # a PIVOT that looks for its values first, or what such a PIVOT feeds
        statement = _inside(query, "SELECT * FROM ({}\n)", kind)
    elif kind != "SELECT":
        raise _refused(kind)
    names = list(_names(statement.query))
    for name, after in zip(names, [*names[1:], ""], strict=True):
        if name in _SETTINGS or (name in _FUNCTIONS and after == "("):
            raise _refused(name)
    return statement


def _only(query: str) -> duckdb.Statement:
    statements = duckdb.extract_statements(query)
    if not statements:
        raise InvalidOption("SQL: the query is empty")
    if len(statements) > 1:
        raise InvalidOption(
            f"SQL: {len(statements)} statements; expected one, ask them one after the other"
        )
    return statements[0]


def _kind(statement: duckdb.Statement) -> str:
    try:
        return str(statement.type.name)
    except ValueError:  # DuckDB's binding does not know all of DuckDB's kinds
        return statement.query.split(maxsplit=1)[0].upper()


def _inside(query: str, form: str, kind: str) -> duckdb.Statement:
    """The statement that `form` makes of a query, where only a query can stand."""
    try:
        return _only(form.format(query.rstrip().rstrip(";")))
    except duckdb.Error:
        raise _refused(f"{kind} that is no query") from None


def _explained(query: str) -> str:
    """EXPLAIN of a SELECT, put together from what stands in the query."""
    tokens = list(_tokens(query))
    analyze = len(tokens) > 1 and tokens[1][1].upper() == "ANALYZE"
    rest = query[tokens[2 if analyze else 1][0] :] if len(tokens) > 1 + analyze else ""
    options = _OPTIONS.match(rest)
    if options:
        rest = rest[options.end() :]
    kind = _kind(_only(rest))
    if kind != "SELECT":
        raise _refused(f"EXPLAIN of {kind}")
    return f"EXPLAIN {'ANALYZE ' if analyze else ''}{options[0] if options else ''} {rest}"


def _tokens(query: str) -> Iterator[tuple[int, str]]:
    """Place and text of each token that is no comment."""
    data = query.encode()
    found = [*duckdb.tokenize(query), (len(data), None)]
    for (start, kind), (end, _) in pairwise(found):
        if kind is not duckdb.token_type.comment:
            yield len(data[:start].decode()), data[start:end].decode().strip()


def _names(query: str) -> Iterator[str]:
    for _, text in _tokens(query):
        yield text.strip('"').replace('""', '"').lower()


def _refused(what: str) -> InvalidOption:
    return InvalidOption(
        f"SQL: {what} is refused, the connection only reads the runs; to write a result use "
        "--out FILE, for anything else --unsafe"
    )
