"""Documents to run through a model, read one after another: files, standard input, data sets."""

import bz2
import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.capture.contract.errors import (
    EmptyText,
    InvalidOption,
    MissingExtra,
    RouterLogError,
)

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")  # a document each
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")  # a document a record
_SUFFIXES = TEXT_SUFFIXES + RECORD_SUFFIXES
MOST_NAMED = 1000  # files of text, each with its sum in a manifest
STDIN = "-"
_PIECE = 1 << 24  # characters of a text that are read at once
_RECORDS = 256

_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"),
}


Message = Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """A text and where it came from.

    Attributes:
        source: the file or dataset, as `tokens.source` names it.
        text: the text.
        messages: in place of it, those of a conversation.
    """

    source: str
    text: str
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Field:
    """What is read of a record.

    Attributes:
        name: its field.
        chat: whether that holds messages, each with a role and its content, in place of a text.
    """

    name: str = "text"
    chat: bool = False

    def document(self, source: str, record: Any, where: str) -> Document:
        """The document in a record.

        Raises:
            RouterLogError: it has no such field, or the field holds something else.
        """
        value: Any = record.get(self.name) if isinstance(record, dict) else None
        if isinstance(value, list) and value and all(map(_is_message, value)):
            if self.chat:
                return Document(source, "", tuple(value))
            raise RouterLogError(f"{where}: field '{self.name}' holds messages: read with --chat")
        if self.chat or not isinstance(value, str):
            found = map(str, record) if isinstance(record, dict) else [type(record).__name__]
            raise self.missing(found, where)
        return Document(source, value)

    def text(self, source: str, text: str) -> Document:
        """The document that a text is.

        Raises:
            RouterLogError: messages are asked for.
        """
        if self.chat:
            raise RouterLogError(f"{source}: is text; messages are in records, such as JSON lines")
        return Document(source, text)

    def missing(self, found: Iterable[str], where: str) -> RouterLogError:
        """The error that a record has other fields."""
        kind = "list of messages with role and content" if self.chat else "text"
        return RouterLogError(
            f"{where}: no {kind} in field '{self.name}'; it has {', '.join(found)}: name one with "
            "--field"
        )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def read_documents(
    paths: Iterable[str | Path], *, field: Field = Field(), full: Container[str] = ()
) -> Iterator[Document]:
    """Documents of files, folders of them, globs and standard input, in the order of their paths.

    A text file is one document, or several of 16 million characters. JSON lines, JSON, Parquet, CSV
    and TSV have one in the `field` of each record. Any may be compressed (.gz, .bz2, .xz, .zst).
    `-` is standard input: text, or JSON lines if its first line is an object that has the field.

    The source is the file's name, within a folder its path in it; files of one name are told apart
    by whole paths. Bytes of a name that are not UTF-8 are escaped.

    Args:
        full: sources of which nothing more is read; it may grow while documents are read.

    Raises:
        RouterLogError: a file is missing, damaged or not UTF-8, or a record has no such field.
    """
    for file, source in text_files(paths):
        if source not in full:
            for document in _read_file(file, source, field):
                yield document
                if source in full:
                    break


def read_dataset(
    name: str, *, split: str, field: Field = Field(), full: Container[str] = ()
) -> Iterator[Document]:
    """Documents of a data set of the library `datasets`, as they are needed.

    Args:
        name: a folder that save_to_disk wrote or that holds data files, or a name on the hub;
            `NAME:CONFIG` if it has several.
        full: see read_documents.

    Raises:
        MissingExtra: the library is not installed.
        RouterLogError: it cannot be loaded, or a record has no such field.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(f"{name}: a data set needs datasets; pip install datasets") from error
    saved = any((Path(name) / f).is_file() for f in ("dataset_dict.json", "state.json"))
    place, _, config = (name, "", "") if Path(name).is_dir() else name.partition(":")
    try:
        if saved:
            found: Any = datasets.load_from_disk(name)
            if isinstance(found, dict):
                if split not in found:
                    raise InvalidOption(
                        f"{name}: has no split '{split}'; it has {', '.join(found)}"
                    )
                found = found[split]
        else:
            found = datasets.load_dataset(place, config or None, split=split, streaming=True)
        for number, record in enumerate(found, 1):
            if name in full:
                break
            yield field.document(name, record, f"{name}, record {number}")
    except RouterLogError:
        raise
    except Exception as error:  # what a data set may lack has many names
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RouterLogError(f"{name}: the data set cannot be read ({first})") from error


def text_sha256(paths: Iterable[str | Path]) -> dict[str, str]:
    """Sha256 of the files of read_documents by their sources; none of standard input.

    Of more than MOST_NAMED files it is one, of all their names and sums.

    Raises:
        RouterLogError: a file is missing or cannot be read.
    """
    sums: dict[str, str] = {}
    for path, source in text_files(path for path in paths if str(path) != STDIN):
        try:
            with path.open("rb") as file:
                sums[source] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(path, error) from error
    if len(sums) <= MOST_NAMED:
        return sums
    listed = "".join(f"{total}  {source}\n" for source, total in sums.items())
    return {f"{len(sums)} files": hashlib.sha256(listed.encode()).hexdigest()}


def text_files(paths: Iterable[str | Path]) -> list[tuple[Path, str]]:
    """Files of text, and the source that each is.

    Raises:
        RouterLogError: there is no such file, or none in a folder.
    """
    found: list[tuple[Path, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if _kind(p) in _SUFFIXES and p.is_file())
            if not files:
                raise EmptyText(
                    f"{path}: no file ending in {', '.join(_SUFFIXES)}, compressed or not"
                )
        elif path.exists() or str(path) == STDIN:
            files = [path]
        else:
            matching = glob.glob(str(path), recursive=True)  # noqa: PTH207 (it may be absolute)
            files = [Path(name) for name in sorted(matching)]
            files = [file for file in files if file.is_file()]
        if not files:
            raise RouterLogError(f"{path}: no such file or folder")
        inside = path.is_dir()
        for file in files:
            found.append((file, file.relative_to(path).as_posix() if inside else file.name))
    named: dict[str, set[Path]] = {}
    for file, source in found:
        named.setdefault(source, set()).add(file)
    return [
        (file, _printable(source if len(named[source]) == 1 else file.as_posix()))
        for file, source in found
    ]


def _kind(path: Path) -> str:
    """The suffix that says how a file is read, that of its compression left out."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _read_file(path: Path, source: str, field: Field) -> Iterator[Document]:
    if str(path) == STDIN:
        yield from _read_stdin(field)
        return
    kind = _kind(path)
    opener = _OPENERS.get(path.suffix.lower())
    where = _Where(source, str(path))
    try:
        with path.open("rb") if opener is None else opener(path) as raw:
            if kind == ".parquet":
                yield from _of_parquet(raw, field, where)
                return
            newline = "" if kind in (".csv", ".tsv") else None
            file = io.TextIOWrapper(_readable(raw), encoding="utf-8-sig", newline=newline)
            yield from _READERS.get(kind, _of_text)(file, field, where)
    except UnicodeDecodeError as error:
        raise RouterLogError(f"{path}: not UTF-8 text; convert it first") from error
    except (pa.ArrowException, lzma.LZMAError, EOFError, gzip.BadGzipFile) as error:
        raise RouterLogError(f"{path}: damaged, or not {path.suffix} ({error})") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _readable(raw: Any) -> IO[bytes]:
    """A stream that text can be read from; Arrow's lack a method for that."""
    return raw if not isinstance(raw, pa.NativeFile) else io.BufferedReader(raw)


class _Where(NamedTuple):
    """Where a record is: its source, and the words for it in messages."""

    source: str
    words: str

    def parsed(self, text: str, place: str) -> Any:
        """What a text holds as JSON."""
        try:
            return json.loads(text)
        except ValueError as error:
            raise RouterLogError(f"{self.words}{place}: not JSON ({error})") from error
        except RecursionError as error:
            raise RouterLogError(
                f"{self.words}{place}: JSON nested too deeply to be read"
            ) from error


def _read_stdin(field: Field) -> Iterator[Document]:
    file = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig")
    where = _Where("stdin", "standard input")
    try:
        first = file.readline()
        try:
            record = json.loads(first) if first.startswith("{") else None
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and field.name in record:
            yield field.document("stdin", record, f"{where.words}, line 1")
            yield from _of_lines(file, field, where, start=2)
        else:
            texts = _of_text(file, field, where)
            rest = next(texts, None)
            yield field.text("stdin", first + ("" if rest is None else rest.text))
            yield from texts
    except UnicodeDecodeError as error:
        raise RouterLogError("standard input: not UTF-8 text; convert it first") from error
    finally:
        file.detach()


def _of_text(file: IO[str], field: Field, where: _Where) -> Iterator[Document]:
    """A text, in pieces of whole lines if it is very long."""
    while piece := file.read(_PIECE):
        whole = piece + (file.readline() if len(piece) == _PIECE else "")
        yield field.text(where.source, whole)


def _of_lines(file: IO[str], field: Field, where: _Where, *, start: int = 1) -> Iterator[Document]:
    for number, line in enumerate(file, start):
        if line.strip():
            place = f", line {number}"
            yield field.document(where.source, where.parsed(line, place), where.words + place)


def _of_json(file: IO[str], field: Field, where: _Where) -> Iterator[Document]:
    """JSON lines, as many files of this name are, or one list of records."""
    first = ""
    while not first.strip():
        first = file.readline()
        if not first:
            return
    if not first.lstrip().startswith("["):
        yield field.document(
            where.source, where.parsed(first, ", line 1"), f"{where.words}, line 1"
        )
        yield from _of_lines(file, field, where, start=2)
        return
    for number, record in enumerate(where.parsed(first + file.read(), ""), 1):
        yield field.document(where.source, record, f"{where.words}, record {number}")


def _of_table(
    file: IO[str], field: Field, where: _Where, *, delimiter: str = ","
) -> Iterator[Document]:
    csv.field_size_limit(1 << 30)
    try:
        rows = csv.DictReader(file, delimiter=delimiter, strict=True)
        for number, row in enumerate(rows, 1):
            yield field.document(where.source, row, f"{where.words}, record {number}")
    except csv.Error as error:
        raise RouterLogError(f"{where.words}: not a table ({error})") from error


def _of_parquet(raw: Any, field: Field, where: _Where) -> Iterator[Document]:
    table = pq.ParquetFile(raw)
    if field.name not in table.schema_arrow.names:
        raise field.missing(table.schema_arrow.names, where.words)
    number = 0
    for batch in table.iter_batches(batch_size=_RECORDS, columns=[field.name]):
        for record in batch.to_pylist():
            number += 1
            yield field.document(where.source, record, f"{where.words}, record {number}")


_READERS: dict[str, Callable[[IO[str], Field, _Where], Iterator[Document]]] = {
    ".jsonl": _of_lines,
    ".ndjson": _of_lines,
    ".json": _of_json,
    ".csv": _of_table,
    ".tsv": partial(_of_table, delimiter="\t"),
}


def _unreadable(path: Path, error: OSError) -> RouterLogError:
    return RouterLogError(f"{path}: cannot be read ({error.strerror or error})")
