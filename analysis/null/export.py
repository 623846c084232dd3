"""A null model as plain numpy arrays, for programs that read no Parquet."""

from pathlib import Path
from typing import Any

import numpy as np

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.null.model import KdeModel


def export_npz(model: KdeModel, path: str | Path) -> None:
    """Write the grids and tails of a null model to an .npz file, whole or not at all.

    Arrays: layers, (L,) int64; x_{layer}, (G,) the grid in logits; tail_{layer}, (G,) S(x). With a
    curve per expert: x_{layer}_{expert}, tail_{layer}_{expert}.

    Raises:
        InvalidOption: the file cannot be written there.
    """
    arrays: dict[str, Any] = {"layers": np.array(sorted(model))}
    for layer, curve in model.curves:
        name = f"{layer}" if curve.expert is None else f"{layer}_{curve.expert}"
        arrays[f"x_{name}"] = curve.grid
        arrays[f"tail_{name}"] = curve.tail
    try:
        with whole_file(path) as file:
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise InvalidOption(f"{path}: cannot write arrays ({error.strerror})") from error
