"""token_text(token_id) for SQL: what an id stands for, by the tokenizer that the caller names."""

import warnings
from collections.abc import Mapping

import duckdb
import pyarrow as pa
from duckdb.func import FunctionNullHandling, PythonUDFType

from bhlog.analysis.database.failures import Failures
from bhlog.analysis.log import Log
from bhlog.analysis.vocabulary import BYTES, Vocabulary

FUNCTION = "token_text"


def vocabulary_of(runs: Mapping[str, Log], tokenizer: str | None) -> Vocabulary | None:
    """The vocabulary that a caller names, or else that of runs of which every token is a byte.

    Another tokenizer that a manifest names is not opened: the log may be a stranger's.
    """
    if tokenizer is not None:
        return Vocabulary.load(tokenizer)
    named = tokenizers_of(runs)
    return Vocabulary.load(BYTES) if named == {BYTES} else None


def tokenizers_of(runs: Mapping[str, Log]) -> set[str | None]:
    """Tokenizers that the manifests of runs name."""
    origins = [log.manifest.origin for log in runs.values()]
    return {None if origin is None else origin.tokenizer for origin in origins}


def register_token_text(
    connection: duckdb.DuckDBPyConnection,
    runs: Mapping[str, Log],
    vocabulary: Vocabulary | None,
    failures: Failures,
) -> None:
    """Make token_text known to a connection; without a vocabulary it gives NULL and warns once."""
    told = False

    def token_text(token_ids: pa.ChunkedArray) -> pa.Array:
        nonlocal told
        with failures.kept():
            if vocabulary is not None:
                return vocabulary.of(token_ids.combine_chunks())
            if not told:
                told = True
                named = ", ".join(sorted(name for name in tokenizers_of(runs) if name))
                warnings.warn(
                    "texts of tokens are not known: name a tokenizer with --tokenizer"
                    + (f" (the model was run with that of {named})" if named else ""),
                    stacklevel=2,
                )
            return pa.nulls(len(token_ids), pa.string())

    connection.create_function(
        "_token_text",
        token_text,
        ["INTEGER"],
        "VARCHAR",
        type=PythonUDFType.ARROW,
        null_handling=FunctionNullHandling.SPECIAL,
        side_effects=False,
    )
    connection.execute("CREATE MACRO token_text(token_id) AS _token_text(token_id::INTEGER)")
