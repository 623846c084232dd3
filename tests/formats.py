"""The tables of columns in capture/contract/README.md, from the schemas that the code has.

`python -m tests.formats` writes them there.
"""

from pathlib import Path

import pyarrow as pa

from bhlog.analysis.sweep.profile_file import SCHEMA as PROFILE_SCHEMA
from bhlog.capture.contract.null.file import KDE_SCHEMA
from bhlog.capture.contract.schema import COLUMNS

README = Path(__file__).parents[1] / "capture" / "contract" / "README.md"

_NULL = {
    "layer": "decoder layer, from 0",
    "expert": "expert, from 0; null: one curve for all experts of the layer",
    "n": "logits that the curve was fitted from",
    "left_out": "logits not counted: NaN, infinite or beyond 1024",
    "lo": "first node of the histogram, in logits; null when imported, as the next three",
    "bin_width": "distance of its nodes, in logits",
    "counts": "2^20 for each logit, shared between its two nodes",
    "spread": "what binning adds to the variance, by node",
    "trim_low": "smallest logits left out of each row",
    "trim_high": "largest logits left out of each row",
    "kernel": "of the density estimate",
    "bandwidth": "the kernel's standard deviation, in logits",
    "rule": "how the bandwidth was chosen",
    "x0": "first point of the grid, in logits",
    "dx": "distance of its points",
    "tail": "P(logit > x0 + g dx) at point g, linear in between, 1 below the grid and 0 above",
    "source": "ids of the runs, or the imported file",
}
_PROFILE = {
    "layer": "decoder layer, from 0",
    "n_experts": "experts per router, E",
    "rows": "rows counted: those with a finite logit",
    "alphas": "the grid, J alphas; the same in every row",
    "counts": "E * (J + 1) rows by rank and critical alpha, rank by rank",
    "kept": "beside each count, router probability in units of 2^-20; null if not counted",
    "source": "ids of the runs",
    "kde_sha256": "of the null model",
    "where": "the condition that the rows match; null for all rows",
    "noise": "as counts, of a sample with each expert's logits shuffled; null in older files",
}


def tables() -> dict[str, str]:
    """Each table in Markdown, by the name of its markers in the README."""
    found = {
        folder: _table(
            ("column", "type", "since", "meaning"),
            [(f"`{c.name}`", _type(c.type, c.nullable), str(c.since), c.meaning) for c in columns],
        )
        for folder, columns in COLUMNS.items()
    }
    for name, schema, meanings in (
        ("null", KDE_SCHEMA, _NULL),
        ("profile", PROFILE_SCHEMA, _PROFILE),
    ):
        rows = [(f"`{f.name}`", _type(f.type, f.nullable), meanings[f.name]) for f in schema]
        found[name] = _table(("column", "type", "meaning"), rows)
    return found


def written() -> dict[str, str]:
    """What the README has between its markers, by their name."""
    text = README.read_text(encoding="utf-8")
    return {name: _between(text, name) for name in tables()}


def _type(type: pa.DataType, nullable: bool) -> str:
    if pa.types.is_dictionary(type):
        text = "string, dictionary"
    elif pa.types.is_fixed_size_list(type):
        text = f"{_name(type.value_type)}[E]"
    elif pa.types.is_list(type):
        text = f"list of {_name(type.value_type)}"
    else:
        text = _name(type)
    return text + (", nullable" if nullable else "")


def _name(type: pa.DataType) -> str:
    return {"float": "float32", "double": "float64"}.get(str(type), str(type))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _between(text: str, name: str) -> str:
    return text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0]


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for name, table in tables().items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, after = text.split(start)[0], text.split(end)[1]
        text = before + start + table + end + after
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
