"""bhlog sql: ask runs in SQL, by a query, by a question of sql/, or at a prompt."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bhlog.analysis.commands.kinds import DESCRIBED, OUT_FOLDER, QUESTION, PathKind, QueryOrRun
from bhlog.analysis.commands.options import (
    Output,
    allow_memory,
    bundle,
    kde_option,
    null_named,
    open_run,
    output_options,
)
from bhlog.analysis.database.catalog import VIEWS
from bhlog.analysis.database.question import Question, find_question, pairs, questions
from bhlog.capture.contract.errors import InvalidOption

if TYPE_CHECKING:
    from bhlog.analysis.database.connection import Database

EPILOG = """\b
examples:
  bhlog sql runs/demo/native --query experts_per_token
  bhlog sql runs/demo/bh-0.3 \\
    "SELECT layer, avg(bh_count(logits, layer, .1)) FROM routing GROUP BY layer"
  bhlog sql --list
  bhlog sql --describe routing
"""


@dataclass(frozen=True)
class Asked:
    """What is asked, beside a query in SQL.

    Attributes:
        name: of a question, or a file of SQL.
        params: K=V, parameters of the question.
    """

    name: str | None
    params: tuple[str, ...]

    def question(self) -> tuple[Question | None, dict[str, Any]]:
        """The question, if one is named, and its parameters."""
        if self.name is None:
            if self.params:
                raise InvalidOption("--param belongs to --query")
            return None, {}
        question = find_question(self.name)
        return question, question.values(pairs(self.params))


asked_options = bundle(
    "asked",
    Asked,
    click.option(
        "--query",
        "name",
        type=QUESTION,
        metavar="NAME",
        help="A question of --list, or a file ending in .sql.",
    ),
    click.option(
        "--param",
        "params",
        multiple=True,
        metavar="K=V",
        help="A parameter of the question; repeatable.",
    ),
)
# what connect takes as it is
connection_options = bundle(
    "connection",
    dict,
    click.option(
        "--tokenizer",
        type=PathKind("dir", remote=True),
        metavar="NAME",
        help="Whose texts token_text(token_id) gives: a folder, a hub name, or bytes.",
    ),
    click.option(
        "--memory-limit",
        metavar="SIZE",
        callback=allow_memory,
        help="Such as 4GB; beyond it data go to disk. A file may claim as much.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Default: one a core."),
    click.option("--temp-dir", type=OUT_FOLDER, metavar="DIR", help="Where data spill to."),
    click.option(
        "--temp-limit",
        metavar="SIZE",
        default="16GB",
        show_default=True,
        help="Most that is spilled.",
    ),
    click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        help="Seconds after which to stop.",
    ),
    click.option(
        "--unsafe",
        is_flag=True,
        help="Let SQL read and write any file, change settings and load extensions.",
    ),
)


@click.command(epilog=EPILOG)
@click.argument("arguments", nargs=-1, type=QueryOrRun("file"), metavar="RUN... [QUERY]")
@asked_options
@click.option("--list", "list_questions", is_flag=True, help="List the questions.")
@click.option(
    "--describe",
    type=DESCRIBED,
    metavar="NAME",
    help="What a question reads, takes and returns, or what the columns of a view mean.",
)
@output_options()
@click.option(
    "--max-rows",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Most rows a printed table or Markdown shows.",
)
@kde_option
@connection_options
@click.option(
    "--shell-command", is_flag=True, help="Print a command that opens the views in duckdb."
)
def sql(
    arguments: tuple[str, ...],
    asked: Asked,
    list_questions: bool,
    describe: str | None,
    output: Output,
    max_rows: int,
    kde: str | None,
    connection: dict[str, Any],
    shell_command: bool,
) -> None:
    """Ask one run or several in SQL, as DuckDB understands it.

    Without QUERY and --query, a prompt opens. Views: routing, selections, tokens, runs, kde,
    replays, shards; their column `run` tells the runs apart. The connection reads the runs' files
    and nothing else.
    """
    if list_questions:
        _print_questions(output)
        return
    if describe is not None:
        _describe(describe, output)
        return
    runs, query = _runs_and_query(arguments)
    if asked.name is not None and query is not None:
        raise InvalidOption("give a query or --query, not both")
    question, parameters = asked.question()

    from bhlog.analysis.database.connection import connect

    click.get_current_context().with_resource(_warnings_in_one_line())
    logs = [open_run(run) for run in runs]
    with connect(logs, kde=null_named(kde), **connection) as database:
        if shell_command:
            from bhlog.analysis.database.shell import shell_command as command_line

            click.echo(command_line(database.runs))
            return
        if question is not None:
            question.check(database, parameters)
            query = question.text
        if query is None and not sys.stdin.isatty():
            query = sys.stdin.read()
        if query is None:
            _prompt(database, output, max_rows)
            return
        for run, log in database.runs.items():
            if not log.shards:
                click.echo(f"bhlog: run '{run}' holds no rows yet ({log.path})", err=True)
        written = output.write(database.batches(query, parameters), max_rows=max_rows)
    if written.left_out:
        click.echo(
            f"{written.left_out:,} more rows: raise --max-rows, or write all to --out FILE",
            err=True,
        )


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        click.echo(f"bhlog: {message}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _prompt(database: "Database", output: Output, max_rows: int) -> None:
    from bhlog.analysis.database.prompt import history_path, run_prompt

    run_prompt(database, result_format=output.kind, max_rows=max_rows, history=history_path())


def _runs_and_query(arguments: tuple[str, ...]) -> tuple[list[str], str | None]:
    """Runs are folders and URIs; what has blanks and is no folder is the query, and comes last."""
    *runs, last = arguments or ("",)
    if len(last.split()) < 2 or _exists(last):
        runs, query = [*runs, last], None
    else:
        query = last
    if not runs or not runs[0]:
        raise InvalidOption('name a run: bhlog sql RUN "SELECT ..."')
    return runs, query


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # longer than a name may be: a query
        return False


def _print_questions(output: Output) -> None:
    import polars as pl

    rows = [
        {
            "name": question.name,
            "question": question.title,
            "parameters": " ".join(parameter.name for parameter in question.parameters),
        }
        for question in questions()
    ]
    output.write(pl.DataFrame(rows))


def _describe(name: str, output: Output) -> None:
    if name not in VIEWS:
        click.echo(find_question(name).text, nl=False)
        return
    from bhlog.analysis.database.connection import connect

    with connect([]) as database:
        output.write(database.describe(name))
