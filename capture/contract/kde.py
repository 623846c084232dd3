"""The null model file: a Parquet row per curve, and the histograms it can be refitted from.

Fitting lives in analysis; this module reads, writes and evaluates, with numpy and pyarrow alone.

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
"""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from capture.contract.errors import CorruptKde, InvalidOption, KdeMismatch
from capture.contract.histogram import BIN_WIDTH, Histogram, Trim
from capture.contract.null import LayerNull as LayerNull
from capture.contract.null import NullCurve as NullCurve
from capture.contract.schema import list_type

KDE_SCHEMA_VERSION = 1

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


@dataclass(frozen=True, eq=False)
class KdeModel(Mapping[int, LayerNull]):
    """The null model of a run: a mapping from decoder layer to its LayerNull."""

    layers: dict[int, LayerNull]

    def __post_init__(self) -> None:
        if not self.layers:
            raise CorruptKde("a null model needs at least one layer")

    def __getitem__(self, layer: int) -> LayerNull:
        return self.layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def pooled(self) -> bool:
        """Whether every layer has one curve for all its experts."""
        return all(layer.pooled for layer in self.layers.values())

    @property
    def curves(self) -> list[tuple[int, NullCurve]]:
        """(layer, curve) of every curve, by layer, then expert."""
        return [(i, curve) for i in sorted(self.layers) for curve in self.layers[i].curves]

    def require(self, layers: Iterable[int], n_experts: int) -> None:
        """Check that the model serves these layers of n_experts experts.

        Raises:
            KdeMismatch: a layer is missing, or a layer has curves for other experts.
        """
        wanted = set(layers)
        missing = sorted(wanted - set(self.layers))
        if missing:
            raise KdeMismatch(
                f"the null model has layers {layer_ranges(self.layers)}, but not "
                f"{layer_ranges(missing)}; "
                "fit one from a run of this model: bhlog kde fit RUN --out FILE"
            )
        for layer in sorted(wanted):
            self.layers[layer].require(n_experts)

    def tail(
        self, layer: int, expert: int | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(x, S): the grid in logits and P(logit > x) of a layer, or of one of its experts.

        Raises:
            KdeMismatch: no such layer, or no such curve.
        """
        self.require((layer,), len(self.layers[layer].curves) if layer in self.layers else 0)
        for curve in self.layers[layer].curves:
            if curve.expert == expert:
                return curve.grid, curve.tail
        raise KdeMismatch(
            f"layer {layer} of the null model is pooled over experts: leave expert out"
            if self.layers[layer].pooled
            else f"layer {layer} of the null model has experts 0-"
            f"{len(self.layers[layer].curves) - 1}, got {expert}"
        )

    def p_value(self, layer: int, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """P-values of (T, E) logits of a layer, float64; see LayerNull.p_value.

        Raises:
            KdeMismatch: no such layer, or curves for other experts.
        """
        self.require((layer,), logits.shape[-1] if logits.ndim else 0)
        return self.layers[layer].p_value(logits)

    def thresholds(self, alpha: float, n_experts: int) -> dict[int, NDArray[np.float32]]:
        """Thresholds of every layer; see LayerNull.thresholds."""
        return {layer: null.thresholds(alpha, n_experts) for layer, null in self.layers.items()}

    def refit(self, **options: Any) -> "KdeModel":
        """The model at another kernel, bandwidth or trimming level; see analysis.kde.fit.refit."""
        from analysis.kde.fit import refit

        return refit(self, **options)

    def merge(self, *others: "KdeModel") -> "KdeModel":
        """One model fitted from the logits of all; see analysis.kde.fit.merge."""
        from analysis.kde.fit import merge

        return merge([self, *others])

    def to_bytes(self) -> bytes:
        """The Parquet file as bytes: the same model gives the same bytes."""
        rows = [row for layer, curve in self.curves for row in _rows(layer, curve)]
        schema = KDE_SCHEMA.with_metadata({"bhlog.kde_schema_version": str(KDE_SCHEMA_VERSION)})
        buffer = io.BytesIO()
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema),
            buffer,
            compression="zstd",
            use_dictionary=False,
            column_encoding={
                f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in ("counts", "spread", "tail")
            },
            write_statistics=False,
        )
        return buffer.getvalue()

    def save(self, path: str | Path) -> str:
        """Write the file under a temporary name, rename it, and return its sha256.

        Raises:
            InvalidOption: the file cannot be written there.
        """
        data = self.to_bytes()
        path = Path(path)
        part = path.with_name(path.name + ".part")
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise InvalidOption(f"{path}: cannot write a null model ({error.strerror})") from error
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "KdeModel":
        """Read a null model file.

        Raises:
            CorruptKde: it is not there, not a null model file, or breaks an invariant.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CorruptKde(
                f"{path}: cannot read a null model ({error.strerror}); "
                "fit one with: bhlog kde fit RUN --out FILE"
            ) from error
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "KdeModel":
        """Read a null model file from memory; name says in errors where it came from."""
        try:
            table = pq.read_table(pa.BufferReader(data), memory_map=False)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CorruptKde(f"{name}: not a null model file: {reason}") from error
        version = (table.schema.metadata or {}).get(b"bhlog.kde_schema_version", b"").decode()
        if version not in ("", str(KDE_SCHEMA_VERSION)):
            raise CorruptKde(
                f"{name}: a null model file of version {version}, this bhlog reads "
                f"{KDE_SCHEMA_VERSION}; read it with the bhlog that wrote it"
            )
        if table.schema.remove_metadata() != KDE_SCHEMA:
            raise CorruptKde(
                f"{name}: columns are {', '.join(table.column_names)}; "
                f"a null model file has {', '.join(KDE_SCHEMA.names)}"
            )
        groups: dict[tuple[int, int | None], list[dict[str, Any]]] = {}
        for i in range(table.num_rows):
            row = {key: _value(table[key][i]) for key in table.column_names}
            groups.setdefault((row["layer"], row["expert"]), []).append(row)
        curves: dict[int, list[NullCurve]] = {}
        try:
            for (layer, _), rows in groups.items():
                try:
                    curves.setdefault(layer, []).append(_curve(rows))
                except CorruptKde as error:
                    raise CorruptKde(f"layer {layer}: {error}") from error
            return cls({layer: LayerNull(layer, tuple(c)) for layer, c in sorted(curves.items())})
        except CorruptKde as error:
            raise CorruptKde(f"{name}: {error}") from error


def _rows(layer: int, curve: NullCurve) -> Iterator[dict[str, Any]]:
    """Rows of a curve: the one in force, then those of the kept levels."""
    shared = {
        "layer": layer,
        "expert": curve.expert,
        "kernel": curve.kernel,
        "rule": curve.rule,
        "source": list(curve.source),
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


def _value(scalar: pa.Scalar) -> Any:
    """A scalar as a Python value, a list of numbers as an array."""
    if scalar.is_valid and isinstance(scalar, pa.ListScalar):
        values = scalar.values
        return tuple(values.to_pylist()) if values.type == pa.string() else values.to_numpy()
    return scalar.as_py()


def _curve(rows: list[dict[str, Any]]) -> NullCurve:
    """A curve from its rows: exactly one in force, the others kept levels."""
    in_force = [row for row in rows if row["tail"] is not None]
    if len(in_force) != 1:
        raise CorruptKde(f"expected one row with a tail, found {len(in_force)}")
    row = in_force[0]
    if row["x0"] is None or row["dx"] is None:
        raise CorruptKde("a row has a tail but no grid x0, dx")
    kept: dict[Trim, Histogram] = {}
    for level in rows:
        if level is not row:
            histogram = _histogram(level)
            if histogram is None:
                raise CorruptKde("a row has neither a tail nor a histogram")
            kept[Trim(level["trim_low"], level["trim_high"])] = histogram
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
    )


def _histogram(row: dict[str, Any]) -> Histogram | None:
    if row["counts"] is None:
        return None
    if row["bin_width"] != BIN_WIDTH or row["lo"] is None:
        raise CorruptKde(
            f"histogram has lo={row['lo']}, bin_width={row['bin_width']}; expected {BIN_WIDTH}"
        )
    counts, spread = row["counts"], row["spread"]
    if spread is None or len(spread) != len(counts) or (len(counts) and counts.min() < 0):
        raise CorruptKde("histogram needs counts of at least 0 and a spread for each")
    histogram = Histogram(round(row["lo"] / BIN_WIDTH), counts, spread, row["left_out"])
    if histogram.n != row["n"]:
        raise CorruptKde(f"histogram counts {histogram.n} logits, the row says n = {row['n']}")
    return histogram


def layer_ranges(layers: Iterable[int]) -> str:
    """Integers as text: 0-3, 7."""
    parts: list[list[int]] = []
    for number in sorted(layers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
