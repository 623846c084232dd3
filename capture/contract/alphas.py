"""Alphas by layer: a BH level for each layer, as text, as a mapping, or in a file.

Files are read where a user names them, see `expanded`; a text that a run holds never names one.
"""

import io
import json
from collections.abc import Iterable, Mapping
from errno import EINVAL
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from bhlog.capture.contract.errors import InvalidOption

ByLayer = tuple[tuple[int, float], ...]  # (layer, alpha), layers rising

MOST_FILE_BYTES = 1 << 24
_EXPECTED = "expected what bhlog sweep RUN --experts K --per-layer --out FILE writes"


def by_layer(alphas: Mapping[int, float] | Iterable[tuple[int, float]]) -> ByLayer:
    """Alphas in the order of their layers.

    Raises:
        InvalidOption: there are none, a layer is there twice, or is none, or an alpha is out of
            range.
    """
    pairs = [*(alphas.items() if isinstance(alphas, Mapping) else alphas)]
    if not pairs or len({layer for layer, _ in pairs}) < len(pairs):
        raise InvalidOption("alphas by layer need one alpha for each layer, and no layer twice")
    for layer, alpha in pairs:
        if not (isinstance(layer, int) and 0 <= layer < 1 << 16 and 0 < float(alpha) < 1):
            raise InvalidOption(
                f"layer {layer} has alpha {alpha}; expected layers from 0 and alphas between 0 and "
                "1"
            )
    return tuple(sorted((layer, float(alpha)) for layer, alpha in pairs))


def text_of(alphas: ByLayer) -> str:
    """0=0.1+2=0.3, exact."""
    return "+".join(f"{layer}={alpha!r}" for layer, alpha in alphas)


def read_text(text: str) -> ByLayer:
    """From 0=0.1+2=0.3.

    Raises:
        InvalidOption: it is something else.
    """
    pairs = []
    for part in text.split("+"):
        layer, _, alpha = part.partition("=")
        try:
            pairs.append((int(layer), float(alpha)))
        except ValueError:
            raise InvalidOption(
                f"alphas by layer are LAYER=ALPHA+LAYER=ALPHA, got '{text}'"
            ) from None
    return by_layer(pairs)


def expanded(policy: str) -> str:
    """The text of a policy, bh:@FILE with the alphas of the file in its place.

    Raises:
        InvalidOption: see read_file.
    """
    head, comma, rest = policy.partition(",")
    name, at, path = head.partition(":@")
    return f"{name}:{text_of(read_file(path.strip()))}{comma}{rest}" if at else policy


def read_file(path: str | Path) -> ByLayer:
    """From a JSON, CSV or Parquet file with the columns layer and alpha, or {"0": 0.1, ...}.

    A row without a layer, which is over all of them, is passed over.

    Raises:
        InvalidOption: it cannot be read or holds something else.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # a FIFO would wait for ever
            raise OSError(EINVAL, "not a file")
        with Path(path).open("rb") as file:
            data = file.read(MOST_FILE_BYTES + 1)
        if len(data) > MOST_FILE_BYTES:
            raise ValueError(f"larger than {MOST_FILE_BYTES >> 20} MiB")
        return by_layer(_pairs(data))
    except OSError as error:
        raise InvalidOption(
            f"{path}: alphas cannot be read from it ({error.strerror or error}); give a number or "
            "the file of an alpha for each layer"
        ) from error
    except InvalidOption as error:
        raise InvalidOption(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__  # Arrow's too
        raise InvalidOption(f"{path}: no alphas by layer ({why}); {_EXPECTED}") from error


def _pairs(data: bytes) -> Iterable[tuple[int, float]]:
    if data[:4] == b"PAR1":
        rows = pq.read_table(pa.BufferReader(data), columns=["layer", "alpha"]).to_pylist()
    elif data.lstrip()[:1] in (b"{", b"["):
        found: Any = json.loads(data)
        if isinstance(found, dict):
            return [(int(layer), float(alpha)) for layer, alpha in found.items()]
        rows = found
    else:
        rows = pa_csv.read_csv(io.BytesIO(data)).to_pylist()
    whole = [row for row in rows if row["layer"] is not None]
    return [(int(row["layer"]), float(row["alpha"])) for row in whole]
