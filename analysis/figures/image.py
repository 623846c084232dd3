"""Figures on their way to a file."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from bhlog.analysis.figures.style import STYLE
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.uris import suffix_of


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure, whole or not at all; the file's suffix gives the format.

    Raises:
        InvalidOption: the file cannot be written there.
    """
    try:
        with whole_file(path) as file, mpl.rc_context(STYLE.settings):
            figure.savefig(file, format=suffix_of(path).lstrip("."))
    except OSError as error:
        raise InvalidOption(f"{path}: cannot be written ({error.strerror})") from error
    return Path(path)


def check_figure_name(path: str) -> None:
    """Raise InvalidOption unless the suffix names a format that figures can be written in."""
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if suffix_of(path).lstrip(".") not in known:
        raise InvalidOption(f"{path}: figures end in one of .{', .'.join(known)}")
