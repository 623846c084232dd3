"""What BH finds under a null model when the truth is known: signals planted in noise of its shape.

Benjamini and Hochberg's rule keeps the false discovery rate below alpha where p-values come from
the true null and do not depend on each other badly. A null model that was fitted from what is left
after the largest logits were cut is not the null that the cut logits came from: BH under it is a
threshold that adapts to the row, and its realized rate is another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.curve import NullCurve
from bhlog.capture.contract.null.fit import fit_histograms, options_of
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.null.model import KdeModel

AS_IT_IS, FITTED_AGAIN = "as it is", "fitted again"


@dataclass(frozen=True)
class Planted:
    """What is planted in the noise.

    Attributes:
        signals: experts of each row that carry a signal, drawn anew for each row.
        shift: how far a signal is moved up, in standard deviations of its noise.
        rows: rows that are drawn for each layer.
        seed: of the draws.
    """

    signals: int = 8
    shift: float = 2.0
    rows: int = 2000
    seed: int = 0

    def check(self, n_experts: int) -> None:
        """Raise InvalidOption unless it fits routers of n_experts experts."""
        if not 0 <= self.signals <= n_experts:
            raise InvalidOption(f"signals must be from 0 to {n_experts}, got {self.signals}")
        if not np.isfinite(self.shift) or self.rows < 2:
            raise InvalidOption(
                f"expected a shift that is a number and at least 2 rows, got {self.shift} and "
                f"{self.rows}"
            )


def simulate(
    kde: KdeModel, alphas: Sequence[float], n_experts: int, planted: Planted | None = None
) -> pl.DataFrame:
    """Realized false discovery rate and power of BH at these alphas, by layer.

    A row's noise is drawn from the null model, independent from expert to expert. It is tested
    under the null model as it is, which is the truth here; and under one that is fitted again from
    the drawn logits, signals among them, with the options of the model, as a null of real logits
    is: what trimming makes of the rate is the difference.

    Args:
        kde: the null model; an imported one is not fitted again.
        alphas: levels of BH, between 0 and 1.
        n_experts: experts per router.

    Returns:
        A row per layer, alpha and null ("as it is", "fitted again"): experts, the mean number
        rejected; fdr, the mean share of noise among the rejected, 0 where nothing is; power, the
        mean share of the signals that are rejected, null without signals; these two with their
        Monte Carlo standard errors.

    Raises:
        InvalidOption: an alpha or an option is out of range.
        KdeMismatch: the model is of another number of experts.
    """
    planted = planted or Planted()
    planted.check(n_experts)
    kde.require(kde, n_experts)
    if not alphas or not all(0 < alpha < 1 for alpha in alphas):
        raise InvalidOption("name alphas between 0 and 1")
    rng = np.random.default_rng(planted.seed)
    frames = []
    for layer in sorted(kde):
        logits, signal = _drawn(kde[layer], n_experts, planted, rng)
        for words, null in _nulls(kde, layer, logits).items():
            for alpha in alphas:
                rejected = _rejected(null, logits, alpha)
                row = {"layer": layer, "alpha": alpha, "null": words}
                frames.append(row | _rates(rejected, signal))
    return pl.DataFrame(frames, infer_schema_length=None)


def _drawn(
    null: LayerNull, n_experts: int, planted: Planted, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """(T, E) logits, and which of them carry a signal."""
    shape = planted.rows, n_experts
    uniform = rng.random(shape)
    curves = null.curves * n_experts if null.pooled else null.curves
    noise = np.stack([_quantile(c, uniform[:, i]) for i, c in enumerate(curves)], axis=1)
    signal = rng.random(shape).argsort(axis=1) < planted.signals
    spread = noise.std(axis=0) if not null.pooled else noise.std()
    return (noise + np.where(signal, planted.shift * spread, 0.0)).astype(np.float32), signal


def _quantile(curve: NullCurve, upper: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logits with these upper tails."""
    return np.interp(upper, curve.tail[::-1], curve.grid[::-1])


def _nulls(kde: KdeModel, layer: int, logits: NDArray[np.float32]) -> dict[str, LayerNull]:
    """The nulls that are tested under, by what they are called."""
    found = {AS_IT_IS: kde[layer]}
    try:
        options = options_of({layer: kde[layer]})
    except KdeMismatch:  # imported
        return found
    counting = options.accumulator()
    counting.update(layer, logits)
    fitted = fit_histograms(counting.histograms(), options, source=["simulation"])
    return {**found, FITTED_AGAIN: fitted[layer]}


def _rejected(null: LayerNull, logits: NDArray[np.float32], alpha: float) -> NDArray[np.bool_]:
    """(T, E): what BH rejects, without bounds."""
    E = logits.shape[1]
    decisions = null.decide(logits, null.thresholds(alpha, E), min_k=0, max_k=E)
    rejected = np.zeros(logits.shape, dtype=np.bool_)
    chosen = np.arange(E) < decisions.n_rejected[:, None]
    np.put_along_axis(rejected, decisions.order.astype(np.int64), chosen, axis=1)
    return rejected


def _rates(rejected: NDArray[np.bool_], signal: NDArray[np.bool_]) -> dict[str, float | None]:
    """Means over rows, with their standard errors."""
    found = rejected.sum(axis=1)
    false = (rejected & ~signal).sum(axis=1) / np.maximum(found, 1)
    values: dict[str, float | None] = {}
    parts = {"experts": found, "fdr": false}
    if signal.any():
        parts["power"] = (rejected & signal).sum(axis=1) / signal.sum(axis=1)
    for name in ("experts", "fdr", "power"):
        part = parts.get(name)
        values[name] = None if part is None else float(part.mean())
        if name != "experts":
            error = None if part is None else float(part.std(ddof=1) / np.sqrt(len(part)))
            values[f"{name}_se"] = error
    return values
