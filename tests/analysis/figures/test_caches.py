import numpy as np
import polars as pl
import pytest

from bhlog.analysis.cache.hits import CACHES, replay_caches
from bhlog.analysis.figures.gallery.caches import Cached, cached_phases
from bhlog.analysis.figures.page import draw_page
from bhlog.analysis.figures.registry import find_figure
from bhlog.analysis.figures.run_data import RunData
from bhlog.analysis.figures.style import Style
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from tests.synthetic import write_run

DRAFT = Style(dpi=20, layout=None)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "run"
    return open_log(
        write_run(folder, n_experts=12, n_sequences=2, length=20, top_k=3, decode_from=8)
    )


def drawn(axes):
    return {line.get_label(): np.array(line.get_ydata()) for line in axes.lines}


def test_each_phase_has_a_panel_of_the_hit_rates_of_every_cache(log):
    page = draw_page(find_figure("cache"), RunData(log), DRAFT)
    budgets = [1, 2, 4, 8, 12]
    table = replay_caches(log, budgets)
    for axes, phase in zip(page.axes, ("prefill", "decode"), strict=True):
        lines = drawn(axes)
        assert [*lines] == [*CACHES, "resident / experts"]
        for cache in CACHES:
            rates = table.filter(pl.col("cache") == cache)[f"{phase}_hit_rate"]
            assert np.array_equal(lines[cache], rates.to_numpy())
            assert [*axes.lines[0].get_xdata()] == budgets
    assert [axes.get_title() for axes in page.axes] == ["prompts", "decoding"]


def test_each_policy_has_a_panel_and_bytes_an_axis_of_their_own(log):
    table = replay_caches(log, ["1MiB", "3MiB"], policies=["topk:1", "topk:4"], expert_bytes="1MiB")
    page = draw_page(find_figure("caches", "caches"), Cached(table, ("run",), 12), DRAFT)
    assert [axes.get_title() for axes in page.axes] == ["topk:1", "topk:4"]
    assert [*drawn(page.axes[0])] == [*CACHES]
    assert [*page.axes[1].lines[0].get_xdata()] == [1, 3]
    assert "MiB" in page.axes[0].get_xlabel()


def test_what_a_figure_of_caches_cannot_show_is_said_in_a_line(log):
    mixed = pl.DataFrame({"policy": "a", "budget": ["4", "4MiB"], "cache": "lru", "hit_rate": 0.1})
    with pytest.raises(InvalidOption, match="one axis of budgets"):
        draw_page(find_figure("caches", "caches"), Cached(mixed, (), 12), DRAFT)


def test_a_sampled_log_has_no_figure_of_caches(log, monkeypatch):
    monkeypatch.setattr("bhlog.analysis.figures.gallery.caches.missing_rows", lambda *_: "sampled")
    with pytest.raises(InvalidOption, match="caches see whole forwards, but sampled"):
        cached_phases(RunData(log))
