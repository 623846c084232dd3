"""The questions in sql/: what each answers, reads, takes and returns, as its header says."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bhlog.analysis.texts import TOKEN, other_texts, tokens_missing
from bhlog.capture.contract.errors import InvalidOption

if TYPE_CHECKING:
    from bhlog.analysis.database.connection import Database

TYPES: dict[str, type[int] | type[float] | type[str]] = {
    "integer": int,
    "number": float,
    "text": str,
}


def _no_token_ids(database: "Database", run: str) -> str | None:
    if database.runs[run].manifest.token_ids:
        return None
    return f"run '{run}' was captured without token ids, which this question needs"


def _no_sources(database: "Database", run: str) -> str | None:
    if _any_token(database, run, "SELECT any_value(source) FROM tokens WHERE run = $run"):
        return None
    return f"run '{run}' does not say which source a token is from, which this question needs"


def _no_losses(database: "Database", run: str) -> str | None:
    if _any_token(database, run, "SELECT any_value(nll) FROM tokens WHERE run = $run"):
        return None
    return f"run '{run}' holds no losses (nll), which this question needs"


def _any_token(database: "Database", run: str, query: str) -> bool:
    if not database.rows(run):
        return True  # an empty run has its own message
    return database.sql(query, {"run": run}).fetchall() != [(None,)]


def _not_two_alike(database: "Database", run: str) -> str | None:
    first, *others = database.runs.values()
    if not others:
        return "compares two runs: bhlog sql RUN OTHER --query ..."
    if any(log.n_experts != first.n_experts for log in others):
        return "the runs have different numbers of experts, which cannot be compared one by one"
    return None


def _other_text(database: "Database", runs: list[str]) -> InvalidOption | None:
    """The error of runs that do not hold the same text, each compared with the first."""
    first = runs[0] if runs else ""
    for other in runs[1:]:
        ((ours, theirs, both, unlike),) = database.sql(
            "SELECT count(a.run), count(b.run), "
            "count(*) FILTER (WHERE a.run IS NOT NULL AND b.run IS NOT NULL), "
            "count(*) FILTER (WHERE a.token_id <> b.token_id) "
            "FROM (SELECT * FROM tokens WHERE run = $first) AS a FULL JOIN "
            f"(SELECT * FROM tokens WHERE run = $other) AS b USING ({', '.join(TOKEN)})",
            {"first": first, "other": other},
        ).fetchall()
        paths = database.runs[first].path, database.runs[other].path
        if unlike:
            return other_texts(*paths)
        fewer, run, whole = min((ours, *paths), (theirs, *reversed(paths)))
        if both < fewer:
            return tokens_missing(fewer - both, fewer, run, whole)
    return None


# What a header may ask for on a line "Needs": gives what a run lacks, or None.
NEEDS: dict[str, Callable[["Database", str], str | None]] = {
    "token ids": _no_token_ids,
    "sources": _no_sources,
    "losses": _no_losses,
    "two runs": _not_two_alike,
    "the same text": lambda database, run: None,  # of runs together: see Question.check
}

_PARAMETER = re.compile(
    r"\$(?P<name>\w+) +(?P<type>\w+)(?: += +(?P<default>\S+))?(?:  +(?P<about>.*))?"
)
_SECTION = re.compile(r"(Reads|Needs|Param|Returns) +(.*)")


@dataclass(frozen=True)
class Parameter:
    """A $name of a question.

    Attributes:
        name: without the dollar.
        type: integer, number or text.
        default: None stands for NULL.
        required: whether a value must be given.
        about: what it does.
    """

    name: str
    type: str
    default: int | float | str | None
    required: bool
    about: str

    def value(self, text: str) -> int | float | str | None:
        """The value that text spells; "null" is None.

        Raises:
            InvalidOption: text is not of the parameter's type.
        """
        if text.lower() == "null":
            return None
        try:
            return TYPES[self.type](text)
        except ValueError as error:
            raise InvalidOption(f"${self.name} takes {_a(self.type)}, got {text!r}") from error


@dataclass(frozen=True)
class Question:
    """One file of sql/.

    Attributes:
        name: file name without .sql.
        title: the question.
        notes: definitions and formulas, "" if there are none.
        reads, returns: views it reads; its rows and columns.
        needs: what runs must have, of NEEDS.
        parameters: what $names it takes.
        text: the whole file.
    """

    name: str
    title: str
    notes: str
    reads: str
    needs: tuple[str, ...]
    returns: str
    parameters: tuple[Parameter, ...]
    text: str

    def check(self, database: "Database", values: Mapping[str, Any] | None = None) -> None:
        """Check that the opened runs have what the question needs.

        Args:
            values: of the parameters, which may name the two runs that are compared.

        Raises:
            InvalidOption: a run lacks it, in a line that says which.
        """
        for need in self.needs:
            for run in database.runs:
                reason = NEEDS[need](database, run)
                if reason:
                    raise InvalidOption(f"{self.name}: {reason}")
        if "the same text" in self.needs:
            error = _other_text(database, self._compared(database, values or {}))
            if error is not None:
                raise error

    def _compared(self, database: "Database", values: Mapping[str, Any]) -> list[str]:
        """The two runs that the parameters name, by default the first and the last one opened."""
        opened = list(database.runs)
        given = [values.get(p.name) for p in self.parameters if p.type == "text"]
        named = [run or opened[-at] for at, run in enumerate(given)]
        return [run for run in named if run in database.runs]

    def values(self, given: Mapping[str, str]) -> dict[str, Any]:
        """A value for each parameter: the given texts, defaults for the others.

        Raises:
            InvalidOption: no such parameter, a required one is missing, or a value does not fit.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        for name in given:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"it takes: {', '.join(known)}"
                if not known:
                    hint = "it takes none"
                raise InvalidOption(f"{self.name}: no parameter '{name}'; {hint}")
        missing = [p.name for p in self.parameters if p.required and p.name not in given]
        if missing:
            raise InvalidOption(
                f"{self.name}: needs a value for {', '.join(missing)}; "
                f"give it with --param {missing[0]}=VALUE"
            )
        return {
            name: parameter.value(given[name]) if name in given else parameter.default
            for name, parameter in known.items()
        }


def parse_question(name: str, text: str) -> Question:
    """Read a file of sql/: comment lines at its start, then one statement.

    Raises:
        InvalidOption: the header has a parameter or a need that cannot be read.
    """
    lines = []
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        lines.append(line[2:].removeprefix(" ").rstrip())
    if lines and lines[0] == f"{name}.sql":
        del lines[0]
    paragraphs: list[str] = [""]
    sections: list[list[str]] = []
    for line in lines:
        section = _SECTION.match(line)
        if section:
            sections.append([section[1], section[2]])
        elif sections and line:
            sections[-1][1] += " " + line.strip()
        elif not line:
            paragraphs.append("")
        else:
            paragraphs[-1] += ("\n" if paragraphs[-1] else "") + line
    unknown = [body for kind, body in sections if kind == "Needs" and body not in NEEDS]
    if unknown:
        raise InvalidOption(f"{name}: needs '{unknown[0]}'; expected one of {', '.join(NEEDS)}")
    title, *notes = [paragraph for paragraph in paragraphs if paragraph] or [""]
    return Question(
        name=name,
        title=" ".join(title.split()),
        notes="\n\n".join(notes),
        reads=" ".join(body for kind, body in sections if kind == "Reads"),
        needs=tuple(body for kind, body in sections if kind == "Needs"),
        returns=" ".join(body for kind, body in sections if kind == "Returns"),
        parameters=tuple(_parameter(name, body) for kind, body in sections if kind == "Param"),
        text=text,
    )


def questions() -> list[Question]:
    """All questions that come with bhlog, by name."""
    return [
        parse_question(file.name.removesuffix(".sql"), file.read_text(encoding="utf-8"))
        for file in sorted(files("bhlog.sql").iterdir(), key=lambda file: file.name)
        if file.name.endswith(".sql")
    ]


def find_question(name: str) -> Question:
    """A question by its name, or from a file by a path that ends in .sql.

    Raises:
        InvalidOption: no such question, or the file cannot be read.
    """
    known = {question.name: question for question in questions()}
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix == ".sql" and (path.exists() or path.stem not in known):
        try:
            return parse_question(path.stem, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidOption(f"{name}: cannot be read as a question ({error})") from error
    near = get_close_matches(path.stem, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"questions: {', '.join(known)}"
    raise InvalidOption(f"no question '{name}'; {hint}")


def pairs(params: Iterable[str]) -> dict[str, str]:
    """NAME=VALUE texts as a mapping.

    Raises:
        InvalidOption: one has no "=".
    """
    values = {}
    for param in params:
        key, equals, value = param.partition("=")
        if not equals:
            raise InvalidOption(f"a parameter is NAME=VALUE, got {param!r}")
        values[key.removeprefix("$")] = value
    return values


def _parameter(question: str, body: str) -> Parameter:
    match = _PARAMETER.fullmatch(body)
    if match is None or match["type"] not in TYPES:
        raise InvalidOption(
            f"{question}: cannot read the parameter '{body}'; expected "
            "'$name integer|number|text = default  what it does'"
        )
    blank = Parameter(match["name"], match["type"], None, True, match["about"] or "")
    if match["default"] is None:
        return blank
    return Parameter(
        blank.name, blank.type, blank.value(match["default"]), False, match["about"] or ""
    )


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
