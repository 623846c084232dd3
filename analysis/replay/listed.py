"""_replay.json: the list of a replay's parts, written when all of them are whole."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from bhlog.capture.contract.errors import CorruptShard, one_line
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.manifest import Seal
from bhlog.capture.contract.opening import seal_of
from bhlog.capture.contract.schema import SHARD_NAME

LIST_NAME = "_replay.json"
MOST_LIST_BYTES = 1 << 26
_VERSION = 1


def write_list(folder: Path, seals: Mapping[str, Seal] | None = None) -> None:
    """List the parts in a replay's folder with their seals.

    Args:
        seals: of parts that are somewhere else by now, by file name.
    """
    if seals is None:
        seals = {path.name: seal_of(path) for path in folder.glob("*.parquet")}
    parts = {name: asdict(seals[name]) for name in sorted(seals)}
    data: dict[str, Any] = {"version": _VERSION, "parts": parts}
    data["checksum"] = _checksum(data)
    with whole_file(folder / LIST_NAME) as file:
        file.write((json.dumps(data, indent=1) + "\n").encode())


def read_list(text: bytes, name: str) -> Mapping[str, Seal]:
    """The seals of a replay's parts by file name; name says in errors where the list is.

    Raises:
        CorruptShard: it is no such list, or does not have its checksum.
    """
    try:
        data = msgspec.json.decode(text)
        if not isinstance(data, dict) or set(data) != {"version", "parts", "checksum"}:
            raise ValueError("expected version, parts and checksum")
        if data["version"] != _VERSION:
            raise ValueError(f"of version {data['version']!r}, this bhlog reads {_VERSION}")
        if data.pop("checksum") != _checksum(data):
            raise ValueError("it does not have its checksum")
        parts = msgspec.convert(data["parts"], dict[str, Seal])
        if not all(map(SHARD_NAME.fullmatch, parts)):
            raise ValueError("a part is not named like a shard")
        return parts
    except (ValueError, RecursionError) as error:
        raise CorruptShard(
            f"{name}: not a replay's list of parts ({one_line(str(error))}); remove the replay and "
            "make it again with bhlog replay"
        ) from error


def _checksum(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
