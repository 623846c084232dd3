"""Text to run through a model: documents, token windows, padded batches."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import EmptyText, InvalidOption, RouterLogError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
MOST_NAMED = 1000  # files of text, each with its sum in a manifest


@dataclass(frozen=True)
class Document:
    """A text and where it came from.

    Attributes:
        source: the file or dataset, as `tokens.source` names it.
        text: the text.
    """

    source: str
    text: str


@dataclass(frozen=True)
class Window:
    """At most max_length consecutive tokens of one document."""

    source: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows side by side, padded on the right.

    Attributes:
        token_ids, mask: (B, S) int64; mask is 0 on padding.
        sources: (B,) names.
    """

    token_ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    sources: tuple[str, ...]


class Tokenizer(Protocol):
    """What capture needs of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """A token per byte of UTF-8, as byte-level models without a tokenizer file read text."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, each below 256."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; ids above 255 are left out."""
        return bytes(i for i in token_ids if i < 256).decode("utf-8", errors="replace")


def read_documents(paths: Iterable[str | Path], *, field: str = "text") -> Iterator[Document]:
    """Documents of text files, JSON lines, and folders of them, in the order of their paths.

    A text file is one document; a JSON-lines file has one in each line's `field`. The source is the
    file's name, within a folder its path in it; files of one name are told apart by whole paths.
    Bytes of a name that are not UTF-8 are escaped.

    Raises:
        RouterLogError: a file is missing, not UTF-8, or a line has no such field.
    """
    for file, source in _sources(paths):
        yield from _read_file(file, source, field)


def text_sha256(paths: Iterable[str | Path]) -> dict[str, str]:
    """Sha256 of the files of read_documents by their sources.

    Of more than MOST_NAMED files it is one, of all their names and sums.

    Raises:
        RouterLogError: a file is missing or cannot be read.
    """
    sums: dict[str, str] = {}
    for path, source in _sources(paths):
        try:
            with path.open("rb") as file:
                sums[source] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(path, error) from error
    if len(sums) <= MOST_NAMED:
        return sums
    listed = "".join(f"{total}  {source}\n" for source, total in sums.items())
    return {f"{len(sums)} files": hashlib.sha256(listed.encode()).hexdigest()}


def _sources(paths: Iterable[str | Path]) -> list[tuple[Path, str]]:
    """Files of text, and the source that each is."""
    found: list[tuple[Path, str]] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
            if not files:
                raise EmptyText(f"{path}: no file ending in {', '.join(TEXT_SUFFIXES)}")
        elif path.is_file():
            files = [path]
        else:
            raise RouterLogError(f"{path}: no such file or folder")
        for file in files:
            found.append((file, file.name if file == path else file.relative_to(path).as_posix()))
    named: dict[str, set[Path]] = {}
    for file, source in found:
        named.setdefault(source, set()).add(file)
    return [
        (file, _printable(source if len(named[source]) == 1 else file.as_posix()))
        for file, source in found
    ]


def _printable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _read_file(path: Path, source: str, field: str) -> Iterator[Document]:
    try:
        if path.suffix != ".jsonl":
            yield Document(source, path.read_text(encoding="utf-8-sig"))
            return
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(source, _field(line, field, f"{path}, line {number}"))
    except UnicodeDecodeError as error:
        raise RouterLogError(
            f"{path}: not UTF-8 text (byte {error.start}); convert it first"
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> RouterLogError:
    return RouterLogError(f"{path}: cannot be read ({error.strerror})")


def _field(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RouterLogError(f"{where}: not JSON ({error})") from error
    except RecursionError as error:
        raise RouterLogError(f"{where}: JSON nested too deeply to be read") from error
    value: Any = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise RouterLogError(
            f"{where}: no text in field '{field}'; it has {found}: name one with --field"
        )
    return value


def digest(windows: Iterable[Window]) -> str:
    """Sha256 of windows, their tokens and sources: it tells whether they are the same again."""
    hasher = hashlib.sha256()
    for window in windows:
        hasher.update(f"{window.source}\0{len(window.token_ids)}\0".encode())
        hasher.update(np.array(window.token_ids, dtype=np.int64).tobytes())
    return hasher.hexdigest()


def windows(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_tokens: int | None = None,
) -> list[Window]:
    """Cut documents into consecutive windows of at most max_length tokens.

    Args:
        max_tokens: stop after so many tokens of every source; None reads everything.

    Raises:
        EmptyText: there is not a single token.
    """
    for name, value in (("max_length", max_length), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise InvalidOption(f"{name} must be at least 1, got {value}")
    result: list[Window] = []
    left: dict[str, int] = {}
    for document in documents:
        room = left.get(document.source, max_tokens)
        if room is not None and room <= 0:
            continue
        token_ids = tokenizer.encode(document.text)[:room]
        if room is not None:
            left[document.source] = room - len(token_ids)
        result.extend(
            Window(document.source, tuple(token_ids[start : start + max_length]))
            for start in range(0, len(token_ids), max_length)
        )
    if not result:
        raise EmptyText("the text is empty: there is nothing to capture")
    return result


def batches(windows: Sequence[Window], *, batch_size: int, pad_id: int = 0) -> Iterator[Batch]:
    """Batches of batch_size windows in order, padded on the right to the longest of each."""
    if batch_size < 1:
        raise InvalidOption(f"batch_size must be at least 1, got {batch_size}")
    for start in range(0, len(windows), batch_size):
        part = windows[start : start + batch_size]
        longest = max(len(window.token_ids) for window in part)
        token_ids = np.full((len(part), longest), pad_id, dtype=np.int64)
        mask = np.zeros_like(token_ids)
        for row, window in enumerate(part):
            n = len(window.token_ids)
            token_ids[row, :n] = window.token_ids
            mask[row, :n] = 1
        yield Batch(token_ids, mask, tuple(window.source for window in part))
