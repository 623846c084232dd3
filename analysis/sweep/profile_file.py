"""The profile file: a Parquet row per layer, which says what was counted and under which model.

| column | what |
|---|---|
| layer, n_experts | the layer, and E |
| rows | rows counted: those with a finite logit |
| alphas | the grid, J alphas; the same in every row |
| counts | E * (J + 1) rows by rank and critical alpha, rank by rank; see Profile |
| kept | beside each count, router probability in units of 2^-20; null if not counted |
| source | ids of the runs |
| kde_sha256 | of the null model |
| where | the condition that the rows match; null for all rows |
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bhlog.capture.contract.errors import CorruptProfile, InvalidOption
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.schema import list_type

if TYPE_CHECKING:
    from bhlog.analysis.sweep.profile import Profile

PROFILE_SCHEMA_VERSION = 1

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
    ]
)
_VERSION = b"bhlog.profile_schema_version"


def save_profile(profile: "Profile", path: str | Path) -> None:
    """Write a profile under a temporary name, sync it, rename it.

    Raises:
        InvalidOption: the file cannot be written there.
    """
    path = Path(path)
    rows = [
        {
            "layer": layer,
            "n_experts": profile.n_experts,
            "rows": profile.rows(layer),
            "alphas": profile.alphas,
            "counts": counts.ravel(),
            "kept": None if profile.kept is None else profile.kept[layer].ravel(),
            "source": profile.source,
            "kde_sha256": profile.kde_sha256,
            "where": profile.where,
        }
        for layer, counts in profile.counts.items()
    ]
    schema = SCHEMA.with_metadata({_VERSION: str(PROFILE_SCHEMA_VERSION)})
    try:
        with whole_file(path) as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")
    except OSError as error:
        raise InvalidOption(f"{path}: cannot write a profile ({error.strerror})") from error


def load_profile(path: str | Path) -> "Profile":
    """Read a profile file.

    Raises:
        CorruptProfile: it is not there, not a profile file, or breaks an invariant.
    """
    from bhlog.analysis.sweep.profile import Profile

    try:
        with pq.ParquetFile(pa.BufferReader(Path(path).read_bytes())) as file:
            # one of Arrow's threads would end the process if it let go of the bytes at exit
            table = file.read(use_threads=False)
    except OSError as error:
        raise CorruptProfile(
            f"{path}: cannot read a profile ({error.strerror or error}); "
            "make one with: bhlog sweep RUN --save FILE"
        ) from error
    except pa.ArrowException as error:
        raise CorruptProfile(f"{path}: not a profile file: {str(error).splitlines()[0]}") from error
    version = (table.schema.metadata or {}).get(_VERSION, b"").decode(errors="replace")
    if table.schema.remove_metadata() != SCHEMA:
        raise CorruptProfile(
            f"{path}: columns are {', '.join(table.column_names)}; "
            f"a profile file has {', '.join(SCHEMA.names)}"
        )
    if version != str(PROFILE_SCHEMA_VERSION):
        raise CorruptProfile(
            f"{path}: a profile file of version {version or 'none'}, this bhlog reads "
            f"{PROFILE_SCHEMA_VERSION}; make it anew with: bhlog sweep RUN --save FILE"
        )
    try:
        return _profile(table, Profile)
    except CorruptProfile as error:
        raise CorruptProfile(f"{path}: {error}") from error


def _profile(table: pa.Table, make: type["Profile"]) -> "Profile":
    for name in ("n_experts", "alphas", "source", "kde_sha256", "where"):
        if len({str(value) for value in table[name].to_pylist()}) > 1:
            raise CorruptProfile(f"its layers differ in {name}")
    layers = table["layer"].to_pylist()
    if not layers or sorted(set(layers)) != layers:
        raise CorruptProfile(f"expected a row per layer, rising, got layers {layers}")
    facts = table.slice(0, 1).to_pylist()[0]
    alphas, E = np.array(facts["alphas"], dtype=np.float64), facts["n_experts"]
    if E < 1:
        raise CorruptProfile(f"n_experts is {E}")
    counts = _matrices(table, "counts", E, len(alphas) + 1)
    kept = None if table["kept"].null_count else _matrices(table, "kept", E, len(alphas) + 1)
    profile = make(
        alphas, counts, tuple(facts["source"]), facts["kde_sha256"], facts["where"], kept
    )
    for layer, rows in zip(layers, table["rows"].to_pylist(), strict=True):
        if rows != profile.rows(layer):
            raise CorruptProfile(
                f"layer {layer}: counts {profile.rows(layer)} rows, but says rows = {rows}"
            )
    profile.curve()  # sums up now what every answer needs
    return profile


def _matrices(
    table: pa.Table, column: str, n_rows: int, n_columns: int
) -> dict[int, NDArray[np.int64]]:
    """The lists of a column as matrices, by layer."""
    found = {}
    for layer, values in zip(table["layer"].to_pylist(), table[column], strict=True):
        flat = values.values.to_numpy()
        if len(flat) != n_rows * n_columns:
            raise CorruptProfile(
                f"layer {layer}: {len(flat)} {column}, expected {n_rows} ranks x {n_columns}"
            )
        found[layer] = flat.reshape(n_rows, n_columns)
    return found
