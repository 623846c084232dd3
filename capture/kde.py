"""The null model file: what p-values come from, and its thresholds.

Fitting lives in analysis; this module reads, writes and evaluates, with numpy and pyarrow alone.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from capture.bh import critical_values
from capture.errors import CorruptKde, KdeMismatch
from capture.histogram import BIN_WIDTH, Histogram
from capture.schema import list_type

KDE_SCHEMA_VERSION = 1

_SCHEMA = pa.schema(
    [
        pa.field("layer", pa.uint16(), nullable=False),
        pa.field("expert", pa.uint16()),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("lo", pa.float64()),
        pa.field("bin_width", pa.float64()),
        pa.field("counts", list_type(pa.int64())),
        pa.field("trim_low", pa.uint16(), nullable=False),
        pa.field("trim_high", pa.uint16(), nullable=False),
        pa.field("kernel", pa.string(), nullable=False),
        pa.field("bandwidth", pa.float64()),
        pa.field("rule", pa.string(), nullable=False),
        pa.field("x0", pa.float64(), nullable=False),
        pa.field("dx", pa.float64(), nullable=False),
        pa.field("tail", list_type(pa.float64()), nullable=False),
        pa.field("source", list_type(pa.string()), nullable=False),
    ]
)


@dataclass(frozen=True, eq=False)
class NullCurve:
    """One distribution of logits: of a layer, or of one expert of a layer.

    Stores the tail rather than the CDF: 1 - CDF rounds away the small p-values that BH needs.

    Attributes:
        expert: the expert it belongs to; None when pooled over the layer's experts.
        n: logits it was fitted from; 0 when unknown (imported).
        x0, dx: first grid point and grid step, in logits.
        tail: (G,) float64, P(logit > x0 + g * dx), falling from at most 1 to at least 0.
        histogram: what it was fitted from; None when imported.
        trim_low, trim_high: logits left out of each row, at its lower and upper end.
        kernel: "gaussian", ..., "none", or "imported".
        bandwidth: standard deviation of the kernel in logits; None when there is none.
        rule: how the bandwidth was chosen.
        source: ids of the runs it was fitted from, or the name of the imported file.
    """

    expert: int | None
    n: int
    x0: float
    dx: float
    tail: NDArray[np.float64]
    histogram: Histogram | None = None
    trim_low: int = 0
    trim_high: int = 0
    kernel: str = "imported"
    bandwidth: float | None = None
    rule: str = "imported"
    source: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.tail.ndim != 1 or len(self.tail) < 2:
            raise CorruptKde(f"tail must have at least 2 grid points, got shape {self.tail.shape}")
        if not (self.dx > 0 and np.isfinite(self.x0) and np.isfinite(self.dx)):
            raise CorruptKde(f"grid x0={self.x0}, dx={self.dx} is not a rising finite grid")
        if not (self.tail[0] <= 1 and self.tail[-1] >= 0 and np.all(np.diff(self.tail) <= 0)):
            raise CorruptKde("tail must fall from at most 1 to at least 0")

    @property
    def grid(self) -> NDArray[np.float64]:
        """(G,) float64: the grid points, in logits."""
        return self.x0 + self.dx * np.arange(len(self.tail), dtype=np.float64)

    def p_value(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """P(logit > x) of each value, float64: 1 below the grid, 0 above it, NaN for NaN."""
        # The operations and their order are those of capture.routing, which must agree.
        u = (np.asarray(logits, dtype=np.float64) - self.x0) / self.dx
        last = len(self.tail) - 1
        cell = np.clip(np.nan_to_num(np.floor(u), nan=0.0), 0, last - 1).astype(np.int64)
        left = self.tail[cell]
        p = left + (u - cell) * (self.tail[cell + 1] - left)
        p = np.where(u < 0, 1.0, np.where(u > last, 0.0, p))
        return np.where(np.isnan(u), np.nan, p)

    def thresholds(self, alpha: float, n_experts: int) -> NDArray[np.float32]:
        """(E,) float32 t_1..t_E: the smallest logits with p-value at most k * alpha / E.

        Solved on the piecewise linear tail in float64, rounded up to float32. Falls with k.
        """
        critical = critical_values(alpha, n_experts)
        right = np.searchsorted(-self.tail, -critical, side="left")  # first node with S <= c
        inside = np.clip(right, 1, len(self.tail) - 1)
        above, below = self.tail[inside - 1], self.tail[inside]
        drop = np.where(above > below, above - below, 1.0)
        exact = self.x0 + self.dx * ((inside - 1) + (above - critical) / drop)
        exact = np.where(right == 0, self.x0, exact)
        t = round_up_to_float32(exact)
        beyond = np.nextafter(
            round_up_to_float32(np.array(self.x0 + self.dx * (len(self.tail) - 1))),
            np.float32(np.inf),
            dtype=np.float32,
        )
        t = np.where(right == len(self.tail), beyond, t)  # S is 0 only above the grid
        return np.minimum.accumulate(t)  # equal in exact arithmetic; guards rounding


@dataclass(frozen=True, eq=False)
class LayerNull:
    """Null model of one layer: one pooled curve, or one curve per expert.

    `model["x"]` and `model["cdf"]` answer as the items of older notebooks did (pooled only).
    """

    layer: int
    curves: tuple[NullCurve, ...]

    def __post_init__(self) -> None:
        experts = [curve.expert for curve in self.curves]
        if experts != [None] and experts != list(range(len(experts))):
            raise CorruptKde(
                f"layer {self.layer}: expected one pooled curve or one per expert from 0, "
                f"got experts {experts}"
            )

    @property
    def pooled(self) -> bool:
        """Whether one curve serves all experts."""
        return self.curves[0].expert is None

    def p_value(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """(T, E) float64 p-values of (T, E) logits; a pooled null takes any shape."""
        if self.pooled:
            return self.curves[0].p_value(logits)
        columns = [c.p_value(logits[..., i]) for i, c in enumerate(self.curves)]
        return np.stack(columns, axis=-1)

    def thresholds(self, alpha: float, n_experts: int) -> NDArray[np.float32]:
        """float32 thresholds: (E,) t_k when pooled, (E, E) t_{k,i} with a curve per expert."""
        if self.pooled:
            return self.curves[0].thresholds(alpha, n_experts)
        if len(self.curves) != n_experts:
            raise KdeMismatch(
                f"null model of layer {self.layer} has {len(self.curves)} experts, "
                f"the run has {n_experts}"
            )
        return np.stack([c.thresholds(alpha, n_experts) for c in self.curves], axis=1)

    def __getitem__(self, key: str) -> NDArray[np.float64]:
        if not self.pooled:
            raise KeyError(f"layer {self.layer} has a curve per expert: read .curves[i]")
        if key == "x":
            return self.curves[0].grid
        if key == "cdf":
            return 1.0 - self.curves[0].tail  # for old notebooks; p-values come from the tail
        raise KeyError(f"{key!r}: expected 'x' or 'cdf'")


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

    def require(self, layers: Mapping[int, object] | tuple[int, ...], n_experts: int) -> None:
        """Check that the model serves these layers of n_experts experts.

        Raises:
            KdeMismatch: a layer is missing, or a layer has curves for other experts.
        """
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise KdeMismatch(
                f"the null model has layers {_ranges(self.layers)}, but not {_ranges(missing)}; "
                "fit one from a run of this model: bhlog kde fit RUN --out FILE"
            )
        for layer in layers:
            null = self.layers[layer]
            if not null.pooled and len(null.curves) != n_experts:
                raise KdeMismatch(
                    f"the null model of layer {layer} has curves for {len(null.curves)} experts, "
                    f"but the model has {n_experts}"
                )

    def thresholds(self, alpha: float, n_experts: int) -> dict[int, NDArray[np.float32]]:
        """Thresholds of every layer; see LayerNull.thresholds."""
        return {layer: null.thresholds(alpha, n_experts) for layer, null in self.layers.items()}

    def to_bytes(self) -> bytes:
        """The Parquet file as bytes: the same model gives the same bytes."""
        rows = [
            {
                "layer": layer,
                "expert": curve.expert,
                "n": curve.n,
                "lo": curve.histogram.lo if curve.histogram else None,
                "bin_width": BIN_WIDTH if curve.histogram else None,
                "counts": curve.histogram.counts if curve.histogram else None,
                "trim_low": curve.trim_low,
                "trim_high": curve.trim_high,
                "kernel": curve.kernel,
                "bandwidth": curve.bandwidth,
                "rule": curve.rule,
                "x0": curve.x0,
                "dx": curve.dx,
                "tail": curve.tail,
                "source": list(curve.source),
            }
            for layer in sorted(self.layers)
            for curve in self.layers[layer].curves
        ]
        schema = _SCHEMA.with_metadata({"bhlog.kde_schema_version": str(KDE_SCHEMA_VERSION)})
        buffer = io.BytesIO()
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema),
            buffer,
            compression="zstd",
            use_dictionary=False,
        )
        return buffer.getvalue()

    def save(self, path: str | Path) -> str:
        """Write the file under a temporary name, rename it, and return its sha256."""
        data = self.to_bytes()
        path = Path(path)
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
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
            table = pq.read_table(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            raise CorruptKde(f"{name}: not a null model file: {error}") from error
        if table.schema.remove_metadata() != _SCHEMA:
            raise CorruptKde(
                f"{name}: columns are {', '.join(table.column_names)}; "
                f"a null model file has {', '.join(_SCHEMA.names)}"
            )
        curves: dict[int, list[NullCurve]] = {}
        for i in range(table.num_rows):
            row = {key: table[key][i] for key in table.column_names}
            try:
                curves.setdefault(row["layer"].as_py(), []).append(_curve(row))
            except CorruptKde as error:
                raise CorruptKde(f"{name}: layer {row['layer']}: {error}") from error
        return cls({layer: LayerNull(layer, tuple(c)) for layer, c in sorted(curves.items())})


def round_up_to_float32(x: NDArray[np.float64]) -> NDArray[np.float32]:
    """The smallest float32 that is at least x, element by element."""
    nearest = x.astype(np.float32)
    above = np.nextafter(nearest, np.float32(np.inf), dtype=np.float32)
    return np.where(nearest.astype(np.float64) < x, above, nearest)


def _curve(row: dict[str, pa.Scalar]) -> NullCurve:
    histogram = None
    if row["counts"].is_valid:
        if row["bin_width"].as_py() != BIN_WIDTH:
            raise CorruptKde(f"bin_width is {row['bin_width']}, expected {BIN_WIDTH}")
        histogram = Histogram(
            first=round(row["lo"].as_py() / BIN_WIDTH),
            counts=row["counts"].values.to_numpy(),
        )
    return NullCurve(
        expert=row["expert"].as_py(),
        n=row["n"].as_py(),
        x0=row["x0"].as_py(),
        dx=row["dx"].as_py(),
        tail=row["tail"].values.to_numpy(),
        histogram=histogram,
        trim_low=row["trim_low"].as_py(),
        trim_high=row["trim_high"].as_py(),
        kernel=row["kernel"].as_py(),
        bandwidth=row["bandwidth"].as_py(),
        rule=row["rule"].as_py(),
        source=tuple(row["source"].as_py()),
    )


def _ranges(numbers: Mapping[int, object] | list[int]) -> str:
    """Sorted integers as text: 0-3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
