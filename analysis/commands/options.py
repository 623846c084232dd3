"""What commands share: options, their readers, and where results go."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bhlog.analysis.output import print_frame
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.curve import BANDWIDTH_RULES, KERNELS

if TYPE_CHECKING:
    from bhlog.analysis.log import Log
    from bhlog.capture.contract.null.model import KdeModel


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


kde_option = click.option("--kde", metavar="FILE", help="Null model (default: the run's own).")

layers_option = click.option(
    "--layers", type=read_layers, metavar="LIST", help="Only these, such as 0-3,7."
)
where_option = click.option(
    "--where", metavar="SQL", help="Only rows that match, such as \"phase = 'decode'\"."
)
bounds_options = (
    click.option(
        "--min-k", type=int, help="Fewest experts a token (default: as in the run, or 1)."
    ),
    click.option(
        "--max-k", type=int, help="Most experts a token (default: as in the run, or all)."
    ),
)
rows_options = (
    layers_option,
    where_option,
    click.option(
        "--sample",
        type=float,
        default=1.0,
        show_default=True,
        metavar="SHARE",
        help="Only this share of the tokens, the same ones each time.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Threads that read (default: all)."),
)


def with_rows_options(command: Any) -> Any:
    """Add the options that say which rows of a run are read."""
    return _with(rows_options, command)


def with_replay_options(command: Any) -> Any:
    """Add the null model, bounds and rows of what decides again over a run."""
    return _with((kde_option, *bounds_options, layers_option, where_option), command)


def with_fit_options(*, as_fitted: bool) -> Callable[[Any], Any]:
    """Add kernel, bandwidth and trimming; left out they are those of the model, if as_fitted."""

    def option(name: str, default: Any, what: str, **kind: Any) -> Any:
        if as_fitted:
            return click.option(name, help=f"{what} (default: as fitted).", **kind)
        return click.option(name, default=default, show_default=True, help=f"{what}.", **kind)

    number: dict[str, Any] = {"type": click.IntRange(min=0), "metavar": "N"}
    level = "; a level that the file keeps" if as_fitted else ""
    bandwidth = "scott, silverman, isj, or the kernel's standard deviation in logits"
    options = (
        option("--kernel", "gaussian", "none is the empirical tail", type=click.Choice(KERNELS)),
        option("--bandwidth", "scott", bandwidth, type=read_bandwidth, metavar="RULE|LOGITS"),
        option("--trim-high", 0, f"Leave out each row's N largest logits{level}", **number),
        option("--trim-low", 0, f"Leave out each row's N smallest logits{level}", **number),
    )
    return lambda command: _with(options, command)


out_option = click.option(
    "--out", required=True, metavar="FILE", help="Where the null model is written."
)


def _with(options: tuple[Any, ...], command: Any) -> Any:
    for option in reversed(options):
        command = option(command)
    return command


def save_model(model: "KdeModel", out: str, output_format: str) -> None:
    """Write a null model and print a line per curve."""
    from bhlog.analysis.null.tables import curves_frame

    model.save(out)
    print_frame(curves_frame(model), output_format, title=out)


def open_run(run: str) -> "Log":
    """A run's log; says on stderr what is missing of it."""
    from bhlog.analysis.log import open_log

    log = open_log(run)
    if log.missing:
        click.echo(
            f"bhlog: {run}: {len(log.missing)} files are missing, from {log.missing[0]} on; what "
            "follows is of the rest: see bhlog verify",
            err=True,
        )
    return log


def load(file: str) -> "KdeModel":
    """A null model from our file, from a run that has one, or from a folder of old pickles."""
    from bhlog.capture.contract.null.pickles import load_kde_models

    own = Path(file) / "kde.parquet"
    return load_kde_models(own if own.is_file() else file)


def check_writable(out: str) -> None:
    """Raise InvalidOption if a file cannot be made at out, before the work rather than after."""
    path = Path(out)
    if path.is_dir():
        raise InvalidOption(f"{out}: is a folder; expected the name of a file")
    if not path.absolute().parent.is_dir():
        raise InvalidOption(f"{out}: its folder does not exist; make it first")


def check_figure(figure: str | None) -> None:
    """Raise InvalidOption if no figure can be written there."""
    if figure is not None:
        from bhlog.analysis.figures.file import check_figure_name

        check_figure_name(figure)
        check_writable(figure)


def write_figure(page: Any, figure: str) -> None:
    """Save a page and say so on stderr."""
    from bhlog.analysis.figures.file import save_figure

    save_figure(page, figure)
    click.echo(f"wrote {figure}", err=True)
