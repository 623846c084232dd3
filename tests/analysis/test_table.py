"""Tables at the width of a terminal: every number is there, whole, and no line is too long."""

import re

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from bhlog.analysis.cells import cell
from bhlog.analysis.table import table_lines

ALPHAS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
RNG = np.random.default_rng(0)
NUMBERS = (
    "mean_experts",
    "sd_experts",
    "at_min_k",
    "at_max_k",
    "probability_kept",
    "native_recall",
    "flops",
)


def sweep(layers):
    columns = {f"layer_{i}": RNG.random(len(ALPHAS)) * 10 for i in range(layers)}
    return pl.DataFrame({"alpha": ALPHAS, "overall": RNG.random(len(ALPHAS)), **columns})


def policies(rows):
    names = ["bh:0.3", "storey:0.3,lambda=0.5", "topk:8", "by:0.1", "hc:0.5", "topp:0.5"][:rows]
    return pl.DataFrame({"policy": names, **{name: RNG.random(rows) for name in NUMBERS}})


def lines(frame, width):
    return list(table_lines(frame, width))


def words(frame):
    values = (value for row in frame.iter_rows() for value in row)
    return sorted(word for value in values for word in cell(value).split())


def blocks(text):
    """The blocks of a table, each as its header and rows of words."""
    found = "\n".join(text).split("\n\n")
    return [[line.split() for line in block.splitlines()] for block in found]


def test_a_table_that_fits_is_printed_as_it_is():
    assert lines(policies(2).select("policy", "flops"), 80)[0].split() == ["policy", "flops"]
    assert lines(sweep(48), None)[0].split()[-1] == "layer_47"
    assert len(lines(sweep(48), None)) == 13


def test_48_layers_come_in_blocks_that_say_their_alpha():
    frame = sweep(48)
    found = blocks(lines(frame, 80))
    assert all(block[0][0] == "alpha" for block in found)
    assert all([row[0] for row in block[1:]] == [cell(a) for a in ALPHAS] for block in found)
    assert [name for block in found for name in block[0][1:]] == frame.columns[1:]
    values = {name: [cell(v) for v in frame[name]] for name in frame.columns}
    for header, *rows in found:
        for name, column in zip(header, zip(*rows, strict=True), strict=True):
            assert [*column] == values[name]


def test_few_rows_turn():
    frame = policies(3)
    header, *rest = (line.split() for line in lines(frame, 80))
    assert header == ["policy", "bh:0.3", "storey:0.3,lambda=0.5", "topk:8"]
    assert [line[0] for line in rest] == [*NUMBERS]
    assert rest[0][1:] == [cell(v) for v in frame["mean_experts"]]


def test_long_text_wraps_and_numbers_do_not():
    frame = pl.DataFrame({"n": [1234567.5], "detail": ["what was found " * 12]})
    text = lines(frame, 60)
    assert max(map(len, text)) <= 60 and "1,234,567.5" in text[1]
    assert " ".join(text[1:]).split() == words(frame)[:1] + ("what was found " * 12).split()


def test_names_stay_whole_where_text_beside_them_can_wrap():
    frame = pl.DataFrame({"name": ["easiest_and_hardest_tokens"], "question": ["Which? " * 20]})
    text = lines(pl.concat([frame, frame]), 80)
    assert max(map(len, text)) <= 80
    assert sum(line.startswith("easiest_and_hardest_tokens  ") for line in text) == 2


def test_what_is_wider_than_a_terminal_is_printed_row_by_row():
    frame = pl.DataFrame({"layer": [3, 4], "logits": [RNG.random(64).tolist()] * 2})
    text = lines(frame, 60)
    assert text[0] == "row 1" and text[1] == "  layer   3" and "row 2" in text
    assert max(map(len, text)) <= 60
    first = " ".join(text[2 : text.index("row 2")]).split()
    assert first == ["logits", *(f"{x:.4g}" for x in frame["logits"][0])]


def test_wide_characters_take_their_room():
    frame = pl.DataFrame({"source": ["日本語.txt", "a"], "n": [1, 2]})
    text = lines(frame, 80)
    assert len({cell_len(line) for line in text}) == 1


@pytest.mark.parametrize("frame", [pl.DataFrame(), pl.DataFrame({"a": []}), policies(2).clear()])
def test_a_table_without_rows_has_its_header(frame):
    for width in (None, 20, 80):
        assert list(dict.fromkeys(" ".join(lines(frame, width)).split())) == frame.columns


NAMES = st.text("abcdefgh_", min_size=1, max_size=18)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), width=st.integers(30, 120))
def test_no_number_is_cut_at_any_width(data, width):
    names = data.draw(st.lists(NAMES, min_size=1, max_size=20, unique=True))
    rows = data.draw(st.integers(1, 6))
    kind = st.sampled_from([pl.Float64, pl.Int64])
    frame = pl.DataFrame(
        {
            name: pl.Series(
                data.draw(st.lists(st.integers(-(10**9), 10**9), min_size=rows, max_size=rows)),
                dtype=pl.Int64,
            ).cast(data.draw(kind))
            for name in names
        }
    )
    text = lines(frame, width)
    assert max(map(cell_len, text)) <= width
    shown = re.sub(r"^row \d+$", "", "\n".join(text), flags=re.MULTILINE).split()
    for name in names:
        assert name in shown
    # every value is there, whole; columns that name rows may come again in each block
    left = list(shown)
    for word in words(frame):
        assert word in left
        left.remove(word)
