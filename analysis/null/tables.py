"""Null models as tables."""

from dataclasses import asdict

import polars as pl

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.histogram import BIN_WIDTH
from bhlog.capture.contract.null.model import KdeModel


def curves_frame(
    model: KdeModel, alpha: float | None = None, n_experts: int | None = None
) -> pl.DataFrame:
    """One row per curve: what it was fitted from and how.

    Args:
        alpha: adds the thresholds t_1 and t_E at this BH level.
        n_experts: experts per router; None takes what the model was fitted for.

    Raises:
        InvalidOption: alpha outside (0, 1), or the model does not tell its experts.
        KdeMismatch: the model is for other experts.
    """
    E = model.n_experts if n_experts is None else n_experts
    if alpha is not None:
        if not 0 < alpha < 1:
            raise InvalidOption(f"alpha must be between 0 and 1, got {alpha}")
        if E is None:
            raise InvalidOption(
                "thresholds need the number of experts, which this null model does not tell: "
                "add --n-experts E"
            )
        model.require(model, E)
    rows = []
    for layer, curve in model.curves:
        histogram = curve.histogram
        row: dict[str, object] = {"layer": layer}
        if not model.pooled:
            row["expert"] = curve.expert
        row |= {
            "n": curve.n,
            "left_out": histogram.left_out if histogram else None,
            "lowest": histogram.lo if histogram else None,
            "highest": histogram.lo + BIN_WIDTH * (len(histogram.counts) - 1)
            if histogram
            else None,
            "trim": f"{curve.trim_low}:{curve.trim_high}",
            "kept": " ".join(f"{trim.low}:{trim.high}" for trim in sorted(curve.kept)) or None,
            "kernel": curve.kernel,
            "rule": curve.rule,
            "bandwidth": curve.bandwidth,
            "grid_points": len(curve.tail),
            "dx": curve.dx,
        }
        if model.centre != "none":
            row["centre"] = curve.centre
        if any(c.central for _, c in model.curves):
            found = curve.central
            row |= asdict(found) if found else dict.fromkeys(("delta0", "sigma0", "pi0"))
        if alpha is not None and E is not None:
            t = curve.thresholds(alpha, E)
            row |= {"t_1": float(t[0]), f"t_{E}": float(t[-1])}
        row["source"] = " ".join(_short(source) for source in curve.source) or None
        rows.append(row)
    schema = {"lowest": pl.Float64, "highest": pl.Float64, "kept": pl.String, "source": pl.String}
    schema |= {"left_out": pl.Int64, "bandwidth": pl.Float64}
    schema |= dict.fromkeys(("delta0", "sigma0", "pi0"), pl.Float64) if "pi0" in rows[0] else {}
    return pl.DataFrame(rows, schema_overrides=schema)


def _short(source: str) -> str:
    """The first 8 digits of a run's id; the name of an imported file as it is."""
    return source[:8] if len(source) == 32 else source
