"""The prompt of bhlog sql: queries line by line, with history and completion."""

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from bhlog.analysis.cells import spelled_out
from bhlog.analysis.database.catalog import VIEWS, meaning
from bhlog.analysis.database.connection import Database
from bhlog.analysis.database.functions import FUNCTIONS
from bhlog.analysis.database.question import find_question, pairs, questions
from bhlog.analysis.database.result import print_result
from bhlog.capture.contract.errors import InvalidOption, RouterLogError

HELP = """\
Enter runs the query, Alt-Enter starts a new line, Tab completes, Ctrl-D leaves.
  .tables [VIEW]        the views and their columns; what a view's columns mean
  .list                 the questions of bhlog
  .query NAME [K=V...]  ask one
  .help, .quit"""

_KEYWORDS = """
SELECT FROM WHERE GROUP ORDER BY HAVING LIMIT JOIN LEFT USING ON AS WITH AND OR NOT IN IS NULL
BETWEEN CASE WHEN THEN ELSE END DISTINCT UNION ALL OVER PARTITION QUALIFY DESC ASC DESCRIBE
SUMMARIZE EXPLAIN ANALYZE avg count sum min max median unnest quantile_cont stddev_pop
"""
COMMANDS = (".tables", ".list", ".query", ".help", ".quit")


def run_prompt(
    database: Database,
    *,
    result_format: str = "table",
    max_rows: int = 1000,
    history: Path | None = None,
    **session: Any,
) -> None:
    """Read queries and print their results until the input ends.

    Args:
        result_format, max_rows: see print_result.
        history: file of earlier lines; None keeps them for this session only.
        session: options of PromptSession, such as input and output.
    """
    prompt: PromptSession[str] = PromptSession(
        history=_history(history),
        completer=SqlCompleter(database),
        complete_while_typing=False,
        key_bindings=_keys(),
        multiline=True,
        prompt_continuation="   ...> ",
        **session,
    )
    runs = spelled_out(", ".join(database.runs))
    print(f"{runs}: {', '.join(VIEWS)}. Enter .help for help.")
    while True:
        try:
            line = prompt.prompt("bhlog> ").strip()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if line in (".quit", ".exit", "quit", "exit"):
            return
        if not line:
            continue
        try:
            _answer(database, line, result_format, max_rows)
        except RouterLogError as error:
            click.echo(f"bhlog: {spelled_out(str(error))}", err=True)
        except KeyboardInterrupt:
            click.echo("bhlog: interrupted", err=True)


def history_path() -> Path:
    """Where the prompt keeps its lines: bhlog/sql_history in the user's state folder."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "bhlog" / "sql_history"


class SqlCompleter(Completer):
    """Completes keywords, functions, views and their columns, and the names of questions.

    After FROM and JOIN it offers views, after `view.` that view's columns; where the line names
    views, their columns and no others.
    """

    def __init__(self, database: Database) -> None:
        self._columns = database.columns()
        self._questions = [question.name for question in questions()]

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        before = document.text_before_cursor
        if before.startswith("."):
            word = before.split(" ")[-1]
            after = {".query": self._questions, ".tables": list(VIEWS)}
            command, blank, _ = before.partition(" ")
            names = after.get(command, []) if blank else list(COMMANDS)
            yield from _matching(names, word, "")
            return
        found = re.search(r"(?:(\w+)\.)?(\w*)$", before)
        view, word = (found[1], found[2]) if found else (None, "")
        if view in self._columns:
            for column in self._columns[view]:
                yield from _matching([column], word, meaning(view, column))
            return
        if re.search(r"\b(FROM|JOIN)\s+\w*$", before, re.IGNORECASE):
            yield from _matching(self._columns, word, "view")
            return
        named = [name for name in self._columns if re.search(rf"\b{name}\b", document.text)]
        columns = dict.fromkeys(c for name in named or self._columns for c in self._columns[name])
        yield from _matching(columns, word, "column")
        yield from _matching(self._columns, word, "view")
        yield from _matching(FUNCTIONS, word, "function")
        yield from _matching(_KEYWORDS.split(), word, "")


def _matching(names: Iterable[str], word: str, kind: str) -> Iterable[Completion]:
    for name in names:
        if name.lower().startswith(word.lower()):
            yield Completion(name, start_position=-len(word), display_meta=kind)


def _answer(database: Database, line: str, result_format: str, max_rows: int) -> None:
    if not line.startswith("."):
        _show(database, line, {}, result_format, max_rows)
        return
    try:
        command, *words = shlex.split(line)
    except ValueError as error:
        raise InvalidOption(f"cannot read {line!r}: {error}") from error
    if command == ".help":
        print(HELP)
    elif command == ".tables" and words:
        if words[0] not in VIEWS:
            raise InvalidOption(f"no view '{words[0]}'; views: {', '.join(VIEWS)}")
        print_result(*database.describe(words[0]), result_format, max_rows=max_rows)
    elif command == ".tables":
        for view, columns in database.columns().items():
            print(f"{view}: {', '.join(columns)}")
    elif command == ".list":
        for question in questions():
            print(f"{question.name}: {question.title}")
    elif command == ".query" and words:
        question = find_question(words[0])
        values = question.values(pairs(words[1:]))
        question.check(database, values)
        _show(database, question.text, values, result_format, max_rows)
    else:
        raise InvalidOption(f"no command '{line}'; commands: {', '.join(COMMANDS)}")


def _show(
    database: Database, query: str, values: dict[str, Any], result_format: str, max_rows: int
) -> None:
    schema, batches = database.batches(query, values)
    left_out = print_result(schema, batches, result_format, max_rows=max_rows)
    if left_out:
        print(f"{left_out:,} more rows")


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:  # a read-only home: the session still has its own history
        return InMemoryHistory()
    return FileHistory(str(path))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _run(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
