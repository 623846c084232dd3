"""Every policy family, and the text that names a policy: bh:0.3,max_k=16."""

import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module

import bhlog.analysis.replay.families as folder
from bhlog.analysis.replay.policy import Policy
from bhlog.capture.contract.alphas import expanded
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.named import ROUTED, parse


def families() -> dict[str, type[Policy]]:
    """Policy families by name: those in the folder families, and any other subclass of Policy.

    One that is defined again, as a cell of a notebook that runs twice, takes its own place.

    Raises:
        InvalidOption: two of them have the same name.
    """
    for entry in pkgutil.iter_modules(folder.__path__):
        import_module(f"{folder.__name__}.{entry.name}")
    found: dict[str, type[Policy]] = {}
    for kind in _subclasses(Policy):  # type: ignore[type-abstract]
        named = "name" in vars(kind) or kind.__bases__[0] in ROUTED.values()
        if inspect.isabstract(kind) or not named:
            continue
        other = found.setdefault(kind.name, kind)
        if _where(other) != _where(kind):
            raise InvalidOption(
                f"two policies are named '{kind.name}': {_where(other)} and {_where(kind)}; give "
                "one of them another name"
            )
        found[kind.name] = kind
    return dict(sorted(found.items()))


def _subclasses(kind: type[Policy]) -> Iterator[type[Policy]]:
    """Every class below this one, in the order of their definition."""
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def _where(kind: type[Policy]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def parse_policy(text: str, *, open_value: bool = False) -> Policy:
    """A policy from NAME:VALUE[,KEY=VALUE...]; see bhlog.capture.contract.named.parse.

    bh:@FILE has an alpha for each layer, see bhlog.capture.contract.alphas.

    >>> str(parse_policy("storey:0.3,max_k=16"))
    'storey:0.3,max_k=16'
    """
    return parse(expanded(text), families(), open_value=open_value)
