"""Sizes of memory as people write them: 4GB, 512MiB, 1e6."""

import re

from bhlog.capture.contract.errors import InvalidOption

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate("KMGT")}
_UNITS |= {f"{letter}IB": 1024 ** (i + 1) for i, letter in enumerate("KMGT")}
_SIZE = re.compile(r"(?P<number>\d+(\.\d*)?([eE]\d+)?)\s*(?P<unit>[A-Za-z]*)")
_MOST = 1 << 60


def bytes_of(text: str) -> int:
    """The bytes that a size stands for: units of 1,000 (KB to TB) and of 1,024 (KiB to TiB).

    Raises:
        InvalidOption: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = None if match is None else _UNITS.get(match["unit"].upper())
    size = 0 if match is None or unit is None else round(float(match["number"]) * unit)
    if not 0 < size <= _MOST:
        raise InvalidOption(f"{text!r} is no size; expected one such as 4GB or 512MiB")
    return size
