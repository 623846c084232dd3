"""Markup: text, tables and commands as HTML, harmless whatever a log says."""

from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import polars as pl

from bhlog.analysis.cells import cell, spelled_out

MOST_ROWS = 2_048  # of a table on the page


@dataclass(frozen=True)
class Drawn:
    """A plot of a panel.

    Attributes:
        caption: what it shows, in words.
        model: the plot.
        note: how to read it.
    """

    caption: str
    model: Any
    note: str = ""


@dataclass(frozen=True)
class Listed:
    """A table of a panel.

    Attributes:
        caption: what the rows are.
        frame: its numbers.
        shown: whether it is open from the start.
    """

    caption: str
    frame: pl.DataFrame
    shown: bool = False


@dataclass(frozen=True)
class Panel:
    """One part of the page.

    Attributes:
        key: in links.
        title: its heading.
        lead: what it says, in a sentence or two.
        drawn, listed: plots, and tables of their numbers.
        commands: that give the same in a terminal.
        body: more HTML, before the plots.
    """

    key: str
    title: str
    lead: str
    drawn: tuple[Drawn, ...] = ()
    listed: tuple[Listed, ...] = ()
    commands: tuple[str, ...] = ()
    body: str = ""


def text(value: object) -> str:
    """A value as HTML text."""
    return escape(spelled_out(str(value)))


def shipped(name: str) -> str:
    """A file beside this one."""
    return (files(__package__) / name).read_text(encoding="utf-8")


def filled(name: str, **parts: str) -> str:
    """A template beside this file with its parts in their places."""
    return Template(shipped(name)).substitute(parts)


def panel_html(panel: Panel, places: dict[int, str]) -> str:
    """A panel.

    Args:
        places: what holds each plot, by the id() of its model.
    """
    parts = [f'<section id="{panel.key}" aria-labelledby="{panel.key}-title">']
    parts.append(f'<h2 id="{panel.key}-title">{text(panel.title)}</h2>')
    if panel.lead:
        parts.append(f'<p class="lead">{text(panel.lead)}</p>')
    parts.append(panel.body)
    if panel.drawn:
        plots = (_figure(drawn, places[id(drawn.model)]) for drawn in panel.drawn)
        parts.append(f'<div class="plots">{"".join(plots)}</div>')
    if panel.listed:
        parts.append(f'<div class="tables">{"".join(map(_details, panel.listed))}</div>')
    parts += map(command_html, panel.commands)
    return "\n".join([*parts, "</section>"])


def _figure(drawn: Drawn, place: str) -> str:
    note = f" <span>{text(drawn.note)}</span>" if drawn.note else ""
    return f"<figure><figcaption>{text(drawn.caption)}{note}</figcaption>{place}</figure>"


def _details(listed: Listed) -> str:
    name, shown = text(listed.caption), " open" if listed.shown else ""
    table = table_html(listed.frame, listed.caption)
    return f"<details{shown}><summary>{name}</summary>{table}</details>"


def table_html(frame: pl.DataFrame, caption: str) -> str:
    """A table to sort, its first rows; cells as in a terminal, sorted by their whole values."""
    numeric = [dtype.is_numeric() for dtype in frame.dtypes]
    heads = "".join(
        f'<th scope="col"{"" if right else _TEXT}><button type="button" class="sort">{text(name)}'
        "</button></th>"
        for name, right in zip(frame.columns, numeric, strict=True)
    )
    rows = "".join(
        f"<tr>{''.join(_cell(*pair) for pair in zip(row, numeric, strict=True))}</tr>"
        for row in frame.head(MOST_ROWS).iter_rows()
    )
    more = frame.height - MOST_ROWS
    left_out = f'<p class="note">{more:,} more rows: see the command.</p>' if more > 0 else ""
    name = text(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {name}"><table>'
        f"<caption>{name}</caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{left_out}"
    )


_TEXT = ' class="text"'


def _cell(value: object, right: bool) -> str:
    shown = text(cell(value))
    if not right:
        return f'<td class="text">{shown}</td>'
    plain = "" if value is None or value != value else repr(value)
    return f"<td>{shown}</td>" if plain == shown else f'<td data-value="{plain}">{shown}</td>'


def command_html(command: str) -> str:
    """A command to copy."""
    return (
        f'<div class="command"><code>{text(command)}</code><button type="button" class="copy" '
        f'aria-label="Copy the command">Copy</button></div>'
    )


def small_table(frame: pl.DataFrame, title: str) -> str:
    """A table for a cell of a notebook, which brings its own style; no rows are left out."""
    right = [dtype.is_numeric() for dtype in frame.dtypes]
    sides = ["right" if one else "left" for one in right]
    heads = "".join(
        f'<th style="text-align:{side}">{text(name)}</th>'
        for name, side in zip(frame.columns, sides, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f'<td style="text-align:{side}">{text(cell(value))}</td>'
            for value, side in zip(row, sides, strict=True)
        )
        + "</tr>"
        for row in frame.iter_rows()
    )
    return (
        f'<table><caption style="text-align:left;font-weight:bold">{text(title)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )
