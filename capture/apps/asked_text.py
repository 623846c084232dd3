"""Text that a command runs through a model: where it comes from, and how it is cut."""

import hashlib
import json
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import click

from bhlog.analysis.commands.kinds import PathKind
from bhlog.analysis.commands.options import bundle
from bhlog.capture.contract.errors import EmptyText, InvalidOption
from bhlog.capture.documents import Document, Field, read_dataset, read_documents, text_sha256
from bhlog.capture.writing.launch import world_size

if TYPE_CHECKING:
    from bhlog.capture.text import Tokenizer, Window

_AHEAD = 1024  # windows that are cut before the model runs, to say how many there are if few


@dataclass(frozen=True)
class Texts:
    """The text to run, and how it is cut; see bhlog.capture.documents and bhlog.capture.text."""

    paths: tuple[str, ...]
    datasets: tuple[str, ...]
    split: str
    field: str | None
    chat: bool
    max_length: int
    max_tokens: int | None

    def __post_init__(self) -> None:
        if not self.paths and not self.datasets:
            raise InvalidOption("there is nothing to read: give --text PATH or --dataset NAME")
        if "-" in self.paths and world_size() > 1:
            raise InvalidOption("--text -: several processes cannot share standard input")

    def read(self, full: Container[str] = ()) -> Iterator[Document]:
        """The documents, the first of which is read at once, so that what is missing is told.

        Args:
            full: sources of which nothing more is read.
        """
        field = self._field
        parts = [read_documents(self.paths, field=field, full=full)]
        parts += [
            read_dataset(name, split=self.split, field=field, full=full) for name in self.datasets
        ]
        documents = chain(*parts)
        first = list(islice(documents, 1))
        return chain(first, documents)

    @property
    def _field(self) -> Field:
        return Field(self.field or ("messages" if self.chat else "text"), self.chat)

    def sha256(self) -> dict[str, str]:
        """Sha256 of each file by its source."""
        return text_sha256(self.paths)

    def cut(
        self,
        documents: Iterable[Document],
        tokenizer: "Tokenizer",
        full: set[str],
        *,
        answers: bool = False,
    ) -> "tuple[Iterator[Window], list[Window] | None]":
        """The documents in windows, as they are read; all of them too if they are few.

        Args:
            full, answers: see bhlog.capture.text.cut.

        Raises:
            EmptyText: there is not a single token.
        """
        from bhlog.capture.text import EMPTY, cut

        found = cut(
            documents,
            tokenizer,
            max_length=self.max_length,
            max_tokens=self.max_tokens,
            full=full,
            answers=answers,
        )
        first = list(islice(found, _AHEAD))
        if not first:
            raise EmptyText(EMPTY)
        return chain(first, found), first if len(first) < _AHEAD else None

    def noted(self, sums: dict[str, str]) -> dict[str, Any]:
        """What the manifest keeps, so that a resumed run is of the same text.

        Args:
            sums: see `sha256`.
        """
        sources = [*sums.items(), *((name, self.split) for name in self.datasets)]
        words = json.dumps([sources, self._field.name, self.chat, self.max_tokens])
        return {
            "max_length": self.max_length,
            "texts_sha256": hashlib.sha256(words.encode()).hexdigest(),
            **({"datasets": list(self.datasets)} if self.datasets else {}),
            **({"chat": True} if self.chat else {}),
        }

    def require_again(self) -> None:
        """Raise if the text cannot be read again, as a resumed run must."""
        if "-" in self.paths:
            raise InvalidOption("--text -: standard input cannot be read again, so no --resume")


texts_options = bundle(
    "texts",
    lambda texts, datasets, **values: Texts(texts, datasets, **values),
    click.option(
        "--text",
        "texts",
        multiple=True,
        type=PathKind("file"),
        metavar="PATH",
        help="File of text, JSON lines, JSON, Parquet or CSV, compressed or not; a folder or a "
        "glob of them; - for standard input. Repeatable. Each file is a source.",
    ),
    click.option(
        "--dataset",
        "datasets",
        multiple=True,
        metavar="NAME",
        help="Data set of the library datasets: a folder, or NAME or NAME:CONFIG on the hub.",
    ),
    click.option("--split", default="train", show_default=True, help="Of --dataset."),
    click.option("--field", help="Field of records: text, or messages with --chat."),
    click.option(
        "--chat",
        is_flag=True,
        help="Records hold messages: written by the model's chat template, their roles logged.",
    ),
    click.option("--max-length", type=int, default=512, show_default=True, help="Tokens a window."),
    click.option("--max-tokens", type=int, help="Tokens to read of each source (default: all)."),
)
