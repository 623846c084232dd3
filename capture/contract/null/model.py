"""Null models of a run: fits, p-values, thresholds, and the file they are kept in."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from bhlog.capture.contract.checksum import read_bytes
from bhlog.capture.contract.errors import CorruptKde, InvalidOption, KdeMismatch
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.null import file as null_file
from bhlog.capture.contract.null import fit
from bhlog.capture.contract.null.curve import NullCurve as NullCurve
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.null.histogram import Histogram, HistogramKey
from bhlog.capture.contract.null.layer import LayerNull as LayerNull
from bhlog.capture.contract.uris import shown


@dataclass(frozen=True, eq=False)
class KdeModel(Mapping[int, LayerNull]):
    """The null model of a run: a mapping from decoder layer to its LayerNull.

    Attributes:
        layers: by decoder layer.
        n_experts: experts per router of the model that the logits are of; None where unknown,
            as in models that older projects pickled.
    """

    layers: dict[int, LayerNull]
    n_experts: int | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise CorruptKde("a null model needs at least one layer")
        if len({curve.centre for layer in self.layers.values() for curve in layer.curves}) > 1:
            raise CorruptKde("some curves are of centred logits and some are not")
        by_expert = {len(layer.curves) for layer in self.layers.values() if not layer.pooled}
        if self.n_experts is None and len(by_expert) == 1:
            object.__setattr__(self, "n_experts", *by_expert)
        if by_expert - {self.n_experts}:
            raise CorruptKde(
                f"layers have curves for {', '.join(map(str, sorted(by_expert)))} experts, "
                f"expected {self.n_experts or 'one number'} in all"
            )

    def __repr__(self) -> str:
        layers = "1 layer" if len(self) == 1 else f"{len(self)} layers"
        kind = "pooled over experts" if self.pooled else "a curve per expert"
        return f"KdeModel({layers}, {kind})"

    def __getitem__(self, layer: int) -> LayerNull:
        return self.layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def centre(self) -> Literal["none", "median"]:
        """What logits are less of before they are tested: "median" or "none"."""
        return next(iter(self.layers.values())).centre

    @property
    def pooled(self) -> bool:
        """Whether every layer has one curve for all its experts."""
        return all(layer.pooled for layer in self.layers.values())

    @property
    def curves(self) -> list[tuple[int, NullCurve]]:
        """(layer, curve) of every curve, by layer, then expert."""
        return [(i, curve) for i in sorted(self.layers) for curve in self.layers[i].curves]

    def require(self, layers: Iterable[int], n_experts: int | None = None) -> None:
        """Check that the model serves these layers, of n_experts experts unless that is None.

        Raises:
            KdeMismatch: a layer is missing, or the model was fitted for other experts.
        """
        missing = sorted(set(layers) - set(self.layers))
        if missing:
            raise KdeMismatch(
                f"the null model has layers {layer_ranges(self.layers)}, but not "
                f"{layer_ranges(missing)}; "
                "fit one from a run of this model: bhlog kde fit RUN --out FILE"
            )
        if n_experts is not None and self.n_experts not in (None, n_experts):
            raise KdeMismatch(
                f"the null model is for routers of {self.n_experts} experts, but these have "
                f"{n_experts}; fit one from a run of this model: bhlog kde fit RUN --out FILE"
            )

    def tail(
        self, layer: int, expert: int | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(x, S): the grid in logits and P(logit > x) of a layer, or of one of its experts.

        Raises:
            KdeMismatch: no such layer, or no such curve.
        """
        curve = self._curve(layer, expert)
        return curve.grid, curve.tail

    def p_value(
        self, layer: int, logits: ArrayLike, expert: int | None = None
    ) -> NDArray[np.float64]:
        """P-values of logits of a layer, float64, of their shape; NaN for NaN.

        Args:
            logits: any shape; (..., E) of a layer with a curve per expert, unless expert is named.
            expert: whose curve to use, where each expert has one.

        Raises:
            KdeMismatch: no such layer or curve, or logits of other experts.
        """
        logits = np.asarray(logits)
        self.require((layer,))
        if expert is None:
            return self.layers[layer].p_value(logits)
        return self._curve(layer, expert).p_value(logits)

    def thresholds(
        self, alpha: float, n_experts: int | None = None
    ) -> dict[int, NDArray[np.float32]]:
        """Thresholds of every layer; see LayerNull.thresholds.

        Args:
            alpha: BH level, 0 < alpha < 1.
            n_experts: experts per router; None takes what the model was fitted for.

        Raises:
            InvalidOption: alpha is out of range, or the model does not tell its experts.
            KdeMismatch: it was fitted for another number of experts.
        """
        if not 0 < alpha < 1:
            raise InvalidOption(f"alpha must be between 0 and 1, got {alpha}")
        E = self.n_experts if n_experts is None else n_experts
        if E is None:
            raise InvalidOption(
                "the null model does not tell how many experts its routers have: say n_experts"
            )
        self.require(self.layers, E)
        return {layer: null.thresholds(alpha, E) for layer, null in self.layers.items()}

    def _curve(self, layer: int, expert: int | None) -> NullCurve:
        """The pooled curve of a layer, or that of an expert."""
        self.require((layer,))
        null = self.layers[layer]
        for curve in null.curves:
            if curve.expert == expert:
                return curve
        raise KdeMismatch(
            f"layer {layer} of the null model is pooled over experts: leave expert out"
            if null.pooled
            else f"layer {layer} of the null model has experts 0-{len(null.curves) - 1}, "
            f"got {expert}"
        )

    @classmethod
    def fit(
        cls,
        histograms: Mapping[HistogramKey, Histogram],
        options: FitOptions,
        *,
        source: Iterable[str],
        n_experts: int | None = None,
    ) -> "KdeModel":
        """Fit a model from what a HistogramAccumulator counted.

        Args:
            histograms: HistogramAccumulator.histograms(), counted at options.trims.
            source: ids of the runs they were counted from.
            n_experts: experts per router of these runs, where known.

        Raises:
            InvalidOption: a layer or expert has no finite logit to fit from.
        """
        return cls(fit.fit_histograms(histograms, options, source=source), n_experts)

    def refit(
        self,
        *,
        kernel: str | None = None,
        bandwidth: str | float | None = None,
        trim_low: int | None = None,
        trim_high: int | None = None,
        null_from: str | None = None,
    ) -> "KdeModel":
        """Fit again from the histograms in the model; no log is read. None keeps what it has.

        Raises:
            InvalidOption: a bad option, or a trimming level that the model does not keep.
            KdeMismatch: the model was imported, so it has no histograms.
        """
        layers = fit.refit(
            self,
            kernel=kernel,
            bandwidth=bandwidth,
            trim_low=trim_low,
            trim_high=trim_high,
            null_from=null_from,
        )
        return KdeModel(layers, self.n_experts)

    def merge(self, *others: "KdeModel") -> "KdeModel":
        """One model fitted from the logits of all, as if one pass had counted them together.

        Trimming levels that only some of the models keep are dropped. Layers that only some have
        are kept as they are there.

        Raises:
            InvalidOption: the models were fitted with different options: refit them first.
            KdeMismatch: a model was imported, or they are for other numbers of experts.
        """
        models = (self, *others)
        n_experts = sorted({model.n_experts for model in models if model.n_experts is not None})
        if len(n_experts) > 1:
            raise KdeMismatch(
                f"the null models are for routers of {' and '.join(map(str, n_experts))} experts: "
                "merge those of one model"
            )
        return KdeModel(fit.merge(models), n_experts[0] if n_experts else None)

    def to_table(self) -> pa.Table:
        """The file's rows, a curve each; its schema is null_file.schema_of."""
        return null_file.to_table(self.layers, self.n_experts)

    def to_bytes(self) -> bytes:
        """The file as bytes: the same model gives the same bytes."""
        return null_file.to_bytes(self.layers, self.n_experts)

    @cached_property
    def sha256(self) -> str:
        """Of the file, in hex digits: tells null models apart; of a loaded one, as it was read."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def save(self, path: str | Path) -> str:
        """Write the file, whole or not at all, and return its sha256.

        Args:
            path: or the URI of an object.

        Raises:
            InvalidOption: the file cannot be written there.
        """
        data = self.to_bytes()
        try:
            with whole_file(path) as file:
                file.write(data)
        except OSError as error:
            raise InvalidOption(f"{path}: cannot write a null model ({error.strerror})") from error
        return hashlib.sha256(data).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> "KdeModel":
        """Read a null model file, or the object of a URI.

        Raises:
            CorruptKde: it is not there, not a null model file, or breaks an invariant.
        """
        try:
            data = read_bytes(path)
        except OSError as error:
            raise CorruptKde(
                f"{shown(str(path))}: cannot read a null model ({error.strerror or error}); "
                "fit one with: bhlog kde fit RUN --out FILE"
            ) from error
        return cls.from_bytes(data, shown(str(path)))

    @classmethod
    def from_bytes(cls, data: bytes, name: str, *, sha256: str | None = None) -> "KdeModel":
        """Read a null model file from memory.

        Args:
            name: says in errors where it came from.
            sha256: what a run's manifest says that the file's is; None says nothing.

        Raises:
            CorruptKde: it is another file, not a null model file, or breaks an invariant.
        """
        found = hashlib.sha256(data).hexdigest()
        if sha256 not in (None, found):
            raise CorruptKde(
                f"{name}: sha256 is {found[:12]}..., the manifest says {str(sha256)[:12]}...: not "
                "the null model that the run was routed by; restore the file from a copy"
            )
        try:
            model = cls(*null_file.from_bytes(data))
        except CorruptKde as error:
            raise CorruptKde(f"{name}: {error}") from error
        vars(model)["sha256"] = found
        return model


def layer_ranges(layers: Iterable[int]) -> str:
    """Integers as text: 0-3, 7."""
    parts: list[list[int]] = []
    for number in sorted(layers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
