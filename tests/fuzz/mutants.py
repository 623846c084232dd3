"""A seed's change to the world: of bytes, of JSON values, of Parquet columns."""

import base64
import copy
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.capture.contract.checksum import with_checksum
from tests.fuzz.traces import PATHS
from tests.fuzz.world import FORMATS, UNSEALED, seal_again, sealed_json

EXTREMES = (0, 1, -1, 2, 127, 128, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 2**32 - 1, 2**53)
FLOATS = (0.0, -0.0, 1e-45, 1e-300, 3.4e38, 1e308, float("inf"), float("-inf"), float("nan"), -1.0)
WRONG = (None, True, "", "x", "../../x", "\x1b[2J", [], {}, [[]], 10**30, -(10**30), 1e308, 0.5)


_REFUSED = (pa.ArrowException, LookupError, TypeError, ValueError, ArithmeticError, OSError)


@dataclass(frozen=True)
class Mutant:
    """What was done.

    Attributes:
        words: the changes, for people.
        bytes_alone: whether checksums are as they were, so that only the unchanged answer is right.
    """

    words: str
    bytes_alone: bool


def mutate(root: Path, format: str, seed: int) -> Mutant:
    """Change the world as this seed says."""
    rng = random.Random(f"{format} {seed}")
    found = {path for pattern in FORMATS[format] for path in root.glob(pattern)}
    files = sorted(path for path in found if format == "folder" or path.is_file())
    if format == "folder":
        words = _folder(rng, root, [file for file in files if file.is_file()])
        # what is gone may be left out: commands say so, and verify calls it an error
        return Mutant(words, not re.search(" (gone|link|link out|FIFO|folder) ", words))
    path = rng.choice(files)
    structured = {".json": _json, ".parquet": _parquet, ".jsonl": _lines, ".csv": _lines}.get(
        path.suffix
    )
    if path.suffix == ".parquet" and rng.random() < 0.1:
        words, resealed = _statistics(rng, path), True
    elif structured is not None and rng.random() < 0.5:
        words, resealed = structured(rng, path)
        if rng.random() < 0.25:  # pages without checksums, footers that are sealed all the same
            words += "; " + _bytes(rng, path, files)
    else:
        words, resealed = _bytes(rng, path, files), rng.random() < 0.4
    if resealed and format not in UNSEALED:
        seal_again(root, totals=rng.random() < 0.7)
        words += "; sealed again"
    alone = not resealed and format not in ("pickle", *PATHS)
    return Mutant(f"{path.relative_to(root)}: {words}", alone)


def _folder(rng: random.Random, root: Path, files: list[Path]) -> str:
    """Files that are gone, exchanged, of another kind, or there twice."""
    path, other = rng.sample(files, 2)
    kind = rng.choice(("gone", "exchanged", "link", "link out", "FIFO", "folder", "empty", "copy"))
    held = path.read_bytes()
    if kind == "copy":
        name = rng.choice((other.name, "rank00000-00002.parquet", "rank00001-00000.parquet", "x"))
        (other.parent / name).write_bytes(held)
        return f"{path.relative_to(root)} copied to {other.parent.name}/{name}"
    path.unlink()
    if kind == "exchanged":
        path.write_bytes(other.read_bytes())
        other.write_bytes(held)
    elif kind == "link":
        path.symlink_to(other)
    elif kind == "link out":
        away = root.parent / "whole" / path.relative_to(root)
        path.symlink_to(rng.choice((away, Path("/dev/zero"), Path("/nonexistent"), path)))
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    return f"{path.relative_to(root)} {kind} ({other.relative_to(root)})"


def _bytes(rng: random.Random, path: Path, others: list[Path]) -> str:
    data, words = bytearray(path.read_bytes()), []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        change = rng.choice(BYTES)
        at = _place(rng, len(data))
        data = bytearray(change(rng, data, at, others))
        words.append(f"{change.__name__} at {at}")
    path.write_bytes(data)
    return ", ".join(words)


def _place(rng: random.Random, size: int) -> int:
    """Anywhere; in the last third, where footers are; or close to an end."""
    kind = rng.random()
    if kind < 0.4:
        return rng.randrange(max(1, size))
    if kind < 0.8:
        return rng.randrange(size * 2 // 3, max(size * 2 // 3 + 1, size))
    return (
        min(rng.randrange(64), max(0, size - 1))
        if kind < 0.9
        else max(0, size - rng.randint(1, 64))
    )


def flip(rng, data, at, others):
    data[at : at + 1] = bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1])
    return data


def overwrite(rng, data, at, others):
    n = rng.choice((1, 1, 2, 4, 16))
    data[at : at + n] = rng.randbytes(len(data[at : at + n]))
    return data


def number(rng, data, at, others):
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice(EXTREMES) % (1 << 8 * width)
    data[at : at + width] = value.to_bytes(width, "little")[: len(data[at : at + width])]
    return data


def footer_length(rng, data, at, others):
    value = rng.choice((*EXTREMES, len(data), len(data) - 12, rng.randrange(max(1, len(data)))))
    data[-8:-4] = (value % (1 << 32)).to_bytes(4, "little")
    return data


def truncate(rng, data, at, others):
    return data[:at] + (data[-8:] if rng.random() < 0.3 else b"")


def insert(rng, data, at, others):
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[at:]


def delete(rng, data, at, others):
    return data[:at] + data[at + rng.choice((1, 2, 8, 100)) :]


def zero(rng, data, at, others):
    n = len(data[at : at + rng.choice((4, 32, 512))])
    data[at : at + n] = bytes(n)
    return data


def swap(rng, data, at, others):
    n, to = rng.choice((4, 16, 128)), _place(rng, len(data))
    low, high = min(at, to), max(at, to)
    a, b = data[low : low + n], data[high : high + n]
    return data[:low] + b + data[low + n : high] + a + data[max(high, low + n) + n :]


def duplicate(rng, data, at, others):
    n = rng.choice((4, 16, 128, 4096))
    return data[: at + n] + data[at:]


def splice(rng, data, at, others):
    return data[:at] + rng.choice(others).read_bytes()[at:]


BYTES: tuple[Callable[..., Any], ...] = (
    *(flip, flip, flip, overwrite, overwrite, number, number, footer_length, truncate),
    *(insert, delete, zero, swap, duplicate, splice),
)


def _statistics(rng: random.Random, path: Path) -> str:
    """Another smallest or largest value in the footer: four bytes after their number, 4."""
    data = bytearray(path.read_bytes())
    footer = max(0, len(data) - 8 - int.from_bytes(data[-8:-4], "little"))
    found = [m.start() for m in re.finditer(rb"\x04.\0\0\0", data, re.DOTALL) if m.start() > footer]
    for at in rng.sample(found, min(len(found), rng.choice((1, 2, 8)))):
        data[at + 1] = rng.choice((0, 1, 2, 3, 5, 11, 200, data[at + 1] + 1 & 255))
    path.write_bytes(data)
    return "statistics"


def _json(rng: random.Random, path: Path) -> tuple[str, bool]:
    """Other values in JSON, with the checksum of what it says now, or without."""
    data = json.loads(path.read_bytes())
    words = [_other_value(rng, data) for _ in range(rng.choice((1, 1, 2)))]
    resealed = rng.random() < 0.8
    path.write_bytes(sealed_json(data) if resealed else json.dumps(data).encode())
    return ", ".join(words), resealed


def _other_value(rng: random.Random, data: Any) -> str:
    """Change a value somewhere in JSON."""
    places = list(_places(data))
    holder, key = rng.choice(places)
    kind = rng.random()
    if kind < 0.15:
        del holder[key]
        return f"no {key}"
    if kind < 0.25 and isinstance(holder, dict):
        holder[rng.choice(("x", "checksum", "__class__"))] = copy.deepcopy(holder[key])
        return f"{key} twice"
    value = rng.choice((rng.choice(WRONG), rng.choice(EXTREMES), rng.choice(FLOATS)))
    other, its = rng.choice(places)
    holder[key] = copy.deepcopy(rng.choice((value, value, other[its])))
    return f"{key}: {str(holder[key])[:40]!r}"


def _lines(rng: random.Random, path: Path) -> tuple[str, bool]:
    """Lines that are gone, twice or exchanged; other fields in them, or bytes in their base64."""
    lines = path.read_text().splitlines()
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.choice(("field", "field", "field", "gone", "twice", "exchanged", "blank"))
    if kind == "field" and path.suffix == ".csv":
        fields = lines[i].split(",")
        at = rng.randrange(len(fields))
        other = rng.choice(lines[j].split(","))
        fields[at] = str(rng.choice((other, other, *EXTREMES, *FLOATS, *WRONG)))
        lines[i] = ",".join(fields)
    elif kind == "field":
        data = json.loads(lines[i])
        texts = [(h, k) for h, k in _places(data) if isinstance(h[k], str) and len(h[k]) > 20]
        if texts and rng.random() < 0.6:
            holder, key = rng.choice(texts)
            held = bytearray(base64.b64decode(holder[key]))
            change = rng.choice(BYTES)
            held = change(rng, held, _place(rng, len(held)), [path])
            holder[key] = base64.b64encode(held).decode()
            kind = f"{change.__name__} in base64"
        else:
            kind = _other_value(rng, data)
        lines[i] = json.dumps(data)
    elif kind == "gone":
        del lines[i]
    elif kind == "twice":
        lines.insert(j, lines[i])
    elif kind == "exchanged":
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines[i] = rng.choice(("", " ", "#", "[]", "{}", "null"))
    path.write_text("\n".join(lines) + "\n")
    return f"line {i + 1} {kind}", True


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value inside."""
    keys = list(data) if isinstance(data, dict) else range(len(data))
    for key in keys:
        yield data, key
        if isinstance(data[key], dict | list):
            yield from _places(data[key])


def _parquet(rng: random.Random, path: Path) -> tuple[str, bool]:
    """Other columns, written as another writer might: a null model or profile with its checksum."""
    table, words = pq.read_table(path), []
    for _ in range(rng.choice((1, 1, 2))):
        change = rng.choice(TABLES)
        try:
            changed = change(rng, table)
            changed.validate(full=True)
        except _REFUSED:
            continue
        table = changed
        words.append(change.__name__)
    options = {
        "compression": rng.choice(("zstd", "snappy", "none")),
        "write_statistics": rng.random() < 0.8,
        "use_dictionary": rng.random() < 0.5,
        "write_page_checksum": rng.random() < 0.8,
        "data_page_version": rng.choice(("1.0", "1.0", "2.0")),
    }
    alone = path.stem in ("null", "profile") and rng.random() < 0.9
    groups = _groups(rng, table)
    for written in (table, pq.read_table(path)):  # not every table can be written
        sink = io.BytesIO()
        with suppress(*_REFUSED):
            sealed = with_checksum(written) if alone else written
            with pq.ParquetWriter(sink, sealed.schema, **options) as writer:
                for group in groups if written is table else [written]:
                    writer.write_table(
                        group.replace_schema_metadata(sealed.schema.metadata),
                        row_group_size=max(1, len(group)),
                    )
            break
    path.write_bytes(sink.getvalue())
    return f"{', '.join(words) or 'rewritten'} ({options})", True


def _groups(rng: random.Random, table: pa.Table) -> list[pa.Table]:
    """A row group for each layer, as in a log; or two of any rows; or all in one."""
    kind = rng.random()
    if kind < 0.8 and table.column_names.count("layer") == 1:
        layers = table["layer"].to_pylist()
        return [
            table.filter(pa.array([layer == one for layer in layers]))
            for one in sorted(set(layers), key=str)
        ] or [table]
    return (
        [table] if kind < 0.9 else [table.slice(0, len(table) // 2), table.slice(len(table) // 2)]
    )


def _column(rng: random.Random, table: pa.Table) -> int:
    return rng.randrange(table.num_columns)


def values(rng, table):
    """Some values of a column become extreme, inside lists too, or null."""
    at = _column(rng, table)
    field, items = table.schema.field(at), table.column(at).to_pylist()
    for row in rng.sample(range(len(items)), min(len(items), rng.choice((1, 1, 3, 100)))):
        items[row] = _other(rng, items[row])
    nullable = field.with_nullable(field.nullable or None in items)
    return table.set_column(at, nullable, pa.array(items, field.type))


def _other(rng: random.Random, value: Any) -> Any:
    if isinstance(value, list) and value and rng.random() < 0.8:
        kind, i = rng.random(), rng.randrange(len(value))
        if kind < 0.5:
            return [*value[:i], _other(rng, value[i]), *value[i + 1 :]]
        return rng.choice((value[::-1], value[:i], value * 2, [value[i]] * len(value)))
    if isinstance(value, int):
        return rng.choice((*EXTREMES, value + 1, value - 1, None))
    if isinstance(value, float):
        return rng.choice((*FLOATS, value * 2, -value, value + 1e-3, None))
    return rng.choice(("", "x", "decode", "\x1b[2J", "a" * 1000, None))


def rows(rng, table):
    """Rows in another order, twice, or fewer of them."""
    n = len(table)
    order = rng.choice((
        [*range(n)][::-1], rng.sample(range(n), n), rng.sample(range(n), n // 2), [],
        [*range(n), *range(n)], [rng.randrange(n) for _ in range(n)],
    ))  # fmt: skip
    return table.take(pa.array(order, pa.int64()))


def dropped(rng, table):
    return table.remove_column(_column(rng, table))


def added(rng, table):
    name = rng.choice(("run", "x", "layer", 'a"; DROP', "\x1b[2J", "k"))
    return table.append_column(name, pa.array(["x"] * len(table)))


def cast(rng, table):
    at = _column(rng, table)
    type = rng.choice((pa.int8(), pa.int64(), pa.float32(), pa.float64(), pa.string(),
                       pa.binary(), pa.list_(pa.float32()), pa.list_(pa.uint16())))  # fmt: skip
    return table.set_column(at, table.schema.field(at).name, table.column(at).cast(type))


def nulls(rng, table):
    at = _column(rng, table)
    field = table.schema.field(at).with_nullable(True)
    return table.set_column(at, field, pa.nulls(len(table), field.type))


def exchanged(rng, table):
    order = rng.sample(range(table.num_columns), table.num_columns)
    return table.select(order)


def metadata(rng, table):
    found = dict(table.schema.metadata or {})
    key = rng.choice(sorted(found) or [b"x"])
    text = rng.choice((b"", b"-1", b"0", b"9" * 50, b"null", b"{}", b"[1]", b'{"min_k": -1}', b"1"))
    return table.replace_schema_metadata({**found, key: text})


def shuffled(rng, table):
    """The values of one column in another order than its neighbours'."""
    at = _column(rng, table)
    order = np.array(rng.sample(range(len(table)), len(table)), dtype=np.int64)
    return table.set_column(at, table.schema.field(at), table.column(at).take(pa.array(order)))


TABLES: tuple[Callable[..., pa.Table], ...] = (
    *(values, values, values, values, rows, dropped, added, cast, nulls, exchanged, metadata),
    shuffled,
)
