"""Every policy family, and the text that names a policy: bh:0.3,max_k=16."""

import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, fields
from difflib import get_close_matches
from importlib import import_module
from typing import get_type_hints

import bhlog.analysis.replay.families as folder
from bhlog.analysis.replay.policy import Policy
from bhlog.capture.contract.errors import InvalidOption


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
        if inspect.isabstract(kind) or "name" not in vars(kind):
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
    """A policy from NAME:VALUE[,KEY=VALUE...], such as topk:4 or storey:0.3,lambda=0.5.

    Args:
        open_value: whether the value may be left out, because it is to be solved for; the policy
            then has the family's example.

    Raises:
        InvalidOption: no such policy or option, or a value that is missing or out of range.

    >>> str(parse_policy("storey:0.3,max_k=16"))
    'storey:0.3,max_k=16'
    """
    head, *rest = (part.strip() for part in text.split(","))
    name, colon, value = (part.strip() for part in head.partition(":"))
    if not name:
        raise InvalidOption(f"policy '{text}': expected NAME:VALUE, such as bh:0.3")
    known = families()
    if name not in known:
        raise InvalidOption(
            f"policy '{text}': no policy '{name}'; {_hint(name, known, 'policies')}"
        )
    kind = known[name]
    options = {field.name.rstrip("_"): field.name for field in fields(kind)}
    given = [(kind.parameter, value)] if colon else []
    for part in rest:
        key, equals, option = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise InvalidOption(f"policy '{text}': expected KEY=VALUE, got '{part}'")
        if key not in options:
            hint = _hint(key, options, "options")
            raise InvalidOption(f"policy '{text}': no option '{key}'; {hint}")
        given.append((key, option))
    types = get_type_hints(kind)
    values: dict[str, float] = {}
    for key, option in given:
        if options[key] in values:
            raise InvalidOption(f"policy '{text}': {key} is given twice")
        values[options[key]] = _number(text, key, option, types[options[key]])
    (parameter,) = (field for field in fields(kind) if field.name == options[kind.parameter])
    if parameter.name not in values and parameter.default is MISSING:
        if not open_value:
            raise InvalidOption(
                f"policy '{text}': {kind.parameter} is missing, as in {name}:{kind.example:g}; or "
                "give a budget of experts per token to solve it for"
            )
        values[parameter.name] = kind.example
    try:
        return kind(**values)  # type: ignore[arg-type]
    except InvalidOption as error:
        raise InvalidOption(f"policy '{text}': {error}") from error


def _number(text: str, key: str, value: str, kind: object) -> float:
    """The value of an option of a policy, whole where its field is."""
    whole = kind in (int, int | None)
    try:
        return int(value) if whole else float(value)
    except ValueError:
        expected = "a whole number" if whole else "a number"
        raise InvalidOption(f"policy '{text}': {key} must be {expected}, got '{value}'") from None


def _hint(name: str, known: Iterable[str], what: str) -> str:
    """What a wrong name may have meant, or what there is."""
    near = get_close_matches(name.lower(), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"{what}: {', '.join(known)}"
