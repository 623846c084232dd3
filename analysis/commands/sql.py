"""bhlog sql: ask runs in SQL, by a query, by a question of sql/, or at a prompt."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bhlog.analysis.commands.options import load, open_run
from bhlog.capture.contract.errors import InvalidOption

if TYPE_CHECKING:
    from bhlog.analysis.database.database import Database

_RESULT_FORMATS = ("table", "json", "csv", "markdown", "parquet")

EPILOG = """\b
examples:
  bhlog sql runs/demo/native --query experts_per_token
  bhlog sql runs/demo/bh-0.3 \\
    "SELECT layer, avg(bh_count(logits, layer, .1)) FROM routing GROUP BY layer"
  bhlog sql --list
  bhlog sql --describe routing
"""


@click.command(epilog=EPILOG)
@click.argument("arguments", nargs=-1, metavar="RUN... [QUERY]")
@click.option(
    "--query", "name", metavar="NAME", help="A question of --list, or a file ending in .sql."
)
@click.option(
    "--param",
    "params",
    multiple=True,
    metavar="K=V",
    help="A parameter of the question; repeatable.",
)
@click.option("--list", "list_questions", is_flag=True, help="List the questions.")
@click.option(
    "--describe",
    metavar="NAME",
    help="What a question reads, takes and returns, or what the columns of a view mean.",
)
@click.option(
    "--format",
    "result_format",
    type=click.Choice(_RESULT_FORMATS),
    help="How the result prints; by default a table, or what the name of --out says.",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here."
)
@click.option(
    "--max-rows",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Most rows a printed table or Markdown shows.",
)
@click.option("--kde", type=click.Path(), help="Null model in place of the runs' own.")
@click.option("--memory-limit", metavar="SIZE", help="Such as 4GB; beyond it data spill to disk.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one a core.")
@click.option("--temp-dir", type=click.Path(file_okay=False), help="Where data spill to.")
@click.option(
    "--temp-limit", metavar="SIZE", default="16GB", show_default=True, help="Most that is spilled."
)
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds after which to stop."
)
@click.option(
    "--shell-command", is_flag=True, help="Print a command that opens the views in duckdb."
)
@click.option(
    "--unsafe",
    is_flag=True,
    help="Let SQL read and write any file, change settings and load extensions.",
)
def sql(
    arguments: tuple[str, ...],
    name: str | None,
    params: tuple[str, ...],
    list_questions: bool,
    describe: str | None,
    result_format: str | None,
    out: Path | None,
    max_rows: int,
    kde: str | None,
    memory_limit: str | None,
    threads: int | None,
    temp_dir: str | None,
    temp_limit: str,
    timeout: float | None,
    shell_command: bool,
    unsafe: bool,
) -> None:
    """Ask one run or several in SQL, as DuckDB understands it.

    Without QUERY and --query, a prompt opens. Views: routing, selections, tokens, runs, kde,
    replays, shards; their column `run` tells the runs apart. The connection reads the runs' files
    and nothing else.
    """
    if list_questions:
        _print_questions(result_format or "table")
        return
    if describe is not None:
        _describe(describe, result_format or "table")
        return
    runs, query = _runs_and_query(arguments)
    if name is not None and query is not None:
        raise InvalidOption("give a query or --query, not both")
    if name is None and params:
        raise InvalidOption("--param belongs to --query")
    from bhlog.analysis.database.database import connect
    from bhlog.analysis.database.question import find_question, pairs
    from bhlog.analysis.database.waiting import one_interrupt

    question = None if name is None else find_question(name)
    parameters = {} if question is None else question.values(pairs(params))
    click.get_current_context().with_resource(_warnings_in_one_line())
    database = connect(
        [open_run(run) for run in runs],
        kde=None if kde is None else load(kde),
        memory_limit=memory_limit,
        threads=threads,
        temp_dir=temp_dir,
        temp_limit=temp_limit,
        timeout=timeout,
        unsafe=unsafe,
    )
    with database:
        if shell_command:
            from bhlog.analysis.database.shell import shell_command as command_line

            click.echo(command_line(database.runs))
            return
        if question is not None:
            question.check(database)
            query = question.text
        if query is None and not sys.stdin.isatty():
            query = sys.stdin.read()
        if query is None:
            from bhlog.analysis.database.prompt import history_path, run_prompt

            run_prompt(
                database,
                result_format=result_format or "table",
                max_rows=max_rows,
                history=history_path(),
            )
            return
        for run, log in database.runs.items():
            if not log.shards:
                click.echo(f"bhlog: run '{run}' holds no rows yet ({log.path})", err=True)
        with one_interrupt():
            _answer(database, query, parameters, result_format, out, max_rows)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        click.echo(f"bhlog: {message}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _answer(
    database: "Database",
    query: str,
    parameters: dict[str, Any],
    result_format: str | None,
    out: Path | None,
    max_rows: int,
) -> None:
    from bhlog.analysis.database.result import SUFFIXES, print_result, write_result

    schema, batches = database.batches(query, parameters)
    if out is not None:
        rows = write_result(
            schema, batches, result_format or SUFFIXES.get(out.suffix, "table"), out
        )
        click.echo(f"{out}: {rows:,} rows", err=True)
        return
    left_out = print_result(schema, batches, result_format or "table", max_rows=max_rows)
    if left_out:
        click.echo(
            f"{left_out:,} more rows: raise --max-rows, or write all to --out FILE", err=True
        )


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


def _print_questions(result_format: str) -> None:
    import polars as pl

    from bhlog.analysis.database.question import questions
    from bhlog.analysis.database.result import print_result

    rows = pl.DataFrame(
        {
            "name": question.name,
            "question": question.title,
            "parameters": " ".join(parameter.name for parameter in question.parameters),
        }
        for question in questions()
    ).to_arrow()
    print_result(rows.schema, iter(rows.to_batches()), result_format, max_rows=rows.num_rows)


def _describe(name: str, result_format: str) -> None:
    from bhlog.analysis.database.catalog import VIEWS
    from bhlog.analysis.database.question import find_question

    if name not in VIEWS:
        click.echo(find_question(name).text, nl=False)
        return
    from bhlog.analysis.database.database import connect
    from bhlog.analysis.database.result import print_result

    with connect([]) as database:
        print_result(*database.describe(name), result_format, max_rows=1000)
