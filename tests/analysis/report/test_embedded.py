"""What a notebook shows of runs and profiles."""

from html import unescape
from pathlib import Path

import pytest

from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import KdeMismatch
from tests.analysis.report.browser import browser, require_browser
from tests.synthetic import write_run


def test_a_run_in_a_cell_says_what_it_is(rerun):
    html = open_log(rerun)._repr_html_()
    assert html.startswith("<table>") and len(html) < 4_000
    for words in (f"Run {rerun}", "synthetic", ">bh<", ">0.3<", ">768<"):
        assert words in html


def test_names_in_a_cell_cannot_become_markup(tmp_path):
    html = open_log(write_run(tmp_path / "<img src=x>", length=4))._repr_html_()
    assert "<img" not in html


def test_a_profile_in_a_cell_is_a_small_table(rerun):
    html = open_log(rerun).sweep()._repr_html_()
    assert "Profile(3 layers of 16 experts" in html
    assert html.count("<tr>") == 14 and "overall" in html


def test_exploring_needs_a_null_model(native):
    with pytest.raises(KdeMismatch, match="bhlog kde fit"):
        open_log(native).explore()


@pytest.mark.slow
def test_the_explorer_works_inside_a_frame(native, rerun, tmp_path: Path):
    require_browser()
    shown = open_log(native).explore(kde=rerun)
    assert repr(shown) == "Explorer(native: shows itself in a notebook; else bhlog explore RUN)"
    html = shown._repr_html_()
    assert unescape(html).count("<section") == 1
    cell = tmp_path / "cell.html"
    cell.write_text(f"<!doctype html><html data-page=ready><body>{html}</body></html>")
    expected = open_log(native).sweep(rerun).mean_experts(0.05, min_k=1, max_k=16)
    with browser() as page:
        page.open(cell)
        inside = "document.querySelector('iframe').contentDocument"
        page.wait(f"{inside}.documentElement.dataset.page === 'ready'")
        mean = page.run(f"return {inside}.querySelector('#x-mean').textContent")
        assert float(mean) == pytest.approx(expected, rel=1e-3)
        assert page.errors() == []
