"""numpy: a folder of logits, router_logits_L{l}.npy of (tokens, experts) for each decoder layer l.

Also what is in a .npy file for other readers: its bytes in place, whatever its header claims, and
never a pickle.
"""

import ast
import io
import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import ArrayLike, NDArray

from bhlog.analysis.engines.trace import Told, Trace, blocks_of, regular
from bhlog.analysis.engines.writing import write_trace
from bhlog.analysis.run import Run
from bhlog.capture.contract.errors import CorruptTrace, InvalidOption

ByLayer = ArrayLike | Mapping[int, ArrayLike]

_NAME = re.compile(r"router_logits_L(\d{1,5})\.npy")
_MOST_HEADER = 1 << 12
_LENGTH = {(1, 0): 2, (2, 0): 4}  # bytes of a header's length, by the format's version


def array_of(data: bytes | mmap.mmap, where: object, kinds: str) -> NDArray[Any]:
    """The array of a .npy file, without a copy.

    Args:
        data: the file's bytes.
        where: the file, for errors.
        kinds: of numpy's dtypes, those that will do, such as "iu".

    Raises:
        CorruptTrace: it is none, of another kind, or has more or fewer bytes than its header says.
    """
    start = io.BytesIO(data[:_MOST_HEADER])
    try:
        length = start.read(_LENGTH[npy.read_magic(start)])
        facts = ast.literal_eval(start.read(int.from_bytes(length, "little")).decode("latin1"))
        shape, dtype, fortran = facts["shape"], np.dtype(facts["descr"]), facts["fortran_order"]
        n = math.prod(shape)
    except (ValueError, SyntaxError, TypeError, LookupError, MemoryError, RecursionError) as error:
        raise CorruptTrace(f"{where}: no header of a .npy file that is read") from error
    size = len(data) - start.tell()
    rows = fortran is False and all(type(k) is int and k >= 0 for k in shape)
    if dtype.kind not in kinds or not rows or len(facts) != 3:
        raise CorruptTrace(f"{where}: {dtype} {shape}; expected rows in C order, of kind {kinds}")
    if n * dtype.itemsize != size:
        raise CorruptTrace(f"{where}: {size:,} bytes for {dtype} {shape}: it is cut off or damaged")
    return np.frombuffer(data, dtype, n, start.tell()).reshape(shape)


def mapped(path: Path) -> bytes | mmap.mmap:
    """The bytes of a file, read as they are looked at."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read(path: Path, told: Told) -> Trace:
    """A folder; all tokens are one text. Float64 is rounded to float32: how many values is noted.

    Raises:
        CorruptTrace: a file is none of floats, or they differ in their tokens or experts.
    """
    names = sorted(entry.name for entry in path.iterdir())
    found = {int(match[1]): match[0] for match in map(_NAME.fullmatch, names) if match}
    logits = {
        layer: array_of(mapped(regular(path, name)), path / name, "f")
        for layer, name in sorted(found.items())
    }
    if not found:
        raise CorruptTrace(f"{path}: no file router_logits_L0.npy, or of another layer, is in it")
    return of_arrays("numpy", path, told, logits)


def of_arrays(
    engine: str,
    where: object,
    told: Told,
    logits: Mapping[int, NDArray[Any]] | None = None,
    experts: Mapping[int, NDArray[Any]] | None = None,
    weights: Mapping[int, NDArray[Any]] | None = None,
    columns: Mapping[str, NDArray[Any]] = {},
) -> Trace:
    """A trace from arrays by layer: (T, E) logits, or (T, K) experts and, if known, weights.

    Args:
        columns: of Block, (T,) each.
    """
    given = [arrays for arrays in (logits, experts, weights) if arrays is not None]
    if not given or any({*arrays} != {*given[0]} for arrays in given):
        raise InvalidOption(f"{where}: expected logits or experts, of the same layers")
    shapes = [{array.shape for array in arrays.values()} for arrays in given]
    T = {shape[:1] for alike in shapes for shape in alike}
    odd = any(len(alike) != 1 or len(min(alike)) != 2 for alike in shapes) or len(T) > 1
    if odd or (experts and weights and shapes[-1] != shapes[-2]):
        raise CorruptTrace(
            f"{where}: arrays of {', '.join(map(str, sorted(set.union(*shapes))))}; expected "
            "(tokens, experts), as many at each layer"
        )
    width = min(shapes[-1])[1]
    model = told.info(
        where,
        layers=tuple(sorted(given[0])),
        n_experts=None if logits is None else min(shapes[0])[1],
        top_k=None if experts is None else width,
    )
    by_layer = [None if of is None else [of[layer] for layer in model.layers]
                for of in (logits, experts, weights)]  # fmt: skip
    noted: dict[str, Any] = {}
    blocks = blocks_of(str(where), model, *by_layer, columns=columns, noted=noted)
    return Trace(engine, model, blocks, logits is not None, noted)


def write_run(
    out: str | Path,
    logits: ByLayer | None = None,
    *,
    experts: ByLayer | None = None,
    weights: ByLayer | None = None,
    expert_bytes: Mapping[int, int] | None = None,
    engine: str = "python",
    layers: tuple[int, ...] | None = None,
    n_experts: int | None = None,
    top_k: int | None = None,
    model: str | None = None,
    norm_topk_prob: bool = False,
    scoring: str = "softmax",
    **columns: ArrayLike,
) -> Run:
    """Write arrays as a run, whole or not at all, and open it.

    Args:
        out: the run's folder: not there, or empty.
        logits: (L, T, E) router outputs before the softmax, or (T, E) by layer; None: a run of
            experts alone.
        experts: (L, T, K), or (T, K) by layer, by falling choice; None: the top_k largest logits.
        weights: beside experts; None: by the model's formula where there are logits, else equal.
        expert_bytes: of an expert by layer, for caches.
        engine: what made them.
        layers: decoder layers of (L, ...) arrays, rising; None: from 0.
        n_experts, top_k: where the arrays do not tell.
        model: its name.
        norm_topk_prob, scoring: how it makes weights, as in the manifest.
        columns: (T,) sequence, position, forward, token_id (-1: unknown) and decode (bool); left
            out, tokens are one text, and a text is one forward, in order.

    Raises:
        RunExists: the folder is not empty.
        InvalidOption: something is missing, or at odds.
        CorruptTrace: a row is none that a router can have made.
    """
    told = Told(None, n_experts, top_k, model, norm_topk_prob, scoring)
    held, chosen, weighed = (_by_layer(given, layers) for given in (logits, experts, weights))
    unknown = {*columns} - {"sequence", "position", "forward", "token_id", "decode"}
    if unknown:
        raise InvalidOption(f"{out}: no column {min(unknown)}")
    given = {name: np.asarray(values) for name, values in columns.items()}
    trace = of_arrays(engine, out, told, held, chosen, weighed, given)
    if expert_bytes:
        trace.noted["expert_bytes"] = {str(layer): size for layer, size in expert_bytes.items()}
    write_trace(trace, out)
    return Run(out)


def _by_layer(
    arrays: ByLayer | None, layers: tuple[int, ...] | None
) -> dict[int, NDArray[Any]] | None:
    if arrays is None:
        return None
    if not isinstance(arrays, Mapping):
        whole = np.asarray(arrays)
        names = tuple(range(len(whole))) if layers is None else layers
        if len(names) != len(whole):
            raise InvalidOption(f"{len(whole)} layers of arrays, layers has {len(names)}")
        arrays = dict(zip(names, whole, strict=True))
    return {layer: np.asarray(array) for layer, array in arrays.items()}
