"""The key-value cache of a generation: which argument it is, how long it is, what is done to it."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from bhlog.capture.contract.errors import UnknownIdentity

Changed = Callable[[Any, str, Any], None]  # a cache, its method that was called, and its argument


def find_cache(values: Iterable[Any]) -> Any:
    """The cache among a model's arguments or outputs, or None.

    It is known by what it can do: versions of transformers call it past_key_values or cache.

    Raises:
        UnknownIdentity: there are several.
    """
    found = {id(value): value for value in values if hasattr(value, "get_seq_length")}
    if len(found) > 1:
        raise UnknownIdentity(
            f"the model has {len(found)} caches at once, and which of them holds its sequences is "
            "not known; pass one"
        )
    return next(iter(found.values()), None)


def is_tuple_cache(value: Any) -> bool:
    """Whether an argument is a cache as older models took it: tensors of each layer in tuples."""
    first = value[0] if isinstance(value, tuple | list) and value else None
    return isinstance(first, tuple | list) and bool(first) and isinstance(first[0], Tensor)


def cache_length(cache: Any, known: int | None = None) -> int:
    """Columns in the cache; where the device alone knows, and it is `known`, it is not asked."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    if isinstance(length, Tensor) and known is not None:
        return known
    return int(length)


def watch(cache: Any, changed: Changed) -> None:
    """Call a bound method after each call that cuts, empties or reorders the cache, until unwatch.

    The method is held weakly, and so is the cache.
    """
    for name in _METHODS:
        if hasattr(cache, name) and not isinstance(vars(cache).get(name), _Watched):
            setattr(cache, name, _Watched(changed, cache, name))


def unwatch(cache: Any) -> None:
    """Give the cache its own methods back."""
    for name in _METHODS:
        watched = vars(cache).get(name)
        if isinstance(watched, _Watched):
            watched.remove(cache)


_METHODS = ("reorder_cache", "crop", "reset", "batch_repeat_interleave", "batch_select_indices")


class _Watched:
    """A cache's method that tells when it was called.

    It refers to its cache weakly, so that the cache is freed as soon as its user drops it; copying
    or pickling the cache gives the copy its own, plain method.
    """

    def __init__(self, changed: Changed, cache: Any, name: str) -> None:
        self._changed = weakref.WeakMethod(changed)
        self._cache = weakref.ref(cache)
        self._name = name
        self._own = vars(cache).get(name)  # set on the instance by someone else

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._cache()
        method = self._own or getattr(type(cache), self._name).__get__(cache)
        result = method(*args, **kwargs)
        changed = self._changed()
        if changed is not None:
            changed(cache, self._name, next(iter([*args, *kwargs.values()]), None))
        return result

    def __reduce__(self) -> Any:
        return getattr, (self._cache(), self._name)

    def remove(self, cache: Any) -> None:
        """Put the cache's method back as it was."""
        if self._own is None:
            del vars(cache)[self._name]
        else:
            setattr(cache, self._name, self._own)
