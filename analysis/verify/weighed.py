"""Weights and losses: whether they are such as the model could have given."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.log import Log, logits_of
from bhlog.analysis.replay.parts import replayed_weights
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.rule import BhOptions, Decisions

_ROUNDING = 1 / 32, 1e-3  # relative, absolute: models compute weights in bfloat16, too


def unlike_the_formula(
    log: Log, batch: pa.RecordBatch, experts: NDArray[np.uint16]
) -> NDArray[np.bool_]:
    """(T,) bool: rows of finite logits whose weights are not by the formula of the manifest.

    None of them where the manifest holds no formula. Rows with as many weights as experts only.

    Args:
        experts: (T, K), the logged lists side by side, each below n_experts.
    """
    model, logits = log.manifest.model, logits_of(batch)
    n = values_of(batch.column("n_selected"))
    if model.scoring not in ("softmax", "sigmoid"):
        return np.zeros(len(n), np.bool_)
    options = log.manifest.routing.options or BhOptions()
    found = np.zeros(experts.shape, np.float32)
    used = np.arange(experts.shape[1]) < n[:, None]
    found[used] = values_of(batch.column("weights").flatten())
    expected = replayed_weights(logits, Decisions(experts, n, n), options, model)
    relative, absolute = _ROUNDING
    close = np.isclose(found, expected, rtol=relative, atol=absolute)
    unlike = (used & ~close).any(axis=1) & np.isfinite(logits).all(axis=1)
    return np.asarray(unlike)


def not_finite(batch: pa.RecordBatch, finite: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(T,) bool: rows of finite logits with a weight that is NaN, infinite or negative.

    Args:
        finite: (T,), whether a row's logits are.
    """
    weights = batch.column("weights")
    flat = values_of(weights.flatten())
    odd = ~(np.isfinite(flat) & (flat >= 0))
    rows = np.repeat(np.arange(len(weights)), values_of(weights.value_lengths()))
    wrong = np.zeros(len(weights), np.bool_)
    wrong[rows[odd]] = True
    return np.asarray(wrong & finite)


def loss_remark(tokens: pa.Table) -> str | None:
    """What is odd about the losses of a tokens shard: NaN, infinite or below 0."""
    known = tokens["nll"].drop_null().to_numpy()
    odd = int((~np.isfinite(known)).sum() + (known < -1e-3).sum())
    return f"{odd:,} losses are NaN, infinite or below 0" if odd else None
