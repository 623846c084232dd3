"""What an argument or option of the command line is: checked as it is read, completed by Tab."""

from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem

from bhlog.analysis.database.catalog import VIEWS
from bhlog.analysis.database.question import questions
from bhlog.capture.contract.alphas import read_file
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.uris import shown


class PathKind(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A path, completed by the shell.

    Args:
        what: "file" (which completes folders too, on the way to files) or "dir".
        remote: whether a URI such as s3://bucket/run will do.
    """

    name = "path"

    def __init__(self, what: str, *, remote: bool = False) -> None:
        self.what, self.remote = what, remote

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The path as text.

        Raises:
            InvalidOption: a URI where a path on this machine is expected.
        """
        text = str(value)
        if "://" in text and not self.remote:
            kind = "folder" if self.what == "dir" else "file"
            raise InvalidOption(
                f"{shown(text)}: is a URI; expected a {kind} on this machine: write it here, "
                "then copy it there"
            )
        return text

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type=self.what)]


class NameKind(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """One of some names, which are found when they are asked for; commands check them.

    Args:
        names: gives each name, and what it is in a few words.
        files: whether a file will do too.
    """

    name = "name"

    def __init__(self, names: Callable[[], Iterable[tuple[str, str]]], *, files: bool = False):
        self._names, self._files = names, files

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        found = [
            CompletionItem(name, help=what)
            for name, what in self._names()
            if name.startswith(incomplete)
        ]
        return found or [CompletionItem(incomplete, type="file" if self._files else "plain")]


class AlphaKind(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A BH level, or the file of one for each layer; gives a float, or such a policy."""

    name = "alpha"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The level or the policy.

        Raises:
            InvalidOption: it is no number, and no file of alphas.
        """
        from bhlog.capture.contract.named import Bh

        if isinstance(value, float | Bh):
            return value
        try:
            return float(value)
        except ValueError:
            return Bh.of_layers(read_file(value))

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class QueryOrRun(PathKind):
    """A run, or the query that follows the last of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)


RUN = PathKind("file", remote=True)  # also a profile
KDE = PathKind("file", remote=True)
OUT_FILE = PathKind("file", remote=True)
OUT_FOLDER = PathKind("dir")
OUT_PLACE = PathKind("dir", remote=True)


def policy_names() -> Iterable[tuple[str, str]]:
    """Policy families, with the colon that a value follows."""
    from bhlog.analysis.replay.registry import families

    for name, kind in families().items():
        yield f"{name}:", (kind.__doc__ or "").strip().splitlines()[0]


def figure_names() -> Iterable[tuple[str, str]]:
    """Figures of a run."""
    from bhlog.analysis.figures.registry import figures

    return ((name, kind.shows) for name, kind in figures().items())


def question_names() -> Iterable[tuple[str, str]]:
    """Questions of sql/."""
    return ((question.name, question.title) for question in questions())


def described_names() -> Iterable[tuple[str, str]]:
    """Views and questions."""
    yield from VIEWS.items()
    yield from question_names()


ALPHA = AlphaKind()
POLICY = NameKind(policy_names)
FIGURE = NameKind(figure_names)
QUESTION = NameKind(question_names, files=True)
DESCRIBED = NameKind(described_names)
