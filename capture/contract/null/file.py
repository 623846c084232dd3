"""The null model file: a Parquet row per curve, and the histograms it can be refitted from.

One row per layer, or per layer and expert, is in force: it has a `tail`. Rows without a tail keep
the histogram of the same logits at another trimming level, from which a refit can start.

| column | what |
|---|---|
| layer, expert | expert null: pooled over the layer's experts |
| n, left_out | logits counted; logits not counted because they were NaN, infinite or huge |
| lo, bin_width, counts, spread | the histogram, see histogram.py; null when imported |
| trim_low, trim_high | logits left out of each row |
| kernel, bandwidth, rule | kernel, its standard deviation in logits, how it was chosen |
| x0, dx, tail | P(logit > x0 + g * dx), float64; null in rows that keep a level |
| source | ids of the runs, or the imported file |
| delta0, sigma0, pi0, lfdr | of a null matched to the centre; other files lack them |
| centre | median: of logits less their row's median; none, or no column: as they are |

The file's metadata holds `bhlog.kde_schema_version`, where it is known `bhlog.n_experts`, the
experts per router of the model that the logits are of, and `bhlog.sha256` of what the rows hold,
which loading compares; files of version 1 may have none.
"""

import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.checksum import Checksum, read_tables
from bhlog.capture.contract.errors import CorruptKde, one_line
from bhlog.capture.contract.null.central import Central
from bhlog.capture.contract.null.curve import NullCurve
from bhlog.capture.contract.null.histogram import BIN_WIDTH, LARGEST_LOGIT, Histogram
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.null.trim import Trim
from bhlog.capture.contract.schema import list_type, schema_difference

KDE_SCHEMA_VERSION = 2
_READ = ("1", "2")  # versions; those of before had none

_VERSION, _N_EXPERTS = b"bhlog.kde_schema_version", b"bhlog.n_experts"
KDE_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.uint16(), nullable=False),
        pa.field("expert", pa.uint16()),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("left_out", pa.int64(), nullable=False),
        pa.field("lo", pa.float64()),
        pa.field("bin_width", pa.float64()),
        pa.field("counts", list_type(pa.int64())),
        pa.field("spread", list_type(pa.int64())),
        pa.field("trim_low", pa.uint16(), nullable=False),
        pa.field("trim_high", pa.uint16(), nullable=False),
        pa.field("kernel", pa.string(), nullable=False),
        pa.field("bandwidth", pa.float64()),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("x0", pa.float64()),
        pa.field("dx", pa.float64()),
        pa.field("tail", list_type(pa.float64())),
        pa.field("source", list_type(pa.string()), nullable=False),
    ]
)
_MORE = (
    pa.field("delta0", pa.float64()),
    pa.field("sigma0", pa.float64()),
    pa.field("pi0", pa.float64()),
    pa.field("lfdr", list_type(pa.float64())),
    pa.field("centre", pa.string()),
)
MORE_SCHEMA = pa.schema([*KDE_SCHEMA, *_MORE])  # of files with a central or centred null
_ARRAYS = ("counts", "spread", "tail", "lfdr")
GROUP_NUMBERS = 1 << 22  # in a row group


def schema_of(layers: Mapping[int, LayerNull]) -> pa.Schema:
    """Columns of their file."""
    curves = [curve for layer in layers.values() for curve in layer.curves]
    more = any(curve.central or curve.centre != "none" for curve in curves)
    return MORE_SCHEMA if more else KDE_SCHEMA


def to_table(layers: Mapping[int, LayerNull], n_experts: int | None) -> pa.Table:
    """The file's rows, a curve each, with schema_of and the file's metadata."""
    checksum = _checksum(layers, n_experts)
    return pa.concat_tables(_groups(layers, checksum.signed))


def _checksum(layers: Mapping[int, LayerNull], n_experts: int | None) -> Checksum:
    metadata = {_VERSION: str(KDE_SCHEMA_VERSION)}
    if n_experts is not None:
        metadata[_N_EXPERTS] = str(n_experts)
    checksum = Checksum(schema_of(layers).with_metadata(metadata))
    for group in _groups(layers, checksum.schema):
        checksum.add(group)
    return checksum


def _groups(layers: Mapping[int, LayerNull], schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows in row groups: one, or several of about GROUP_NUMBERS numbers each."""
    rows: list[dict[str, Any]] = []
    numbers = 0
    for layer in sorted(layers):
        for curve in layers[layer].curves:
            for row in _rows(layer, curve):
                rows.append(row)
                numbers += sum(len(row[name]) for name in _ARRAYS if row.get(name) is not None)
            if numbers > GROUP_NUMBERS:
                yield pa.Table.from_pylist(rows, schema=schema)
                rows, numbers = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema=schema)


def to_bytes(layers: Mapping[int, LayerNull], n_experts: int | None) -> bytes:
    """The file as bytes: the same model gives the same bytes."""
    buffer = io.BytesIO()
    schema = _checksum(layers, n_experts).signed
    with pq.ParquetWriter(
        buffer,
        schema,
        compression="zstd",
        use_dictionary=False,
        column_encoding={
            f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in _ARRAYS if name in schema.names
        },
        write_statistics=False,
    ) as writer:
        for group in _groups(layers, schema):
            writer.write_table(group)
    return buffer.getvalue()


def from_bytes(data: bytes) -> tuple[dict[int, LayerNull], int | None]:
    """Layers and n_experts of a file.

    Raises:
        CorruptKde: it is no null model file, or breaks an invariant.
    """
    curves: dict[int, list[NullCurve]] = {}
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            n_experts = _check_schema(file)
            checksum = Checksum(file.schema_arrow)
            for (layer, _), rows in groupby(_read_rows(file, len(data), checksum), _curve_key):
                curves.setdefault(layer, []).append(_curve(layer, list(rows)))
    except CorruptKde:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = one_line(str(error).splitlines()[0])
        raise CorruptKde(f"not a null model file: {reason}") from error
    layers = {i: LayerNull(i, tuple(c)) for i, c in sorted(curves.items())}
    try:
        version = (checksum.schema.metadata or {}).get(_VERSION, b"1")
        checksum.check(required=version != b"1")
    except ValueError as error:
        raise CorruptKde(str(error)) from error
    return layers, n_experts


def _curve_key(row: dict[str, Any]) -> tuple[int, int | None]:
    return row["layer"], row["expert"]


def _check_schema(file: pq.ParquetFile) -> int | None:
    """Raise CorruptKde unless a file has our columns and version; n_experts."""
    schema: pa.Schema = file.schema_arrow
    metadata = schema.metadata or {}
    version = metadata.get(_VERSION, b"").decode("ascii", "replace")
    if version and version not in _READ:
        raise CorruptKde(
            f"a null model file of version {version[:20]!r}, this bhlog reads "
            f"{KDE_SCHEMA_VERSION}; read it with the bhlog that wrote it"
        )
    if schema.remove_metadata() not in (KDE_SCHEMA, MORE_SCHEMA):
        difference = (
            schema_difference(schema, KDE_SCHEMA) or "its columns are in another order or kind"
        )
        raise CorruptKde(f"not a null model file: {difference}; bhlog kde fit makes one")
    if not version:
        raise CorruptKde(f"not a null model file: its metadata has no {_VERSION.decode()}")
    n_experts = metadata.get(_N_EXPERTS)
    if n_experts is None:
        return None
    if not (n_experts.isdigit() and 0 < int(n_experts[:9]) < 1 << 16):
        raise CorruptKde(f"{_N_EXPERTS.decode()} is no number of experts")
    return int(n_experts)


def _rows(layer: int, curve: NullCurve) -> Iterator[dict[str, Any]]:
    """Rows of a curve: the one in force, then those of the kept levels."""
    shared = {
        "layer": layer,
        "expert": curve.expert,
        "kernel": curve.kernel,
        "rule": curve.rule,
        "source": list(curve.source),
        "centre": curve.centre,
    }
    yield {
        **shared,
        "n": curve.n,
        "left_out": 0,
        "trim_low": curve.trim_low,
        "trim_high": curve.trim_high,
        "bandwidth": curve.bandwidth,
        "x0": curve.x0,
        "dx": curve.dx,
        "tail": curve.tail,
        "lfdr": curve.lfdr,
        **(asdict(curve.central) if curve.central else {}),
        **(_histogram_columns(curve.histogram) if curve.histogram else {}),
    }
    for trim in sorted(curve.kept):
        yield {
            **shared,
            "n": curve.kept[trim].n,
            "trim_low": trim.low,
            "trim_high": trim.high,
            **_histogram_columns(curve.kept[trim]),
        }


def _histogram_columns(histogram: Histogram) -> dict[str, Any]:
    return {
        "left_out": histogram.left_out,
        "lo": histogram.lo,
        "bin_width": BIN_WIDTH,
        "counts": histogram.counts,
        "spread": histogram.spread,
    }


def _read_rows(file: pq.ParquetFile, size: int, checksum: Checksum) -> Iterator[dict[str, Any]]:
    """The rows, each list of numbers as an array; they are added to the checksum."""
    for table in read_tables(file, size, rows="curves"):
        checksum.add(table)
        known = [name for name in _ARRAYS if name in table.column_names]
        plain = table.drop_columns(known).to_pylist()
        for i, row in enumerate(plain):
            lists = {name: table[name][i] for name in known}
            arrays = {
                name: values_of(values.values) if values.is_valid else None
                for name, values in lists.items()
            }
            yield {**row, **arrays, "source": tuple(row["source"])}


def _curve(layer: int, rows: list[dict[str, Any]]) -> NullCurve:
    """A curve from its rows: exactly one in force, the others kept levels."""
    try:
        return _checked_curve(rows)
    except CorruptKde as error:
        raise CorruptKde(f"layer {layer}: {error}") from error


def _checked_curve(rows: list[dict[str, Any]]) -> NullCurve:
    in_force = [row for row in rows if row["tail"] is not None]
    if len(in_force) != 1:
        raise CorruptKde(f"expected one row with a tail, found {len(in_force)}")
    row = in_force[0]
    if row["x0"] is None or row["dx"] is None:
        raise CorruptKde("a row has a tail but no grid x0, dx")
    levels = [Trim(level["trim_low"], level["trim_high"]) for level in rows]
    if len(set(levels)) < len(levels):
        raise CorruptKde("a trimming level occurs twice")
    kept: dict[Trim, Histogram] = {}
    for trim, level in zip(levels, rows, strict=True):
        if level is not row:
            histogram = _histogram(level)
            if histogram is None:
                raise CorruptKde("a row has neither a tail nor a histogram")
            kept[trim] = histogram
    return NullCurve(
        expert=row["expert"],
        n=row["n"],
        x0=row["x0"],
        dx=row["dx"],
        tail=row["tail"],
        histogram=_histogram(row),
        trim_low=row["trim_low"],
        trim_high=row["trim_high"],
        kernel=row["kernel"],
        bandwidth=row["bandwidth"],
        rule=row["rule"],
        source=row["source"],
        kept=kept,
        central=None
        if row.get("pi0") is None
        else Central(row["delta0"] or 0.0, row["sigma0"] or 0.0, row["pi0"]),
        lfdr=row.get("lfdr"),
        centre=row.get("centre") or "none",
    )


def _histogram(row: dict[str, Any]) -> Histogram | None:
    counts, spread, lo = row["counts"], row["spread"], row["lo"]
    if counts is None:
        return None
    if row["bin_width"] != BIN_WIDTH or lo is None:
        raise CorruptKde(
            f"histogram has lo={lo}, bin_width={row['bin_width']}; expected {BIN_WIDTH}"
        )
    if spread is None or len(spread) != len(counts):
        raise CorruptKde("histogram needs a spread for each of its counts")
    if len(counts) and min(counts.min(), spread.min()) < 0:
        raise CorruptKde("histogram holds a negative count or spread")
    if not abs(lo) <= LARGEST_LOGIT or lo + len(counts) * BIN_WIDTH > LARGEST_LOGIT + 1:
        raise CorruptKde(f"histogram from {lo} on holds logits beyond {LARGEST_LOGIT:g}")
    if counts.sum(dtype=np.float64) >= 2.0**62 or row["left_out"] < 0:
        raise CorruptKde("histogram counts more logits than can be, or fewer than none")
    histogram = Histogram(round(lo / BIN_WIDTH), counts, spread, row["left_out"])
    if histogram.n != row["n"]:
        raise CorruptKde(f"histogram counts {histogram.n} logits, the row says n = {row['n']}")
    return histogram
