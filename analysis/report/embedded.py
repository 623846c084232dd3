"""The explorer in a notebook's output: the page in a frame of its own."""

from dataclasses import dataclass
from html import escape

from bhlog.analysis.report.document import report
from bhlog.analysis.report.subject import Subject

HEIGHT = 1_180  # pixels: the explorer at the width of a cell


@dataclass(frozen=True, repr=False)
class Explorer:
    """What a cell of a notebook shows.

    Attributes:
        page: the whole page, which asks no server for anything.
        name: of the runs.
    """

    page: str
    name: str

    def __repr__(self) -> str:
        return f"Explorer({self.name}: shows itself in a notebook; else bhlog explore RUN)"

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self.page)}" title="The alpha explorer of '
            f'{escape(self.name)}" style="width:100%;height:{HEIGHT}px;border:0"></iframe>'
        )


def explorer_of(subject: Subject) -> Explorer:
    """The explorer alone.

    Raises:
        KdeMismatch: no null model serves any of the runs.
    """
    return Explorer(report(subject, only_explorer=True), ", ".join(r.name for r in subject.runs))
