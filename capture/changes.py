"""What is put on a model's modules: hooks and attributes, taken off again and never copied."""

from collections.abc import Callable
from typing import Any

from torch import nn

_ABSENT: Any = object()
_REDUCE = "__reduce_ex__"
_HOOKS = "_forward_pre_hooks", "_forward_hooks"


class Changes:
    """Hooks and attributes put on modules, until `undo`.

    A copy of a module that has them (copy, pickle, torch.save, a spawned process) is as the module
    was before: each has a `__reduce_ex__` that leaves them out. DataParallel's replicas, which are
    made otherwise and stand in for the module, do have them.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._before: list[tuple[nn.Module, str, Any]] = []
        self._plain: dict[int, _Plain] = {}
        self._last: list[tuple[Any, int]] = []

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Give an instance an attribute, which may hide a method of its class."""
        before = vars(module).get(name, _ABSENT)
        self._before.append((module, name, before))
        self._of(module).attributes.setdefault(name, before)
        vars(module)[name] = value

    def before_forward(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        *,
        prepend: bool = False,
        last: bool = False,
    ) -> None:
        """Call hook(module, args, kwargs) before the module runs.

        Args:
            prepend: before other hooks.
            last: after other hooks, also after those that are added later; see `stay_last`.
        """
        handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)
        self._add(module, handle)
        if last:
            self._last.append((module._forward_pre_hooks, handle.id))

    def after_forward(
        self,
        module: nn.Module,
        hook: Callable[..., Any],
        *,
        always: bool = False,
        last: bool = False,
    ) -> None:
        """Call hook(module, args, output) after the module has run.

        Args:
            last: after other hooks, also after those that are added later; see `stay_last`.
            always: after an exception too, with None as output, and hook(module, args, kwargs,
                output) is called.
        """
        handle = module.register_forward_hook(hook, with_kwargs=always, always_call=always)
        self._add(module, handle)
        if last:
            self._last.append((module._forward_hooks, handle.id))

    def stay_last(self) -> None:
        """Put the hooks that are to be last behind those that were added since."""
        for hooks, number in self._last:
            if next(reversed(hooks)) != number:
                hooks.move_to_end(number)

    @property
    def lost(self) -> bool:
        """Whether somebody else has taken off a hook that was put on a module."""
        return any(handle.id not in (handle.hooks_dict_ref() or ()) for handle in self._handles)

    def undo(self) -> None:
        """Leave every module as it was found."""
        self._last = []
        while self._handles:
            self._handles.pop().remove()
        while self._before:
            module, name, value = self._before.pop()
            _restore(vars(module), name, value)
        self._plain = {}

    def _add(self, module: nn.Module, handle: Any) -> None:
        self._handles.append(handle)
        self._of(module).hooks.add(handle.id)

    def _of(self, module: nn.Module) -> "_Plain":
        if id(module) not in self._plain:
            plain = self._plain[id(module)] = _Plain(module)
            self._before.append((module, _REDUCE, vars(module).get(_REDUCE, _ABSENT)))
            plain.attributes[_REDUCE] = self._before[-1][2]
            vars(module)[_REDUCE] = plain
        return self._plain[id(module)]


class _Plain:
    """The `__reduce_ex__` of a module that leaves out what was put on it.

    Attributes:
        attributes: what was there before, by name.
        hooks: ids of the hooks put on it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._reduce = getattr(module, _REDUCE)
        self.attributes: dict[str, Any] = {}
        self.hooks: set[int] = set()

    def __call__(self, protocol: Any) -> Any:
        reduced = self._reduce(protocol)
        if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced  # made by a class in a way of its own, from what it knows of itself
        state = dict(reduced[2])
        for name, value in self.attributes.items():
            _restore(state, name, value)
        for name, hooks in state.items():
            if name.startswith(_HOOKS) and isinstance(hooks, dict) and self.hooks & set(hooks):
                others = [(key, hook) for key, hook in hooks.items() if key not in self.hooks]
                state[name] = type(hooks)(others)
        return (*reduced[:2], state, *reduced[3:])


def _restore(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value
