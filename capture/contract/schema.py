"""Columns of a run: the one place that says what a shard holds.

`routing` has a row per (token, layer), `tokens` a row per token. The README beside this file is the
specification in words.

A run is of one version, in its manifest and in the footer of each shard, and has the columns that
exist since that version or an earlier one. The log grows by nullable columns: a row of COLUMNS
whose `since` is the next SCHEMA_VERSION. Readers give nulls where a run is older than a column. A
change that readers of an earlier version could not stand is a new MAJOR_VERSION, and only what a
newer one wrote is refused.
"""

import re
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

MAJOR_VERSION = 1
SCHEMA_VERSION = (
    2  # 2: tokens.sample_id, role and parent; the manifest says whether logits were logged
)
PHASES = ("prefill", "decode")

SHARD_NAME = re.compile(r"rank(?P<rank>\d{5})-(?P<number>\d{5,})\.parquet")

_VERSION = b"bhlog.schema_version"


@dataclass(frozen=True)
class Column:
    """A column of the log.

    Attributes:
        name: as files, readers and SQL call it.
        type: its type; a fixed-size list has a value for each of the router's experts.
        meaning: what it holds, in a few words.
        since: the schema version it exists since; above 1 it is nullable.
        nullable: whether a value may be unknown.
    """

    name: str
    type: pa.DataType
    meaning: str
    since: int = 1
    nullable: bool = False

    def __post_init__(self) -> None:
        assert self.since == 1 or self.nullable, f"{self.name}: older runs have no value for it"

    def field(self, n_experts: int) -> pa.Field:
        """As a field of a schema, for routers of n_experts experts."""
        wide = pa.types.is_fixed_size_list(self.type)
        type = logits_type(n_experts) if wide else self.type
        return pa.field(self.name, type, nullable=self.nullable)


def shard_name(rank: int, number: int) -> str:
    """File name of a shard, inside `routing/` or `tokens/`."""
    return f"rank{rank:05d}-{number:05d}.parquet"


def logits_type(n_experts: int) -> pa.DataType:
    """fixed_size_list<float32 not null>[n_experts]"""
    return pa.list_(pa.field("element", pa.float32(), nullable=False), n_experts)


def list_type(value: pa.DataType) -> pa.DataType:
    """list<value not null>"""
    return pa.list_(pa.field("element", value, nullable=False))


_PHASE = pa.dictionary(pa.int8(), pa.string())
TEXT = pa.dictionary(pa.int32(), pa.string())  # names that many rows share

_SEQUENCE = Column("sequence", pa.uint32(), "number of the text in its process, from 0")
_POSITION = Column("position", pa.uint32(), "place in the sequence, from 0, padding not counted")
_TOKEN_ID = Column(
    "token_id", pa.int32(), "id that went in; NULL where ids were withheld", nullable=True
)
_PHASES = Column(
    "phase",
    _PHASE,
    "decode: chosen, by generate or one at a time, and fed over a cache; prefill: given, as a "
    "prompt or a part of one, or read again without a cache",
)
_FORWARD = Column("forward", pa.uint32(), "number of the forward pass in its process")
_RANK = Column("rank", pa.uint16(), "process that logged the row")

COLUMNS: dict[str, tuple[Column, ...]] = {
    "routing": (
        Column("layer", pa.uint16(), "decoder layer, from 0"),
        _SEQUENCE,
        _POSITION,
        _TOKEN_ID,
        _PHASES,
        _FORWARD,
        Column("logits", logits_type(0), "router output before softmax, a value per expert"),
        Column("experts", list_type(pa.uint16()), "selected experts, by falling logit"),
        Column("weights", list_type(pa.float32()), "weight of each selected expert"),
        Column("n_selected", pa.uint16(), "experts selected: n_rejected within min_k and max_k"),
        Column(
            "n_rejected",
            pa.uint16(),
            "experts that BH (or BY) rejects, before the bounds; NULL where nothing is tested",
            nullable=True,
        ),
        _RANK,
    ),
    "tokens": (
        _RANK,
        _SEQUENCE,
        _POSITION,
        _TOKEN_ID,
        _PHASES,
        _FORWARD,
        Column(
            "nll",
            pa.float32(),
            "loss of this token given those before it, in nats; NULL where unknown",
            nullable=True,
        ),
        Column("source", TEXT, "file or data set that the text came from", nullable=True),
        Column(
            "sample_id",
            TEXT,
            "id that the caller gave the sequence; NULL where none",
            since=2,
            nullable=True,
        ),
        Column(
            "role",
            TEXT,
            "who says the token in a conversation, such as user or assistant; NULL where it is "
            "none, or not known",
            since=2,
            nullable=True,
        ),
        Column(
            "parent",
            pa.uint32(),
            "sequence that this one left and whose earlier positions are its own too, as a beam "
            "does; NULL where it is whole",
            since=2,
            nullable=True,
        ),
    ),
}


def shard_schema(
    folder: str, n_experts: int, version: int = SCHEMA_VERSION, *, logits: bool = True
) -> pa.Schema:
    """Schema of the shards in `routing` or `tokens` of a run of a schema version.

    Args:
        n_experts: experts per router.
        logits: whether the run has logits; one without lacks that column alone.
    """
    fields = [
        column.field(n_experts)
        for column in COLUMNS[folder]
        if column.since <= version and (logits or column.name != "logits")
    ]
    return pa.schema(fields, metadata={_VERSION: str(version)})


def routing_schema(n_experts: int, version: int = SCHEMA_VERSION) -> pa.Schema:
    """Schema of the routing shards of a run whose routers have n_experts experts."""
    return shard_schema("routing", n_experts, version)


def tokens_schema(version: int = SCHEMA_VERSION) -> pa.Schema:
    """Schema of the token shards."""
    return shard_schema("tokens", 0, version)


def schema_difference(found: pa.Schema, expected: pa.Schema) -> str | None:
    """First way in which found differs from expected, in words; None if the columns agree."""
    for field in expected:
        index = found.get_field_index(field.name)
        if index < 0:
            return f"no column '{field.name}'"
        if found.field(index).type != field.type:
            return f"column '{field.name}' is {found.field(index).type}, expected {field.type}"
        if found.field(index).nullable and not field.nullable:
            return f"column '{field.name}' may lack values, expected one in each row"
    return None


Rows = TypeVar("Rows", pa.RecordBatch, pa.Table)


def filled(rows: Rows, folder: str, names: list[str]) -> Rows:
    """These columns of rows of a shard, with nulls in those that are newer than their run."""
    for column in COLUMNS[folder]:
        if column.name in names and column.name not in rows.schema.names:
            rows = rows.append_column(column.field(0), pa.nulls(len(rows), column.type))
    return rows.select(names)


def lacking(rows: pa.RecordBatch | pa.Table, folder: str) -> str | None:
    """The first column of a shard's rows that lacks a value that every row has; None if none."""
    required = {column.name for column in COLUMNS[folder] if not column.nullable}
    for name, column in zip(rows.schema.names, rows.columns, strict=True):
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        if name in required and any(map(_has_nulls, chunks)):
            return str(name)
    return None


def _has_nulls(values: pa.Array) -> bool:
    """Whether a value is null, or one in its lists."""
    nested = isinstance(values, pa.ListArray | pa.FixedSizeListArray)
    return bool(values.null_count or (nested and values.values.null_count))
