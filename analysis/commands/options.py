"""Options that commands share, each bundle of them built once into one frozen value."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bhlog.analysis.commands.kinds import KDE, OUT_FILE
from bhlog.analysis.commands.scheduler import scheduler_option
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.files import make_folder
from bhlog.capture.contract.sizes import bytes_of
from bhlog.capture.contract.store import Store
from bhlog.capture.contract.uris import shown

if TYPE_CHECKING:
    import polars as pl

    from bhlog.analysis.fold import Scope
    from bhlog.analysis.output import Batches, Written
    from bhlog.analysis.run import Run
    from bhlog.capture.contract.null.model import KdeModel
    from bhlog.capture.contract.rule import Bounds

FORMATS = ("table", "json", "csv", "markdown", "parquet")  # as in bhlog.analysis.output
# as in contract.null.curve
KERNELS = ("gaussian", "epanechnikov", "tophat", "triangular", "none", "conformal")
CENTRES = ("none", "median")  # as in contract.rule
BANDWIDTH_RULES = ("scott", "silverman", "nrd0", "isj")

Decorator = Callable[[Any], Any]


def bundle(name: str, make: Callable[..., Any], *options: Decorator) -> Decorator:
    """A decorator that adds options to a command and gives it one argument made from their values.

    Args:
        name: of the argument.
        make: takes the options' values by name; called when the command runs.
    """

    def decorate(command: Any) -> Any:
        keys: list[str] = []

        @functools.wraps(command)
        def call(*args: Any, **values: Any) -> Any:
            made = make(**{key: values.pop(key) for key in keys})
            return command(*args, **values, **{name: made})

        parameters: list[click.Parameter] = getattr(call, "__click_params__", [])
        before = len(parameters)
        for option in reversed(options):
            option(call)
        keys += [str(p.name) for p in call.__click_params__[before:]]  # type: ignore[attr-defined]
        return call

    return decorate


def read_bandwidth(text: str) -> str | float:
    """A rule's name or a number of logits."""
    try:
        return float(text)
    except ValueError:
        if text in BANDWIDTH_RULES:
            return text
        raise click.BadParameter(
            f"{text!r} is neither {', '.join(BANDWIDTH_RULES)} nor a number"
        ) from None


def read_layers(text: str) -> tuple[int, ...]:
    """Layers, from text such as 0-3,7."""
    layers: list[int] = []
    for part in text.split(","):
        low, _, high = part.strip().partition("-")
        if not (low.isdigit() and (high or low).isdigit() and int(low) <= int(high or low) < 65536):
            raise click.BadParameter(f"{text!r} is not a list of layers such as 0-3,7")
        layers += range(int(low), int(high or low) + 1)
    return tuple(layers)


def read_trim(text: str) -> tuple[int, int]:
    """A trimming level, from text such as 0:8."""
    try:
        low, high = text.split(":")
        return int(low), int(high)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a trimming level such as 0:8") from None


@dataclass(frozen=True)
class Output:
    """Where and how a command's result goes.

    Attributes:
        format: one of FORMATS; None is what the name of `file` says, or a table.
        file: written in place of stdout, if given.
    """

    format: str | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        if self.file is not None:
            make_room(self.file)
        elif self.format == "parquet":
            raise InvalidOption("parquet is not for a terminal: give --out FILE.parquet")

    @property
    def kind(self) -> str:
        """The format in force."""
        from bhlog.analysis.output import format_of

        return format_of(self.format, self.file)

    @property
    def for_people(self) -> bool:
        """Whether people read it: then columns may be chosen that fit a screen."""
        return self.kind in ("table", "markdown")

    def write(
        self, result: "pl.DataFrame | Batches", *, title: str = "", max_rows: int | None = None
    ) -> "Written":
        """Write a result; says on stderr what a file got."""
        from bhlog.analysis.output import write

        written = write(result, self.format, self.file, title=title, max_rows=max_rows)
        if self.file is not None:
            click.echo(f"{shown(self.file)}: {written.rows:,} rows", err=True)
        return written


def output_options(flag: str = "--out") -> Decorator:
    """Add --format and the file that the result is written to, as one Output, `output`.

    Args:
        flag: of the file; another one where --out is what the command makes.
    """
    return bundle(
        "output",
        lambda format, result_file: Output(format, result_file),
        click.option(
            "--format",
            type=click.Choice(FORMATS),
            help="How the result prints; by default a table, or what the file's name says.",
        ),
        click.option(
            flag, "result_file", type=OUT_FILE, metavar="FILE", help="Write the result here."
        ),
    )


def allow_memory(ctx: click.Context, _: click.Parameter, size: str | None) -> str | None:
    """Let files claim as much memory until the command ends."""
    from bhlog.capture.contract.opening import MEMORY_LIMIT

    if size is not None:
        bytes_of(size)
        before = os.environ.get(MEMORY_LIMIT)
        ctx.call_on_close(functools.partial(_restore, MEMORY_LIMIT, before))
        os.environ[MEMORY_LIMIT] = size
    return size


def _restore(name: str, before: str | None) -> None:
    if before is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = before


memory_option = click.option(
    "--memory-limit",
    metavar="SIZE",
    expose_value=False,
    callback=allow_memory,
    help="Memory that a file may claim, such as 8GB (default: in proportion to its bytes).",
)


def centre_option(help: str, *, default: str | None = None) -> Decorator:
    """Add --centre: what logits are less of before they are tested."""
    kind = click.Choice(CENTRES)
    return click.option(
        "--centre", type=kind, default=default, show_default=default is not None, help=help
    )


kde_option = click.option(
    "--kde", type=KDE, metavar="FILE", help="Null model, or a run that has one (default: its own)."
)


def _bounds(min_k: int | None, max_k: int | None) -> "Bounds":
    from bhlog.capture.contract.rule import Bounds

    return Bounds(min_k, max_k)


def bounds_options(
    otherwise: tuple[str, str] = ("as in the run, or 1", "as in the run, or all"),
) -> Decorator:
    """Add --min-k and --max-k, as one Bounds, `bounds`.

    Args:
        otherwise: what they are where they are left out, in words.
    """
    low, high = otherwise
    return bundle(
        "bounds",
        _bounds,
        click.option("--min-k", type=int, help=f"Fewest experts a token (default: {low})."),
        click.option("--max-k", type=int, help=f"Most experts a token (default: {high})."),
    )


def _scope(layers: tuple[int, ...] | None, where: str | None, sample: float, **how: Any) -> "Scope":
    from bhlog.analysis.fold import Scope

    return Scope(layers, where, sample, **how)


scope_options = bundle(
    "scope",
    _scope,
    click.option("--layers", type=read_layers, metavar="LIST", help="Only these, such as 0-3,7."),
    click.option(
        "--where",
        metavar="SQL",
        help="Only rows that match a condition on columns of routing and tokens, such as "
        "\"phase = 'decode'\" or \"source = 'notes.txt'\".",
    ),
    click.option(
        "--sample",
        type=float,
        default=1.0,
        show_default=True,
        metavar="SHARE",
        help="Only this share of the tokens, the same ones each time.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Threads that read (default: all)."),
    scheduler_option,
)


def fit_options(*, as_fitted: bool) -> Decorator:
    """Add kernel, bandwidth and trimming; left out they are those of the model, if as_fitted."""

    def option(name: str, default: Any, what: str, **kind: Any) -> Any:
        if as_fitted:
            return click.option(name, help=f"{what} (default: as fitted).", **kind)
        return click.option(name, default=default, show_default=True, help=f"{what}.", **kind)

    number: dict[str, Any] = {"type": click.IntRange(min=0), "metavar": "N"}
    level = "; a level that the file keeps" if as_fitted else ""
    bandwidth = (
        "scott: sd n^-1/5; silverman: 1.06 times that, whatever the quartiles; nrd0: R's default, "
        "0.9 min(sd, IQR / 1.34) n^-1/5; isj: improved Sheather-Jones, silverman where it has no "
        "root; or the kernel's standard deviation in logits"
    )
    return bundle(
        "fit",
        dict,
        option(
            "--kernel",
            "gaussian",
            "none is the empirical tail, conformal (1 + #{logits >= x}) / (n + 1)",
            type=click.Choice(KERNELS),
        ),
        option("--bandwidth", "scott", bandwidth, type=read_bandwidth, metavar="RULE|LOGITS"),
        option("--trim-high", 0, f"Leave out each row's N largest logits{level}", **number),
        option("--trim-low", 0, f"Leave out each row's N smallest logits{level}", **number),
        option(
            "--null-from",
            "kept",
            "The logits that trimming keeps, or central: Efron's empirical null, a normal curve "
            "matched to the middle half of all of them, which lfdr:X needs",
            type=click.Choice(("kept", "central")),
        ),
    )


def model_out(command: Any) -> Any:
    """Add --out, where a null model is written; its folder is made."""
    option = click.option(
        "--out",
        required=True,
        type=OUT_FILE,
        metavar="FILE",
        callback=lambda _, __, out: make_room(out),
        help="Where the null model is written.",
    )
    return option(command)


def save_model(model: "KdeModel", out: str, output: Output) -> None:
    """Write a null model, and a line per curve."""
    from bhlog.analysis.null.tables import curves_frame

    model.save(out)
    output.write(curves_frame(model), title=shown(out))


def open_run(run: str) -> "Run":
    """A run; says on stderr what is missing of it."""
    from bhlog.analysis.run import Run

    log = Run(run)
    if gap := log.gap:
        click.echo(f"bhlog: {gap}", err=True)
    return log


def load_null(named: str) -> "KdeModel":
    """The null model of a file, of a run that has one, or of a folder of old pickles."""
    from bhlog.analysis.nulls import load_null as load

    return load(named)


def null_named(kde: str | None) -> "KdeModel | None":
    """The same for an option that may be left out."""
    return None if kde is None else load_null(kde)


def note_one_sequence(errors: "pl.Series") -> None:
    """Say on stderr why there are no standard errors, where there are none."""
    if len(errors) and errors.is_null().all():
        click.echo(
            "bhlog: no standard errors: they are clustered by sequence, and all rows are of one",
            err=True,
        )


def note_summary(frame: "pl.DataFrame", log: "Run", scope: "Scope", output: Output) -> None:
    """Say on stderr what a summary of decisions lacks, and to people what noise is."""
    from bhlog.analysis.replay.empirical import missing_rows

    note_one_sequence(frame["mean_experts_se"])
    if missing := missing_rows(log, scope):
        click.echo(f"bhlog: distinct_experts is of whole forwards, but {missing}", err=True)
    rows = [n for n in frame["noise_rows"].filter(frame["layer"].is_not_null()) if n]
    if rows and output.for_people:
        click.echo(
            "bhlog: noise_experts: the same rule where each expert's logits are shuffled over a "
            f"sample of {max(rows):,} tokens a layer",
            err=True,
        )


def make_room(out: str) -> str:
    """Make the folder of a file to be written, before the work rather than after.

    Raises:
        InvalidOption: it cannot be made, a folder is where the file is to be, or there is no such
            bucket.
        MissingRun: the store of a URI does not answer.
    """
    if "://" in out:
        Store(out).check()
        return out
    path = Path(out)
    if path.is_dir():
        raise InvalidOption(f"{out}: is a folder; expected the name of a file")
    try:
        make_folder(path.absolute().parent)
    except OSError as error:
        raise InvalidOption(f"{out}: its folder cannot be made ({error.strerror})") from error
    return out


figure_option = click.option("--figure", type=OUT_FILE, metavar="FILE", help="Draw it here.")


def check_figure(figure: str | None) -> None:
    """Raise InvalidOption if no figure can be written there."""
    if figure is not None:
        from bhlog.analysis.figures.image import check_figure_name

        check_figure_name(figure)
        make_room(figure)


def write_figure(of: Any, name: str, subject: Any, figure: str) -> None:
    """Draw a registered figure of a subject into a file, and say so on stderr."""
    from bhlog.analysis.figures.image import save_figure
    from bhlog.analysis.figures.page import draw_page
    from bhlog.analysis.figures.registry import find_figure

    save_figure(draw_page(find_figure(name, of), subject), figure)
    click.echo(f"wrote {shown(figure)}", err=True)
