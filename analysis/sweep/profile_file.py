"""The profile file: a Parquet row per layer, which says what was counted and under which model.

| column | what |
|---|---|
| layer, n_experts | the layer, and E |
| rows | rows counted: those with a finite logit |
| alphas | the grid, J alphas; the same in every row |
| counts | E * (J + 1) rows by rank and critical alpha, rank by rank; see Profile |
| kept | beside each count, router probability in units of 2^-20; null if not counted |
| noise | like counts, of a sample with each expert's logits shuffled; null in older files |
| source | ids of the runs |
| kde_sha256 | of the null model |
| where | the condition that the rows match; null for all rows |

Beside the version, the metadata holds the bounds of the runs as JSON: {"min_k": 2, "max_k": null},
where null is 1 or all experts, or null alone if they differ between the runs. An older file lacks
them: 1 and all experts. It also holds `bhlog.sha256` of what the rows say, which reading compares,
as in null model files.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.checksum import Checksum, read_bytes, read_tables, with_checksum
from bhlog.capture.contract.errors import CorruptProfile, InvalidOption, RouterLogError, one_line
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.rule import Bounds
from bhlog.capture.contract.schema import list_type
from bhlog.capture.contract.uris import shown

PROFILE_SCHEMA_VERSION = 2
_READ = ("1", "2")  # versions

SCHEMA = pa.schema(
    [
        pa.field("layer", pa.uint16(), nullable=False),
        pa.field("n_experts", pa.uint16(), nullable=False),
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("alphas", list_type(pa.float64()), nullable=False),
        pa.field("counts", list_type(pa.int64()), nullable=False),
        pa.field("kept", list_type(pa.int64())),
        pa.field("source", list_type(pa.string()), nullable=False),
        pa.field("kde_sha256", pa.string(), nullable=False),
        pa.field("where", pa.string()),
        pa.field("noise", list_type(pa.int64())),
    ]
)
_OLDER = pa.schema(list(SCHEMA)[:-1])
_VERSION = b"bhlog.profile_schema_version"
_BOUNDS = b"bhlog.bounds"

Counts = dict[int, NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class Facts:
    """What a profile is of; see Profile for what each is."""

    n_experts: int
    alphas: NDArray[np.float64]
    source: tuple[str, ...]
    kde_sha256: str
    where: str | None
    bounds: Bounds | None


def write(
    path: str | Path,
    facts: Facts,
    counts: Counts,
    kept: Counts | None,
    noise: Counts | None,
) -> None:
    """Write a profile, whole or not at all; the path may be the URI of an object.

    Args:
        counts, kept, noise: (E, J + 1) by layer.

    Raises:
        InvalidOption: the file cannot be written there.
    """
    rows = [
        {
            "layer": layer,
            "n_experts": facts.n_experts,
            "rows": int(of_layer[0].sum()),
            "alphas": facts.alphas,
            "counts": of_layer.ravel(),
            "kept": None if kept is None else kept[layer].ravel(),
            "source": facts.source,
            "kde_sha256": facts.kde_sha256,
            "where": facts.where,
            "noise": None if noise is None else noise[layer].ravel(),
        }
        for layer, of_layer in counts.items()
    ]
    bounds = None if facts.bounds is None else asdict(facts.bounds)
    schema = SCHEMA.with_metadata(
        {_VERSION: str(PROFILE_SCHEMA_VERSION), _BOUNDS: json.dumps(bounds)}
    )
    try:
        with whole_file(path) as file:
            table = with_checksum(pa.Table.from_pylist(rows, schema=schema))
            pq.write_table(table, file, compression="zstd")
    except OSError as error:
        raise InvalidOption(f"{path}: cannot write a profile ({error.strerror})") from error


def read(path: str | Path) -> tuple[Facts, Counts, Counts | None, Counts | None, dict[int, int]]:
    """Read a profile file, or the object of a URI.

    Returns:
        Facts, counts, probability kept and noise by layer, and the rows it says.

    Raises:
        CorruptProfile: it is not there, or not a profile file.
    """
    path, given = shown(str(path)), path
    try:
        data = read_bytes(given)
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            groups = list(read_tables(file, len(data)))
            table = pa.concat_tables(groups) if groups else file.schema_arrow.empty_table()
        if len({*table.column_names}) < len(table.column_names):
            raise ValueError("two of its columns have one name")
    except OSError as error:
        raise CorruptProfile(
            f"{path}: cannot read a profile ({error.strerror or error}); "
            "make one with: bhlog sweep RUN --save FILE"
        ) from error
    except (pa.ArrowException, ValueError) as error:
        reason = one_line(str(error).splitlines()[0])
        raise CorruptProfile(f"{path}: not a profile file: {reason}") from error
    metadata = table.schema.metadata or {}
    version = metadata.get(_VERSION, b"").decode(errors="replace")
    checksum = Checksum(table.schema)
    checksum.add(table)
    if table.schema.remove_metadata() == _OLDER:
        table = table.append_column(
            SCHEMA.field("noise"), pa.nulls(len(table), SCHEMA.field("noise").type)
        )
    if table.schema.remove_metadata() != SCHEMA:
        raise CorruptProfile(
            f"{path}: columns are {', '.join(table.column_names)}; "
            f"a profile file has {', '.join(SCHEMA.names)}"
        )
    if version not in _READ:
        raise CorruptProfile(
            f"{path}: a profile file of version {version or 'none'}, this bhlog reads "
            f"{PROFILE_SCHEMA_VERSION}; make it anew with: bhlog sweep RUN --save FILE"
        )
    try:
        parts = _parts(table, _bounds(metadata))
        checksum.check(required=version != "1")
    except (RouterLogError, ValueError) as error:
        raise CorruptProfile(f"{path}: {error}") from error
    return parts


def _bounds(metadata: dict[bytes, bytes]) -> Bounds | None:
    """The bounds of the runs; those of an older file are open."""
    try:
        found: Any = json.loads(metadata.get(_BOUNDS, b"{}"))
        bounds = None if found is None else Bounds(**found)
    except (ValueError, TypeError) as error:
        raise CorruptProfile(f"bounds are {metadata[_BOUNDS]!r}") from error
    for bound in () if bounds is None else (bounds.min_k, bounds.max_k):
        if not (bound is None or type(bound) is int):
            raise CorruptProfile(f"bounds are {metadata[_BOUNDS]!r}")
    return bounds


def _parts(
    table: pa.Table, bounds: Bounds | None
) -> tuple[Facts, Counts, Counts | None, Counts | None, dict[int, int]]:
    for name in ("n_experts", "alphas", "source", "kde_sha256", "where"):
        if len({str(value) for value in table[name].to_pylist()}) > 1:
            raise CorruptProfile(f"its layers differ in {name}")
    layers = table["layer"].to_pylist()
    if not layers or sorted(set(layers)) != layers:
        raise CorruptProfile(f"expected a row per layer, rising, got layers {layers}")
    first = table.slice(0, 1).to_pylist()[0]
    alphas, E = np.array(first["alphas"], dtype=np.float64), first["n_experts"]
    if E < 1:
        raise CorruptProfile(f"n_experts is {E}")
    counts = _matrices(table, "counts", E, len(alphas) + 1)
    kept = None if table["kept"].null_count else _matrices(table, "kept", E, len(alphas) + 1)
    facts = Facts(E, alphas, tuple(first["source"]), first["kde_sha256"], first["where"], bounds)
    noise = None if table["noise"].null_count else _matrices(table, "noise", E, len(alphas) + 1)
    return facts, counts, kept, noise, dict(zip(layers, table["rows"].to_pylist(), strict=True))


def _matrices(table: pa.Table, column: str, n_rows: int, n_columns: int) -> Counts:
    """The lists of a column as matrices, by layer."""
    found = {}
    for layer, values in zip(table["layer"].to_pylist(), table[column], strict=True):
        flat = values_of(values.values).view(np.int64)
        if len(flat) != n_rows * n_columns:
            raise CorruptProfile(
                f"layer {layer}: {len(flat)} {column}, expected {n_rows} ranks x {n_columns}"
            )
        found[layer] = flat.reshape(n_rows, n_columns)
    return found
