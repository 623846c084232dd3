"""Threshold file: the float32 thresholds of the rule as safetensors, for any engine to apply."""

import json

import numpy as np

from bhlog.analysis.exports.wanted import Wanted
from bhlog.analysis.nulls import null_model
from bhlog.analysis.replay.settings import settings_of
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch


def thresholds(wanted: Wanted) -> bytes:
    """safetensors: `thresholds` (L, E) float32, t_1..t_E of each layer; `layers` (L,) int64.

    Its metadata, texts: alpha (0.3, or 0=0.1+1=0.3 by layer), min_k, max_k, centre ("none" or
    "median": what logits are less of before they are held against thresholds), temperature,
    renormalize ("true" or "false"), scoring, n_experts and kde_sha256. analysis/README.md has the
    twenty lines of torch that apply it.

    Raises:
        InvalidOption: no alpha and no number of experts.
        KdeMismatch: no null model, or one with a curve for each expert, whose order is that of
            p-values, which no thresholds tell.
    """
    log, alpha = wanted.log, wanted.decided()
    if alpha is None:
        raise InvalidOption("thresholds are of an alpha: give --alpha A or --experts K")
    kde = null_model(log, wanted.kde)
    if not kde.pooled:
        raise KdeMismatch(
            "the null model has a curve for each expert, which orders experts by p-value: "
            "thresholds alone do not decide; fit one pooled over experts, bhlog kde fit RUN"
        )
    (options,) = settings_of(log, [alpha], bounds=wanted.bounds)
    low, high = options.bounds(log.n_experts)
    model = log.manifest.model
    by_layer = [kde[layer].thresholds_of(options.named, log.n_experts) for layer in log.layers]
    values = np.stack(by_layer).astype("<f4")
    layers = np.array(log.layers, "<i8")
    renormalizes = options.renormalizes(model.norm_topk_prob)
    metadata = {
        "alpha": options.named.value_text,
        "min_k": str(low),
        "max_k": str(high),
        "centre": kde.centre,
        "temperature": repr(options.temperature),
        "renormalize": str(renormalizes).lower(),
        "scoring": model.scoring,
        "n_experts": str(log.n_experts),
        "kde_sha256": kde.sha256,
    }
    header = {
        "__metadata__": metadata,
        "thresholds": _entry("F32", values, 0),
        "layers": _entry("I64", layers, values.nbytes),
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + values.tobytes() + layers.tobytes()


def _entry(dtype: str, values: "np.ndarray[tuple[int, ...], np.dtype]", start: int) -> object:
    """A tensor's line in the header."""
    return {
        "dtype": dtype,
        "shape": list(values.shape),
        "data_offsets": [start, start + values.nbytes],
    }
