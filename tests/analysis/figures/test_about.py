"""Titles: what a figure is of, in lines that fit its page."""

import pytest

from bhlog.analysis.figures.about import bound_words, null_words, short, title_lines
from tests.synthetic import normal_kde


def test_a_title_keeps_its_parts_whole_where_they_fit():
    assert title_lines("Experts", ("run a", "model b", "alpha 0.1"), 17) == (
        "Experts\nrun a · model b\nalpha 0.1"
    )
    assert title_lines("Experts", (), 40) == "Experts"


@pytest.mark.parametrize("most", [20, 41, 80])
def test_no_line_of_a_title_is_longer_than_the_page(most):
    policies = ", ".join(f"policy:{i / 7:.6f}" for i in range(9))
    text = title_lines("Policies at equal cost " * 3, ("run a", f"dots: {policies}"), most)
    assert max(map(len, text.splitlines())) <= most
    assert all(f"policy:{i / 7:.6f}" in text for i in range(9))


def test_words_of_bounds_null_models_and_long_names():
    assert bound_words(1, 16, 64) == "min_k 1, max_k 16"
    assert bound_words(1, 64, 64) == "min_k 1, no max_k"
    assert null_words(normal_kde([0]), "n.parquet") == "null n.parquet (trim 0:0)"
    assert null_words(None, "n.parquet") == "null n.parquet"
    assert short("a/" * 30 + "end") == "…" + ("a/" * 30 + "end")[-39:]
