"""Compiled functions: plain loops over typed arrays that Numba turns into machine code.

They run without the interpreter lock, so the threads of a fold work side by side. The first call on
a machine compiles, which takes seconds; later processes load the result from a cache, beside this
file or, where that cannot be written, in the user's cache folder.

An int32 sum is wrapped in int32() at every step: Numba widens int32 + int32 to int64, which halves
what a vector instruction does.
"""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from numba import njit

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function, compiled for the types it is first called with."""
    return _compile(function)


def compiled_sums(function: Callable[P, R]) -> Callable[P, R]:
    """The same, but floats are summed in any order, and a * b + c is rounded once."""
    return _compile(function, fastmath={"contract", "nsz", "reassoc"})


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """The same, but part of its caller, which knows that its scratch rows do not overlap."""
    return _compile(function, inline="always")


def _compile(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    try:
        ready = njit(nogil=True, cache=True, error_model="numpy", **options)(function)
    except RuntimeError:  # no folder to cache in
        ready = njit(nogil=True, error_model="numpy", **options)(function)
    return cast(Callable[P, R], ready)
