"""Values as text: for a cell of a table, for JSON and for CSV, harmless wherever they are shown."""

import json
import math
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for one by its start


def cell(value: object) -> str:
    """One value as text for a table; floats have four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(cell(item) for item in value)
    return spelled_out(str(value))


def spelled_out(text: str) -> str:
    """Text with control characters spelled out: a log from a stranger must not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t\xa0" else c.encode("unicode_escape").decode()
        for c in text
    )


def for_csv(text: str) -> str:
    """Text that steers neither a terminal nor a spreadsheet, which would compute =1+1."""
    if text.startswith(_FORMULA) and len(text) > 1 and not _is_number(text):
        text = "'" + text
    return spelled_out(text)


def as_json(value: Any) -> str:
    """A value as JSON, which has no NaN or infinity: null stands for them."""
    try:
        return json.dumps(value, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), default=str)


def escaped_json(text: str) -> str:
    """A line of JSON with \\u escapes for characters that could steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\xa0" else json.dumps(c)[1:-1] for c in text)


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
