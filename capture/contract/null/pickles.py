"""Reader of null models that older projects pickled, which can run no code.

A pickle is a program that may name and call anything. This reader steps through it itself, knows
the few instructions that a dictionary of numpy arrays needs, and imports and calls nothing: an
array is rebuilt from its shape, its number format and its bytes.
"""

import pickletools
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import CorruptKde, KdeMismatch, UnsafePickle
from bhlog.capture.contract.null.model import KdeModel, LayerNull, NullCurve

FILE_NAME = re.compile(r"distribution_model_layer_(?P<layer>\d+)(?:_(?P<variant>.+))?\.pkl")

# What pickled arrays name, in numpy 1 and 2; numpy 2 renamed numpy.core to numpy._core.
_NAMES = {
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "_codecs encode": "encode",  # how protocols 0 to 2 write bytes
} | {
    f"{core}.{module} {name}": name
    for core in ("numpy.core", "numpy._core")
    for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
}
_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_MARK = object()


@dataclass(frozen=True)
class _Name:
    """Stands for what a pickle names; it is never imported."""

    name: str


@dataclass
class _Dtype:
    code: str
    order: str = "="

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


@dataclass
class _Array:
    """An array under construction; filled by the pickle's BUILD instruction."""

    array: NDArray[Any] | None = None


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
        data = path.read_bytes()
    except OSError as error:
        raise CorruptKde(f"{path}: cannot be read ({error.strerror})") from error
    arrays = read_arrays(data, str(path))
    for key in ("x", "cdf"):
        if key not in arrays:
            raise CorruptKde(f"{path}: holds {reprlib.repr(list(arrays))}; expected x and cdf")
    x, cdf = (arrays[key].astype(np.float64) for key in ("x", "cdf"))
    if x.ndim != 1 or x.shape != cdf.shape or len(x) < 2:
        raise CorruptKde(f"{path}: x has shape {x.shape}, cdf {cdf.shape}; expected two alike")
    if not (np.isfinite(x).all() and np.isfinite(cdf).all()):
        raise CorruptKde(f"{path}: x or cdf holds NaN or infinity")
    dx = (x[-1] - x[0]) / (len(x) - 1)
    digits = np.finfo(arrays["x"].dtype).eps if arrays["x"].dtype.kind == "f" else 0.0
    if not dx > 0 or np.abs(np.diff(x) - dx).max() > 1e-6 * dx + 4 * digits * np.abs(x).max():
        raise CorruptKde(f"{path}: x is not an even rising grid")
    rounding = 1e-9  # sums that made old CDFs overshoot and waver in their last digits
    if cdf.min() < -rounding or cdf.max() > 1 + rounding or np.diff(cdf).min() < -rounding:
        raise CorruptKde(f"{path}: cdf does not rise from 0 to 1")
    tail = 1.0 - np.clip(np.maximum.accumulate(cdf), 0.0, 1.0)
    return NullCurve(expert=None, n=0, x0=float(x[0]), dx=float(dx), tail=tail, source=(path.name,))


def read_arrays(data: bytes, name: str) -> dict[str, NDArray[Any]]:
    """The numeric arrays of a pickled dictionary, by key; nothing of the pickle is run.

    Args:
        data: the pickle, protocol 0 to 5.
        name: says in errors where it came from.

    Raises:
        CorruptKde: cut short, or no dictionary of arrays.
        UnsafePickle: it names or asks for something that arrays do not need.
    """
    try:
        result = _run(data, name)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise CorruptKde(
            f"{name}: not a whole pickle of numpy arrays ({_one_line(str(error))})"
        ) from error
    if not isinstance(result, Mapping):
        raise CorruptKde(f"{name}: holds no dictionary; expected x and cdf")
    arrays: dict[str, NDArray[Any]] = {}
    for key, value in result.items():
        if not isinstance(value, _Array) or value.array is None:
            raise CorruptKde(f"{name}: {reprlib.repr(key)} is no numpy array")
        arrays[key] = value.array
    return arrays


def _run(data: bytes, name: str) -> Any:
    """Step through a pickle on a stack of plain values and the stand-ins above."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    made = 0  # bytes of arrays

    def since_mark() -> list[Any]:
        at = next((i for i in reversed(range(len(stack))) if stack[i] is _MARK), -1)
        if at < 0:
            raise ValueError("a mark is missing")
        items = stack[at + 1 :]
        del stack[at:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        op = opcode.name
        if op == "STOP":
            return stack.pop()
        if op in ("PROTO", "FRAME"):
            pass
        elif op in _LITERALS:
            stack.append(argument)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op == "MARK":
            stack.append(_MARK)
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])
        elif op == "TUPLE":
            stack.append(tuple(since_mark()))
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(op[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif op == "DICT":
            stack.append(_pairs(since_mark()))
        elif op == "SETITEM":
            pair = stack[-2:]
            del stack[-2:]
            stack[-1].update(_pairs(pair))
        elif op == "SETITEMS":
            pairs = _pairs(since_mark())
            stack[-1].update(pairs)
        elif op == "GLOBAL":
            stack.append(_named(argument, name))
        elif op == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not (isinstance(attribute, str) and isinstance(module, str)):
                raise ValueError("it names something by no text")
            stack.append(_named(f"{module} {attribute}", name))
        elif op == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_rebuild(called, arguments))
            made += _n_bytes(stack[-1])
        elif op == "BUILD":
            state = stack.pop()
            _fill(stack[-1], state)
            made += _n_bytes(stack[-1])
        else:
            raise UnsafePickle(
                f"{name}: uses the pickle instruction {op}, which numpy arrays do not need; "
                "nothing of it was run"
            )
        if made > 4 * len(data):  # one stretch of bytes, asked for again and again
            raise ValueError("its arrays hold more than the file does")
    raise ValueError("it has no end")


def _n_bytes(value: Any) -> int:
    """Memory of a value that a pickle asked for."""
    if isinstance(value, _Array):
        return 0 if value.array is None else value.array.nbytes
    return len(value) if isinstance(value, bytes) else 0


_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_LITERALS |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_LITERALS |= {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY: dict[str, type] = {"EMPTY_DICT": dict}


def _one_line(text: str) -> str:
    """A stranger's text, fit for an error message."""
    return repr(text[:100])[1:-1]


def _pairs(items: list[Any]) -> dict[str, Any]:
    """A dictionary of keys and values in turn; keys are text: a nested one could exhaust hash()."""
    if not all(isinstance(key, str) for key in items[::2]):
        raise ValueError("a key is no text")
    return dict(zip(items[::2], items[1::2], strict=True))


def _named(found: str, name: str) -> _Name:
    if found not in _NAMES:
        raise UnsafePickle(
            f"{name}: names {_one_line(found.replace(' ', '.'))}; only numpy arrays are read from "
            "pickles, and nothing of it was run"
        )
    return _Name(_NAMES[found])


def _rebuild(called: Any, arguments: Any) -> Any:
    """What a call of a named thing would have given, for the few that arrays need."""
    if called == _Name("_reconstruct"):
        return _Array()
    if called == _Name("dtype"):
        return _Dtype(_number_format(arguments[0]))
    if called == _Name("encode"):
        text, encoding = arguments
        if encoding != "latin1":
            raise ValueError(f"bytes are encoded as {reprlib.repr(encoding)}")
        return _raw(text)
    if called == _Name("_frombuffer"):
        raw, dtype, shape, order = arguments
        return _Array(_from_bytes(raw, dtype, shape, fortran=order == "F"))
    raise ValueError("it calls something that is no function")


def _fill(target: Any, state: Any) -> None:
    if isinstance(target, _Dtype):
        target.order = "=" if state[1] == "|" else _byte_order(state[1])
    elif isinstance(target, _Array):
        _, shape, dtype, fortran, raw = state
        target.array = _from_bytes(raw, dtype, shape, fortran=bool(fortran))
    else:
        raise ValueError("it changes something that is no array")


def _number_format(code: Any) -> str:
    if isinstance(code, bytes):
        code = code.decode("latin1")
    if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
        raise ValueError(f"an array holds {reprlib.repr(code)}, which are no plain numbers")
    return code


def _byte_order(order: Any) -> str:
    text = order.decode("latin1") if isinstance(order, bytes) else order
    if text not in ("<", ">", "="):
        raise ValueError(f"byte order {reprlib.repr(order)}")
    return str(text)


def _raw(data: Any) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _from_bytes(raw: Any, dtype: Any, shape: Any, *, fortran: bool) -> NDArray[Any]:
    """An array of its own memory; the bytes must fill the shape exactly."""
    if not isinstance(dtype, _Dtype) or not isinstance(raw, str | bytes | bytearray):
        raise ValueError("an array has no number format or no bytes")
    values = np.frombuffer(_raw(raw), dtype=dtype.numpy)
    sizes = (shape,) if isinstance(shape, int) else tuple(int(size) for size in shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"an array has shape {sizes}")
    return values.reshape(sizes, order="F" if fortran else "C").astype(
        values.dtype.newbyteorder("=")
    )
