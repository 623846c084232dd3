"""What the `bhlog kde` commands share: options and their readers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from capture.contract.errors import InvalidOption

if TYPE_CHECKING:
    from capture.contract.kde import KdeModel

KERNELS = ("gaussian", "epanechnikov", "tophat", "triangular", "none")


def bandwidth_option(text: str) -> str | float:
    """A rule's name or a number of logits."""
    try:
        return float(text)
    except ValueError:
        if text in ("scott", "silverman", "isj"):
            return text
        raise click.BadParameter(
            f"{text!r} is neither scott, silverman, isj nor a number"
        ) from None


def layers_option(text: str) -> tuple[int, ...]:
    """Layers, from text such as 0-3,7."""
    layers: list[int] = []
    try:
        for part in text.split(","):
            low, _, high = part.partition("-")
            layers += range(int(low), int(high or low) + 1)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of layers such as 0-3,7") from None
    return tuple(layers)


def trim_option(text: str) -> tuple[int, int]:
    """A trimming level, from text such as 0:8."""
    try:
        low, high = text.split(":")
        return int(low), int(high)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a trimming level such as 0:8") from None


rows_options = (
    click.option("--layers", type=layers_option, metavar="LIST", help="Only these, such as 0-3,7."),
    click.option(
        "--where", metavar="SQL", help="Only rows that match, such as \"phase = 'decode'\"."
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
)


def with_rows_options(command: Any) -> Any:
    """Add the options that say which rows of a run are read."""
    for option in reversed(rows_options):
        command = option(command)
    return command


def load(file: str) -> "KdeModel":
    """A null model from our file or from a folder of old pickles."""
    from capture.contract.pickles import load_kde_models

    return load_kde_models(file)


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
        from analysis.kde.figures import check_figure_name

        check_figure_name(figure)
        check_writable(figure)


def write_figure(page: Any, figure: str) -> None:
    """Save a page and say so on stderr."""
    page.savefig(figure)
    click.echo(f"wrote {figure}", err=True)
