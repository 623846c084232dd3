"""What is put on a model's modules: hooks and attributes, all taken off again."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

Hook = TypeVar("Hook", bound=Callable[..., Any])

_ABSENT: Any = object()


class Changes:
    """Hooks and attributes put on modules, until `undo`."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._before: list[tuple[nn.Module, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._handles or self._before)

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Give an instance an attribute, which may hide a method of its class."""
        self._before.append((module, name, vars(module).get(name, _ABSENT)))
        vars(module)[name] = value

    def before_forward(
        self, module: nn.Module, hook: Callable[..., Any], *, prepend: bool = False
    ) -> None:
        """Call hook(module, args, kwargs) before the module runs."""
        self._handles.append(
            module.register_forward_pre_hook(eager(hook), with_kwargs=True, prepend=prepend)
        )

    def after_forward(
        self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False
    ) -> None:
        """Call hook(module, args, output) after the module has run.

        Args:
            always: after an exception too, with None as output, and hook(module, args, kwargs,
                output) is called.
        """
        self._handles.append(
            module.register_forward_hook(eager(hook), with_kwargs=always, always_call=always)
        )

    def undo(self) -> None:
        """Leave every module as it was found."""
        while self._handles:
            self._handles.pop().remove()
        while self._before:
            module, name, value = self._before.pop()
            if value is _ABSENT:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = value


def eager(hook: Hook) -> Hook:
    """Keep a hook out of compiled graphs; where nothing is compiled it is called as it is."""
    disabled = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]

    @functools.wraps(hook)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled(*args, **kwargs) if torch.compiler.is_compiling() else hook(*args, **kwargs)

    return cast(Hook, call)
