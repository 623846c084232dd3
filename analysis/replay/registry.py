"""Every policy family of this folder, and the text that names a policy: bh:0.3,max_k=16."""

import inspect
import pkgutil
from dataclasses import MISSING, fields
from difflib import get_close_matches
from importlib import import_module
from typing import get_type_hints

from bhlog.analysis.replay.policy import Policy
from bhlog.capture.contract.errors import InvalidOption


def families() -> dict[str, type[Policy]]:
    """Policy families by name: the classes defined in the files of this folder."""
    found: dict[str, type[Policy]] = {}
    for entry in pkgutil.iter_modules(import_module("bhlog.analysis.replay.families").__path__):
        module = import_module(f"bhlog.analysis.replay.families.{entry.name}")
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
            then has the family's example.

    Raises:
        InvalidOption: no such policy or option, or a value that is missing or out of range.

    >>> str(parse_policy("storey:0.3,max_k=16"))
    'storey:0.3,max_k=16'
    """
    head, *rest = (part.strip() for part in text.split(","))
    name, colon, value = (part.strip() for part in head.partition(":"))
    known = families()
    if not name:
        raise InvalidOption(f"policy '{text}': expected NAME:VALUE, such as bh:0.3")
    if name not in known:
        near = get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"policies: {', '.join(known)}"
        raise InvalidOption(f"policy '{text}': no policy '{name}'; {hint}")
    kind = known[name]
    options = {field.name.rstrip("_"): field for field in fields(kind)}
    types = get_type_hints(kind)
    parameter = options[kind.parameter]
    values: dict[str, float] = {}

    def read(key: str, value: str) -> None:
        field = options[key]
        if field.name in values:
            raise InvalidOption(f"policy '{text}': {key} is given twice")
        integer = types[field.name] in (int, int | None)
        try:
            values[field.name] = int(value) if integer else float(value)
        except ValueError:
            expected = "a whole number" if integer else "a number"
            raise InvalidOption(
                f"policy '{text}': {key} must be {expected}, got '{value}'"
            ) from None

    if colon:
        read(kind.parameter, value)
    for part in rest:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise InvalidOption(f"policy '{text}': expected KEY=VALUE, got '{part}'")
        if key not in options:
            near = get_close_matches(key, options, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"options: {', '.join(options)}"
            raise InvalidOption(f"policy '{text}': no option '{key}'; {hint}")
        read(key, value)
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
