import pyarrow as pa
import pytest

from bhlog.capture.contract.schema import (
    COLUMNS,
    PHASES,
    SCHEMA_VERSION,
    SHARD_NAME,
    Column,
    logits_type,
    routing_schema,
    schema_difference,
    shard_name,
    shard_schema,
    tokens_schema,
)


def test_version_1_has_these_columns():
    assert PHASES == ("prefill", "decode")
    assert {f.name: (str(f.type), f.nullable) for f in routing_schema(64, version=1)} == {
        "layer": ("uint16", False),
        "sequence": ("uint32", False),
        "position": ("uint32", False),
        "token_id": ("int32", True),
        "phase": ("dictionary<values=string, indices=int8, ordered=0>", False),
        "forward": ("uint32", False),
        "logits": ("fixed_size_list<element: float not null>[64]", False),
        "experts": ("list<element: uint16 not null>", False),
        "weights": ("list<element: float not null>", False),
        "n_selected": ("uint16", False),
        "n_rejected": ("uint16", True),
        "rank": ("uint16", False),
    }
    assert {f.name: (str(f.type), f.nullable) for f in tokens_schema(version=1)} == {
        "rank": ("uint16", False),
        "sequence": ("uint32", False),
        "position": ("uint32", False),
        "token_id": ("int32", True),
        "phase": ("dictionary<values=string, indices=int8, ordered=0>", False),
        "forward": ("uint32", False),
        "nll": ("float", True),
        "source": ("dictionary<values=string, indices=int32, ordered=0>", True),
    }


def test_later_versions_add_nullable_columns_and_change_none():
    for folder, columns in COLUMNS.items():
        later = shard_schema(folder, 8)
        assert later.names == [column.name for column in columns]
        for version in range(1, SCHEMA_VERSION + 1):
            now = shard_schema(folder, 8, version)
            assert set(now) <= set(later)
            assert all(column.nullable for column in columns if column.name not in now.names)
    with pytest.raises(AssertionError):
        Column("new", pa.int8(), "not there in older runs", since=2)


def test_a_run_without_logits_lacks_that_column_alone():
    names = set(shard_schema("routing", 8, logits=False).names)
    assert set(routing_schema(8).names) - names == {"logits"}


@pytest.mark.parametrize("schema", [routing_schema, lambda _, version: tokens_schema(version)])
@pytest.mark.parametrize("version", [1, SCHEMA_VERSION])
def test_a_schema_names_its_version(schema, version):
    assert schema(8, version).metadata[b"bhlog.schema_version"] == str(version).encode()


@pytest.mark.parametrize("rank, number", [(0, 0), (7, 123), (65535, 99999), (1, 1234567)])
def test_a_shard_name_tells_rank_and_number(rank, number):
    found = SHARD_NAME.fullmatch(shard_name(rank, number))
    assert found is not None
    assert (int(found["rank"]), int(found["number"])) == (rank, number)


@pytest.mark.parametrize(
    "name",
    ["rank0-0.parquet", "rank00000-00000.parquet.part", "part-0.parquet", "rank00000-0000.parquet"],
)
def test_other_names_are_not_shards(name):
    assert SHARD_NAME.fullmatch(name) is None


def test_a_difference_is_told_in_words():
    expected = routing_schema(8)
    assert schema_difference(expected, expected) is None
    assert schema_difference(expected.append(pa.field("more", pa.int8())), expected) is None
    without = expected.remove(expected.get_field_index("experts"))
    assert schema_difference(without, expected) == "no column 'experts'"
    at = expected.get_field_index("logits")
    other = expected.set(at, pa.field("logits", logits_type(16)))
    assert schema_difference(other, expected) == (
        "column 'logits' is fixed_size_list<element: float not null>[16], "
        "expected fixed_size_list<element: float not null>[8]"
    )
