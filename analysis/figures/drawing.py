"""Drawing a run's figures: the files they become."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from bhlog.analysis.figures.image import save_figure
from bhlog.analysis.figures.page import page_of
from bhlog.analysis.figures.registry import figures, find_figure
from bhlog.analysis.figures.run_data import RunData
from bhlog.analysis.figures.style import STYLE, Style
from bhlog.analysis.log import Log
from bhlog.analysis.nulls import Named
from bhlog.analysis.output import write
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.files import make_folder
from bhlog.capture.contract.rule import OPEN, Bounds

Image = Literal["png", "svg", "pdf"]
IMAGES: tuple[Image, ...] = get_args(Image)


def draw_figures(
    log: Log,
    names: Sequence[str] | None = None,
    out: str | Path | None = None,
    *,
    kde: Named | None = None,
    alpha: float | None = None,
    bounds: Bounds = OPEN,
    image: Image = "png",
    data: bool = False,
    style: Style = STYLE,
    left_out: Callable[[str, str], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Path]:
    """Draw figures of a run into files; return their paths.

    Memory stays flat: p-values are those of a sample of rows, counts those of all rows.

    Args:
        names: figures of a run, by the names they are registered under; None draws all that the
            run can show.
        out: folder of the files; None is `figures` in the run's folder.
        kde: null model for p-values, see bhlog.analysis.nulls.load_null; None takes the run's own,
            or its empirical p-values.
        alpha: BH level to show; None takes the run's own, or 0.05 for a native run.
        bounds: on experts, where figures decide anew; what is open is as in the run.
        image: format of the files.
        data: whether the numbers behind each figure are written beside it too, as CSV.
        style: resolution and type.
        left_out: called with the name of a figure that the run cannot show, and why.
        progress: called with 1 after each figure.

    Raises:
        InvalidOption, KdeMismatch: no such figure, an option is out of range, the folder cannot be
            written, or the run cannot show a figure that was named.
    """
    if image not in IMAGES:
        raise InvalidOption(f"no image format '{image}'; formats: {', '.join(IMAGES)}")
    kinds = [find_figure(name) for name in names] if names is not None else figures().values()
    run = RunData(log, kde, alpha, bounds)
    folder = _folder(log, out)
    paths = []
    for kind in dict.fromkeys(kinds):
        try:
            numbers = kind.data(run)
        except (InvalidOption, KdeMismatch) as error:
            if names is not None:
                raise
            if left_out is not None:
                left_out(kind.name, str(error))
        else:
            page = page_of(kind, numbers, style)
            paths.append(save_figure(page, folder / f"{kind.name}.{image}"))
            if data:
                paths.append(folder / f"{kind.name}.csv")
                write(numbers.frame, out=paths[-1])
        if progress is not None:
            progress(1)
    return paths


def _folder(log: Log, out: str | Path | None) -> Path:
    if out is None and "://" in log.path:
        raise InvalidOption(f"{log.path} is not a local folder; say where figures go: --out DIR")
    folder = Path(log.path) / "figures" if out is None else Path(out)
    try:
        make_folder(folder)
    except OSError as error:
        raise InvalidOption(f"{folder}: cannot make the folder ({error.strerror})") from error
    return folder
