"""Every policy family of this folder, and the text that names a policy: bh:0.3,max_k=16."""

import inspect
import pkgutil
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from analysis.policy.policy import Policy
from capture.contract.errors import InvalidOption


def families() -> dict[str, type[Policy]]:
    """Policy families by name: the classes defined in the files of this folder."""
    found: dict[str, type[Policy]] = {}
    for entry in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = import_module(f"analysis.policy.{entry.name}")
        for kind in vars(module).values():
            if not (isinstance(kind, type) and issubclass(kind, Policy)):
                continue
            if kind.__module__ == module.__name__ and not inspect.isabstract(kind):
                found[kind.name] = kind
    return found


def parse_policy(text: str, *, open_value: bool = False) -> Policy:
    """A policy from NAME:VALUE[,KEY=VALUE...], such as topk:4 or storey:0.3,lambda=0.5.

    Args:
        open_value: whether the value may be left out, because it is to be solved for; the policy
            then has one in the middle of its range.

    Raises:
        InvalidOption: no such policy or option, or a value that is missing or out of range.

    >>> str(parse_policy("storey:0.3,max_k=16"))
    'storey:0.3,max_k=16'
    """
    head, *rest = (part.strip() for part in text.split(","))
    name, colon, value = (part.strip() for part in head.partition(":"))
    known = families()
    if name not in known:
        near = get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"policies: {', '.join(known)}"
        raise InvalidOption(f"no policy '{name}' in '{text}'; {hint}")
    kind = known[name]
    options: dict[str, Field[Any]] = {f.name.rstrip("_"): f for f in fields(kind)}
    parameter = options[kind.parameter]
    values: dict[str, float] = {}
    if colon:
        values[parameter.name] = _read(text, kind.parameter, value, parameter)
    for part in rest:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise InvalidOption(f"policy '{text}': expected KEY=VALUE, got '{part}'")
        if key not in options:
            near = get_close_matches(key, options, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"options: {', '.join(options)}"
            raise InvalidOption(f"policy '{text}': no option '{key}'; {hint}")
        if options[key].name in values:
            raise InvalidOption(f"policy '{text}': {key} is given twice")
        values[options[key].name] = _read(text, key, value, options[key])
    if parameter.name not in values and parameter.default is MISSING:
        middle = kind.value_at(0.5, 64)
        if not open_value:
            raise InvalidOption(
                f"policy '{text}': {kind.parameter} is missing, as in {name}:{middle:.3g}; or let "
                "it be solved for a budget of experts per token"
            )
        values[parameter.name] = middle
    try:
        return kind(**values)  # type: ignore[arg-type]
    except InvalidOption as error:
        raise InvalidOption(f"policy '{text}': {error}") from error


def _read(text: str, key: str, value: str, option: "Field[Any]") -> float:
    """A number of the option's type."""
    integer = option.type in (int, int | None)
    try:
        return int(value) if integer else float(value)
    except ValueError:
        kind = "a whole number" if integer else "a number"
        raise InvalidOption(f"policy '{text}': {key} must be {kind}, got '{value}'") from None
