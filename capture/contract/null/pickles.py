"""Reader of null models that older projects pickled, which can run no code.

A pickle is a program that may name and call anything. Of its instructions this reader knows those
that a dictionary of numpy arrays needs, and whatever they name and call is a stand-in of this
module: numpy itself is never imported or called by a pickle. An array is rebuilt from its shape,
its number format and its bytes.
"""

import errno
import io
import pickle
import pickletools
import re
import reprlib
import struct
from collections.abc import Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import CorruptKde, KdeMismatch, UnsafePickle, one_line
from bhlog.capture.contract.null.curve import NullCurve
from bhlog.capture.contract.null.layer import LayerNull
from bhlog.capture.contract.null.model import KdeModel

FILE_NAME = re.compile(r"distribution_model_layer_(?P<layer>\d+)(?:_(?P<variant>.+))?\.pkl")

MOST_BYTES = 1 << 26  # of a pickle; those of older projects hold two arrays of 10,000 values
_MOST_INSTRUCTIONS = 5000  # of a pickle, which needs some 30 an array; nesting ends there too
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_NEEDED = {
    *("PROTO", "FRAME", "STOP", "MARK", "REDUCE", "BUILD", "GLOBAL", "STACK_GLOBAL"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
    *("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
}


def load_kde_models(path: str | Path, *, variant: str | None = None) -> KdeModel:
    """Read a null model: our file, or a folder of pickles of older projects.

    Args:
        path: a null model file, or a folder with distribution_model_layer_{i}[_variant].pkl.
        variant: which pickles of the folder, such as "trimmed_4"; None means those without one.

    Returns:
        A mapping from layer to its null; an item answers ["x"] and ["cdf"].

    Raises:
        CorruptKde: nothing there, or not a null model.
        KdeMismatch: the folder has no such variant.
        UnsafePickle: a pickle names something other than numpy arrays; nothing of it was run.
    """
    path = Path(path)
    if not path.is_dir():
        return KdeModel.load(path)
    found: dict[str | None, dict[int, Path]] = {}
    for file in sorted(path.iterdir()):
        match = FILE_NAME.fullmatch(file.name)
        if match:
            found.setdefault(match["variant"], {})[int(match["layer"])] = file
    if not found:
        raise CorruptKde(f"{path}: no distribution_model_layer_{{i}}.pkl in this folder")
    if variant not in found:
        names = ", ".join(sorted(name for name in found if name is not None)) or "none"
        wanted = "no pickles without a variant" if variant is None else f"no variant {variant!r}"
        raise KdeMismatch(f"{path}: {wanted}; variants here: {names}")
    return KdeModel(
        {layer: LayerNull(layer, (read_curve(file),)) for layer, file in found[variant].items()}
    )


def read_curve(path: Path) -> NullCurve:
    """The pooled null of one pickle holding {"x": (G,), "cdf": (G,)}.

    Its tail is 1 - cdf, so p-values below about 1e-16 are gone; a refit needs a log.

    Raises:
        CorruptKde: not a pickle of that, x is not an even grid, or cdf does not rise from 0 to 1.
        UnsafePickle: it names something other than numpy arrays.
    """
    try:
        if path.exists() and not path.is_file():  # a FIFO would wait for ever
            raise OSError(errno.EINVAL, "not a file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise CorruptKde(f"{path}: cannot be read ({error.strerror})") from error
    return curve_of(read_arrays(data, str(path)), str(path), source=path.name)


def curve_of(arrays: Mapping[str, NDArray[Any]], name: str, *, source: str) -> NullCurve:
    """The pooled null that x and cdf stand for, as older projects kept it.

    Args:
        arrays: "x" (G,), an even grid of logits, and "cdf" (G,), P(logit <= x).
        name: says in errors where they came from.
        source: of the curve.

    Raises:
        CorruptKde: one is missing, x is not an even grid, or cdf does not rise from 0 to 1.
    """
    for key in ("x", "cdf"):
        if key not in arrays:
            raise CorruptKde(f"{name}: holds {reprlib.repr(list(arrays))}; expected x and cdf")
    x, cdf = (arrays[key].astype(np.float64) for key in ("x", "cdf"))
    if x.ndim != 1 or x.shape != cdf.shape or len(x) < 2:
        raise CorruptKde(f"{name}: x has shape {x.shape}, cdf {cdf.shape}; expected two alike")
    if not (np.isfinite(x).all() and np.isfinite(cdf).all()):
        raise CorruptKde(f"{name}: x or cdf holds NaN or infinity")
    dx = (x[-1] - x[0]) / (len(x) - 1)
    digits = np.finfo(arrays["x"].dtype).eps if arrays["x"].dtype.kind == "f" else 0.0
    if not dx > 0 or np.abs(np.diff(x) - dx).max() > 1e-6 * dx + 4 * digits * np.abs(x).max():
        raise CorruptKde(f"{name}: x is not an even rising grid")
    rounding = 1e-9  # sums that made old CDFs overshoot and waver in their last digits
    if cdf.min() < -rounding or cdf.max() > 1 + rounding or np.diff(cdf).min() < -rounding:
        raise CorruptKde(f"{name}: cdf does not rise from 0 to 1")
    tail = 1.0 - np.clip(np.maximum.accumulate(cdf), 0.0, 1.0)
    return NullCurve(expert=None, n=0, x0=float(x[0]), dx=float(dx), tail=tail, source=(source,))


def read_arrays(data: bytes, name: str) -> dict[str, NDArray[Any]]:
    """The numeric arrays of a pickled dictionary, by key; nothing of the pickle is run.

    Args:
        data: the pickle, protocol 0 to 5.
        name: says in errors where it came from.

    Raises:
        CorruptKde: cut short, too large, or no dictionary of arrays.
        UnsafePickle: it names or asks for something that arrays do not need.
    """
    try:
        if len(data) > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
        # goes through without doing anything: whatever lengths it claims are there, and it ends
        if len(list(islice(pickletools.genops(data), _MOST_INSTRUCTIONS))) == _MOST_INSTRUCTIONS:
            raise ValueError("it has more instructions than arrays need")
        result = _Reader(data).load()
    except UnsafePickle as error:
        raise UnsafePickle(f"{name}: {error}; nothing of it was run") from None
    except _DAMAGED as error:
        raise CorruptKde(
            f"{name}: not a whole pickle of numpy arrays ({one_line(str(error), 100)})"
        ) from error
    if not isinstance(result, dict):
        raise CorruptKde(f"{name}: holds no dictionary; expected x and cdf")
    arrays: dict[str, NDArray[Any]] = {}
    for key, value in result.items():
        if not isinstance(value, _Array) or value.values is None:
            raise CorruptKde(f"{name}: {reprlib.repr(key)} is no numpy array")
        arrays[key] = value.values
    return arrays


_DAMAGED = (
    *(pickle.UnpicklingError, ValueError, LookupError, TypeError, AttributeError),
    *(OverflowError, EOFError, RecursionError, struct.error),
)


_PLAIN = [None, None, None, -1, -1, 0]  # of a format's state: numbers and nothing else


class _Dtype:
    """Stands for a number format."""

    def __init__(self, code: Any, *flags: Any) -> None:
        if len(flags) > 2 or any(flag not in (0, 1) for flag in flags):  # align, copy
            raise ValueError(f"a number format has the flags {reprlib.repr(flags)}")
        text = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(text, str) or not _NUMBERS.fullmatch(text):
            raise ValueError(f"an array holds {reprlib.repr(text)}, which are no plain numbers")
        self.numpy = np.dtype(text)

    def fill(self, state: Any) -> None:
        version, order, *rest = state
        if version != 3 or rest != _PLAIN:  # what fields, a subarray or an object would be told in
            raise ValueError(f"a number format has the state {reprlib.repr(state)}")
        order = order.decode("latin1") if isinstance(order, bytes) else order
        if order not in ("<", ">", "=", "|"):
            raise ValueError(f"byte order {reprlib.repr(order)}")
        self.numpy = self.numpy.newbyteorder("=" if order == "|" else order)  # type: ignore[arg-type]


class _Array:
    """Stands for an array, of its own memory once it is filled."""

    values: NDArray[Any] | None = None

    def fill(self, state: Any) -> None:
        version, shape, dtype, fortran, raw = state
        if version != 1:
            raise ValueError(f"an array of version {reprlib.repr(version)}")
        if not isinstance(dtype, _Dtype) or not isinstance(raw, str | bytes | bytearray):
            raise ValueError("an array has no number format or no bytes")
        values = np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, dtype.numpy)
        sizes = (shape,) if isinstance(shape, int) else tuple(int(size) for size in shape)
        if any(size < 0 for size in sizes):
            raise ValueError(f"an array has shape {sizes}")
        shaped = values.reshape(sizes, order="F" if fortran else "C")
        self.values = shaped.astype(values.dtype.newbyteorder("="))


def _encoded(text: Any, encoding: Any) -> bytes:
    """How protocols 0 to 2 write bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError(f"bytes are {type(text).__name__} encoded as {reprlib.repr(encoding)}")
    return text.encode("latin1")


def _empty(kind: None, shape: Any, code: Any) -> _Array:
    """How protocols 0 to 4 begin an array: with none of its values."""
    if shape != (0,) or code not in (b"b", "b"):
        raise ValueError(f"an array begins as {reprlib.repr((shape, code))}")
    return _Array()


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """How protocol 5 writes an array."""
    array = _Array()
    array.fill((1, shape, dtype, order == "F", raw))
    return array


# What pickled arrays name, in numpy 1 and 2, which renamed numpy.core to numpy._core.
_KNOWN: dict[str, Any] = {
    "numpy.ndarray": None,  # named as an argument, never called
    "numpy.dtype": _Dtype,
    "_codecs.encode": _encoded,
} | {
    f"{core}.{name}": called
    for core in ("numpy.core", "numpy._core")
    for name, called in {
        "multiarray._reconstruct": _empty,
        "numeric._frombuffer": _from_buffer,
    }.items()
}


class _Reader(pickle._Unpickler):  # that in C allocates what a pickle claims to hold
    """Steps through a pickle: nothing is called but the stand-ins, nothing changed but them."""

    stack: list[Any]

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._left = 4 * len(data)  # bytes that arrays may hold; a stretch can be asked for often

    def find_class(self, module: str, name: str) -> Any:
        found = f"{module}.{name}"
        if found not in _KNOWN:
            raise UnsafePickle(
                f"names {one_line(found, 100)}; only numpy arrays are read from pickles"
            )
        return _KNOWN[found]

    def call(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.stack[-1](*arguments)
        self._spend(self.stack[-1])

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _Dtype | _Array):
            raise ValueError("it changes something that is no array")
        target.fill(state)
        self._spend(target)

    def _spend(self, made: Any) -> None:
        values = made.values if isinstance(made, _Array) else made
        self._left -= values.nbytes if isinstance(values, np.ndarray) else 0
        self._left -= len(values) if isinstance(values, bytes) else 0
        if self._left < 0:
            raise ValueError("its arrays hold more than the file does")

    def refuse(self, instruction: str) -> None:
        raise UnsafePickle(
            f"uses the pickle instruction {instruction}, which numpy arrays do not need"
        )


_OWN: dict[str, Any] = {"REDUCE": _Reader.call, "BUILD": _Reader.build}
_STEPS: dict[int, Any] = {
    ord(op.code): _OWN.get(op.name, pickle._Unpickler.dispatch[ord(op.code)])
    if op.name in _NEEDED
    else partial(_Reader.refuse, instruction=op.name)
    for op in pickletools.opcodes
}
_Reader.dispatch = _STEPS
