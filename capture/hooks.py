"""Hooks on a model's modules that act on those alone: not on copies, and not inside graphs."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

_NAME = "_bhlog_patched"

Hook = TypeVar("Hook", bound=Callable[..., Any])


class Mark:
    """On each module that is hooked, and on DataParallel's replicas of it.

    It is not copied or pickled: a copy of the module has None in its place.
    """

    @staticmethod
    def of(module: nn.Module) -> "Mark | None":
        """The mark on a module."""
        return vars(module).get(_NAME)

    def put(self, module: nn.Module) -> None:
        """Mark a module."""
        vars(module)[_NAME] = self

    def take(self, module: nn.Module) -> None:
        """Leave a module without a mark."""
        vars(module).pop(_NAME, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _nothing, ()


def eager_hook(hook: Hook, mark: Mark) -> Hook:
    """Keep a hook out of compiled graphs; where nothing is compiled it is called as it is.

    Hooks go along when a model is copied: on a module without their mark they do nothing.
    """

    def here(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return hook(module, *args, **kwargs) if Mark.of(module) is mark else None

    disabled = torch.compiler.disable(here)  # type: ignore[no-untyped-call]

    @functools.wraps(hook)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else here(*args, **kwargs)

    return cast(Hook, call)


def _nothing() -> None:
    return None
