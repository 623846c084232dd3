"""Columns of a run: the one place that says what a shard holds.

`routing` has a row per (token, layer), `tokens` a row per token. The README's "The log" section
is the specification in words; both change only together with SCHEMA_VERSION.
"""

import re

import pyarrow as pa

SCHEMA_VERSION = 1
PHASES = ("prefill", "decode")

SHARD_NAME = re.compile(r"rank(?P<rank>\d{5})-(?P<number>\d{5,})\.parquet")

_phase = pa.dictionary(pa.int8(), pa.string())
_source = pa.dictionary(pa.int32(), pa.string())


def shard_name(rank: int, number: int) -> str:
    """File name of a shard, inside `routing/` or `tokens/`."""
    return f"rank{rank:05d}-{number:05d}.parquet"


def routing_schema(n_experts: int) -> pa.Schema:
    """Schema of the routing shards of a run whose routers have n_experts experts."""
    return pa.schema(
        [
            pa.field("layer", pa.uint16(), nullable=False),
            pa.field("sequence", pa.uint32(), nullable=False),
            pa.field("position", pa.uint32(), nullable=False),
            pa.field("token_id", pa.int32()),
            pa.field("phase", _phase, nullable=False),
            pa.field("forward", pa.uint32(), nullable=False),
            pa.field("logits", logits_type(n_experts), nullable=False),
            pa.field("experts", list_type(pa.uint16()), nullable=False),
            pa.field("weights", list_type(pa.float32()), nullable=False),
            pa.field("n_selected", pa.uint16(), nullable=False),
            pa.field("n_rejected", pa.uint16()),
            pa.field("rank", pa.uint16(), nullable=False),
        ],
        metadata={"bhlog.schema_version": str(SCHEMA_VERSION)},
    )


def tokens_schema() -> pa.Schema:
    """Schema of the token shards."""
    return pa.schema(
        [
            pa.field("rank", pa.uint16(), nullable=False),
            pa.field("sequence", pa.uint32(), nullable=False),
            pa.field("position", pa.uint32(), nullable=False),
            pa.field("token_id", pa.int32()),
            pa.field("phase", _phase, nullable=False),
            pa.field("forward", pa.uint32(), nullable=False),
            pa.field("nll", pa.float32()),
            pa.field("source", _source),
        ],
        metadata={"bhlog.schema_version": str(SCHEMA_VERSION)},
    )


def logits_type(n_experts: int) -> pa.DataType:
    """fixed_size_list<float32 not null>[n_experts]"""
    return pa.list_(pa.field("element", pa.float32(), nullable=False), n_experts)


def list_type(value: pa.DataType) -> pa.DataType:
    """list<value not null>"""
    return pa.list_(pa.field("element", value, nullable=False))


def schema_difference(found: pa.Schema, expected: pa.Schema) -> str | None:
    """First way in which found differs from expected, in words; None if the columns agree."""
    for field in expected:
        index = found.get_field_index(field.name)
        if index < 0:
            return f"no column '{field.name}'"
        if found.field(index).type != field.type:
            return f"column '{field.name}' is {found.field(index).type}, expected {field.type}"
    return None
