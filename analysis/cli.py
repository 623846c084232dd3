"""The `bhlog` command: finds a subcommand, runs it, and turns errors into one line."""

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

import click

from bhlog.analysis.cells import spelled_out
from bhlog.analysis.imports import leave_out_unneeded
from bhlog.analysis.interrupts import deaf, patient
from bhlog.analysis.memory_limit import is_limited, is_out_of_memory, supervise, told
from bhlog.capture.contract.errors import MissingExtra, RouterLogError

# Where each command is defined, and its line in the list: a module is imported when it is used.
COMMANDS = {
    "demo": (
        "bhlog.capture.apps.commands:demo",
        "The whole story in a minute: capture, fit, route, replay,...",
    ),
    "capture": (
        "bhlog.capture.apps.commands:capture",
        "Run text through a model and log its routing.",
    ),
    "eval": (
        "bhlog.capture.apps.evaluation:evaluate",
        "Benchmark scores of a model under native routing and under...",
    ),
    "info": (
        "bhlog.analysis.commands.info:info",
        "What a run is and what it holds.",
    ),
    "verify": (
        "bhlog.analysis.commands.info:verify",
        "Is a run whole, and does replay reproduce it?",
    ),
    "fidelity": (
        "bhlog.analysis.commands.replay:fidelity",
        "How far a what-if can be trusted: replay NATIVE at the...",
    ),
    "replay": (
        "bhlog.analysis.commands.replay:replay",
        "Recompute a run's expert selection at other values of alpha.",
    ),
    "sweep": (
        "bhlog.analysis.commands.sweep:sweep",
        "Mean experts per token at many alphas, from one pass over the...",
    ),
    "compare": (
        "bhlog.analysis.commands.compare:compare",
        "Compare policies over a run: what each would have chosen, and...",
    ),
    "import": (
        "bhlog.analysis.commands.importing:import_",
        "Write another engine's log of its routing as a run.",
    ),
    "export": (
        "bhlog.analysis.commands.exporting:export",
        "Write an answer in the file that another engine reads.",
    ),
    "cache": (
        "bhlog.analysis.commands.expert_cache:cache",
        "Hit rates of caches of experts, over a run in the order that...",
    ),
    "kde": (
        "bhlog.analysis.commands.kde:kde",
        "Fit, inspect and check null models.",
    ),
    "sql": (
        "bhlog.analysis.commands.sql:sql",
        "Ask one run or several in SQL, as DuckDB understands it.",
    ),
    "plot": (
        "bhlog.analysis.commands.plot:plot",
        "Draw figures of a run; without FIGURE, all that it can show.",
    ),
    "report": (
        "bhlog.analysis.commands.report:report",
        "One page about runs that opens from a disk: an explorer of...",
    ),
    "explore": (
        "bhlog.analysis.commands.report:explore",
        "Write the report to a temporary file and open it in the browser.",
    ),
}


_BOKEH = "bhlog.analysis.commands.report:"


class LazyGroup(click.Group):
    """A group whose subcommands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, short) for name, (_, short) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}"
            ctx.fail(f"no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="bhlog")
def bhlog() -> None:
    """Record the routers of mixture-of-experts models, replay their decisions offline.

    RUN is the folder that bhlog capture wrote, or a URI such as s3://bucket/run.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `bhlog`; a user's mistake ends in one line on stderr and exit code 1."""
    if arguments is None and is_limited():
        supervise()
    if arguments is None and sys.argv[1:2] and _is_offline(sys.argv[1]):
        leave_out_unneeded()
    try:
        with patient(), _written():
            code = bhlog.main(
                args=None if arguments is None else list(arguments), standalone_mode=False
            )
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except RouterLogError as error:
        memory = is_limited() and is_out_of_memory(error)
        click.echo(told() if memory else f"bhlog: {spelled_out(str(error))}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "safetensors"):
            raise
        click.echo(f"bhlog: {_missing(error.name)}", err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        if arguments is None:
            deaf()
        click.echo("bhlog: interrupted", err=True)
        sys.exit(130)
    except Exception as error:
        if not isinstance(error, OSError) and not is_out_of_memory(error):
            raise
        click.echo(told() if is_out_of_memory(error) else f"bhlog: {_words(error)}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _written() -> Iterator[None]:
    """A block after which stdout is written; if it cannot be, it is let go.

    Raises:
        OSError: it cannot be: the disk under it is full.
    """
    if sys.stdout is None:  # it was closed: >&-
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, RouterLogError) and error.filename is None:
            with suppress(OSError, ValueError):  # or Python would try once more, and tell of it
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _words(error: Exception) -> str:
    """An error of the system's, in a line."""
    where = getattr(error, "filename", None)
    why = getattr(error, "strerror", None) or error
    return spelled_out(f"{where or 'the output'}: {why}")


def _is_offline(command: str) -> bool:
    """Whether it needs no pandas: Bokeh asks where it is."""
    module = COMMANDS[command][0] if command in COMMANDS else ""
    return module.startswith("bhlog.analysis.") and not module.startswith(_BOKEH)


def _missing(name: str) -> MissingExtra:
    return MissingExtra(f"this command needs {name}: pip install 'bhlog[capture]'")
