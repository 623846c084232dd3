"""The files that are fuzzed, small and of every kind, and how a stranger seals them again."""

import hashlib
import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bhlog.analysis.run import open_log
from bhlog.capture.contract.null.curve import NullCurve
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.opening import seal_of
from bhlog.capture.contract.rule import BhOptions
from tests.fuzz.traces import PATHS, make_traces
from tests.synthetic import normal_logits, normal_null, write_run

LAYERS, E, MAX_K = (0, 2), 8, 4
REPLAY = "run/replay/alpha-0.2_k-1-4"

# What each format changes, by patterns of files in the world.
FORMATS = {
    "routing": ("run/routing/*",),
    "tokens": ("run/tokens/*",),
    "manifest": ("run/run.json",),
    "null": ("null.parquet",),
    "profile": ("profile.parquet",),
    "pickle": ("pickles/*",),
    "replay": (f"{REPLAY}/*",),
    "folder": ("run/**/*",),
    **{format: (path, f"{path}/*") for format, path in PATHS.items()},
}
UNSEALED = ("null", "profile", "pickle", "manifest", *PATHS)  # formats without seals to make again


def make_world(root: Path) -> None:
    """A run routed by BH with a replay beside it; a null model, a profile, old pickles, traces."""
    kde = KdeModel({layer: _null(layer) for layer in LAYERS})
    shape = (len(LAYERS), 2, 12)
    logits = normal_logits(np.random.default_rng(0), int(np.prod(shape)), E).reshape(*shape, E)
    logits[0, 0, 3, :2] = np.nan, np.inf
    logits[1, 1, 5, 1:] = -np.inf
    write_run(
        root / "run",
        layers=LAYERS,
        n_experts=E,
        n_sequences=4,
        length=6,
        top_k=2,
        options=BhOptions(alpha=0.3, max_k=MAX_K),
        kde=kde,
        logits=logits,
        sealed=True,
    )
    run = open_log(root / "run")
    run.replay(0.2, out=root / "run" / "replay", threads=1)
    run.sweep(kept=True, alphas=np.geomspace(1e-3, 0.9, 20).tolist()).save(root / "profile.parquet")
    run.fit(FitOptions(bandwidth=1.0, keep=((0, 1),)), threads=1).save(root / "null.parquet")
    (root / "pickles").mkdir()
    x = np.linspace(-12, 12, 41)
    for layer, protocol in zip(LAYERS, (2, 4), strict=True):
        data = {"x": x, "cdf": 1 / (1 + np.exp(-x - layer))}
        name = f"distribution_model_layer_{layer}.pkl"
        (root / "pickles" / name).write_bytes(pickle.dumps(data, protocol))
    make_traces(root)


def _null(layer: int) -> LayerNull:
    """A curve of 97 points, so that files are small."""
    (curve,) = normal_null(layer).curves
    coarse = NullCurve(None, 500, curve.x0, curve.dx * 16, curve.tail[::16])
    return LayerNull(layer, (coarse,))


def sealed_json(data: dict[str, Any]) -> bytes:
    """A manifest or a list of parts with the checksum of what it says."""
    data = {key: value for key, value in data.items() if key != "checksum"}
    text = json.dumps(data, sort_keys=True, ensure_ascii=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps({**data, "checksum": checksum}, indent=1) + "\n").encode()


def seal_again(root: Path, *, totals: bool) -> None:
    """Make the run's manifest and its replay's list agree with the files that are there.

    Args:
        totals: whether counts of rows are made to agree too.
    """
    path = root / "run/run.json"
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        manifest = json.loads(path.read_bytes())
        for entry in manifest["shards"]:
            size = 0
            for folder, rows in (("routing", "rows"), ("tokens", "tokens")):
                file = root / "run" / folder / entry["name"]
                size += file.stat().st_size
                seal = _seal(file)
                if seal is not None:
                    entry[f"{folder}_seal"] = seal
                    if totals:
                        entry[rows] = seal["rows"]
            entry["bytes"] = size
        if totals:
            for name in ("rows", "tokens"):
                manifest["totals"][name] = sum(entry[name] for entry in manifest["shards"])
        path.write_bytes(sealed_json(manifest))
    parts = root / REPLAY / "_replay.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        listed = json.loads(parts.read_bytes())
        for name in listed["parts"]:
            listed["parts"][name] = _seal(parts.parent / name) or listed["parts"][name]
        parts.write_bytes(sealed_json(listed))


def _seal(path: Path) -> dict[str, Any] | None:
    try:
        return dict(vars(seal_of(path)))
    except (pa.ArrowException, OSError, ValueError):
        return None
