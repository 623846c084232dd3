"""The page: panels one below the other in one file, with all that it needs inside."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bokeh.embed import components
from bokeh.resources import Resources

from bhlog.analysis.fold import Progress
from bhlog.analysis.report.calibrated import calibration
from bhlog.analysis.report.equal_cost import equal_cost
from bhlog.analysis.report.explorer import explorer_models
from bhlog.analysis.report.markup import Panel, filled, panel_html, shipped, text
from bhlog.analysis.report.mind import overview
from bhlog.analysis.report.packed import pack
from bhlog.analysis.report.reruns import saturation, trusted
from bhlog.analysis.report.subject import Subject
from bhlog.analysis.report.tokens import extremes, text_panel
from bhlog.analysis.report.which_experts import load, resident, sources
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch, RouterLogError
from bhlog.capture.contract.files import whole_file
from bhlog.capture.contract.uris import shown

MORE: tuple[tuple[str, Callable[[Subject], Panel | None]], ...] = (
    ("policies at equal cost", equal_cost),
    ("the text", text_panel),
    ("calibration", calibration),
    ("expert load", load),
    ("sources", sources),
    ("expert caches", resident),
    ("saturation", saturation),
    ("tokens with most and fewest experts", extremes),
    ("fidelity", trusted),
)


def report(
    subject: Subject, *, only_explorer: bool = False, progress: Progress | None = None
) -> str:
    """The page as text.

    Args:
        only_explorer: without the panels that read the log again.
        progress: called with 1 after each of those panels, of which there are len(MORE).

    Raises:
        KdeMismatch: the explorer alone is asked for and no null model serves any of the runs.
    """
    profiles = subject.profiles
    if only_explorer and not profiles:
        raise KdeMismatch(next(iter(subject.failed.values())))
    panels = [] if only_explorer else [overview(subject)]
    models: dict[str, Any] = {}
    packed = [pack(named, share=len(profiles)) for named in profiles]
    if profiles:
        models = explorer_models(profiles)
    for what, make in () if only_explorer else MORE:
        try:
            panel = make(subject)
        except RouterLogError as error:
            subject.failed[what] = str(error)
        else:
            panels += [] if panel is None else [panel]
        if progress is not None:
            progress(1)
    drawn = {f"plot_{i}": d.model for i, d in enumerate(d for p in panels for d in p.drawn)}
    every = {**models, **drawn}
    script, places = components(every) if every else ("", {})
    at = {id(model): places[name] for name, model in every.items()}
    explorer = _explorer(packed, {name: at[id(model)] for name, model in models.items()})
    place = 0 if only_explorer else 1
    sections = [panel_html(panel, at) for panel in panels]
    if explorer is not None:
        sections.insert(place, panel_html(explorer, at))
        panels.insert(place, explorer)
    if subject.failed and not only_explorer:
        panels.append(_left_out(subject))
        sections.append(panel_html(panels[-1], at))
    return filled(
        "page.html",
        bare=" data-bare" if only_explorer else "",
        version=text(version("bhlog")),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        title=text(title_of(subject)),
        css=shipped("page.css"),
        resources=_resources(),
        script="".join(map(shipped, ("explorer.js", "tokens.js", "page.js"))),
        links="".join(
            f'<li><a href="#{panel.key}">{text(panel.title)}</a></li>' for panel in panels
        ),
        panels="\n".join(sections),
        data=_data(packed),
        plots=script,
    )


def title_of(subject: Subject) -> str:
    """The runs by name, and the model."""
    names = [run.name for run in subject.runs]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
    return f"{shown}: {Path(subject.run.manifest.model.name).name}"


def write_report(
    subject: Subject, path: str | Path, progress: Progress | None = None
) -> Path | str:
    """Write the page, whole or not at all, and return where; see report.

    Args:
        path: or the URI of an object.

    Raises:
        InvalidOption: the file cannot be written there.
    """
    page = report(subject, progress=progress)
    try:
        with whole_file(path) as file:
            file.write(page.encode())
    except OSError as error:
        raise InvalidOption(f"{path}: cannot be written ({error.strerror})") from error
    return shown(path) if isinstance(path, str) and "://" in path else Path(path)


def _explorer(packed: Sequence[dict[str, Any]], places: dict[str, str]) -> Panel | None:
    if not packed:
        return None
    notes = dict.fromkeys(one["left_out"] for one in packed)
    body = filled("explorer.html", **places)
    body += "".join(f'<p class="note">{text(note)}</p>' for note in notes if note)
    return Panel(
        "explorer",
        "The alpha explorer",
        "What BH would have chosen at another alpha or within other bounds, from the logged "
        "logits: exact for the first layer, an estimate below it. The numbers are those of "
        "bhlog sweep.",
        body=body,
    )


def _data(packed: Sequence[dict[str, Any]]) -> str:
    """Profiles where the page's script finds them; no text in them ends the element."""
    if not packed:
        return ""
    data = json.dumps(packed, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="bhlog-profiles">{data}</script>'


def _left_out(subject: Subject) -> Panel:
    items = "".join(
        f"<li><strong>{text(what)}</strong>{text(why)}</li>" for what, why in subject.failed.items()
    )
    return Panel("left-out", "Left out", "", body=f'<ul class="mind">{items}</ul>')


def _resources() -> str:
    """Bokeh's own scripts: the core and its widgets."""
    found = Resources(mode="inline", components=["bokeh", "bokeh-widgets"])
    return str(found.render())
