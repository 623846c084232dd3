"""Figures of null models: a panel a layer, of their tails and of their checks on a run."""

import numpy as np
import polars as pl
import pytest
from matplotlib.figure import Figure

from bhlog.analysis.commands.kde_calibration import CHECK_FIGURES
from bhlog.analysis.figures.gallery.checks import (
    Checked,
    bias_of_experts,
    densities,
    order_statistics,
    plot_experts,
    plot_histogram,
    plot_qq,
    plot_ranks,
    quantiles,
)
from bhlog.analysis.figures.gallery.tails import Tails, plot_tail, points_of_tails
from bhlog.analysis.figures.image import check_figure_name
from bhlog.analysis.figures.page import draw_page, page_of
from bhlog.analysis.figures.registry import FigureKind, Numbers, figures, find_figure, tidy
from bhlog.analysis.figures.style import Style
from bhlog.analysis.null.calibration import check
from bhlog.analysis.null.estimate import FitOptions, fit_kde
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from tests.synthetic import normal_kde, write_run

E, T = 16, 600
SMALL = Style(dpi=20, layout=None)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    logits = np.random.default_rng(0).normal(size=(2, 1, T, E)).astype(np.float32)
    folder = tmp_path_factory.mktemp("normal") / "run"
    shape = {"layers": (0, 3), "n_experts": E, "n_sequences": 2, "length": T // 2}
    return open_log(write_run(folder, **shape, n_shards=1, logits=logits))


@pytest.fixture(scope="module")
def checked(log):
    return Checked(check(fit_kde(log), log), ("run r", "model m", "null n"), top_k=8)


def axes():
    return Figure().subplots()


def plot_of(plot, numbers, layer=0):
    return plot(axes(), numbers.frame.filter(pl.col("layer") == layer), **numbers.facts)


def page_of_layers(n, drawn):
    def plot(axes, frame):
        drawn.append(frame["layer"][0])
        axes.plot(frame["layer"], frame["layer"], label="a")
        axes.plot(frame["layer"], frame["layer"], label="b")
        axes.set(xlabel="x", ylabel="y")
        return axes

    frame = tidy(layer=np.arange(n))
    kind = FigureKind("k", "", "", "check", lambda _: None, plot, (7, 4), "layer", 1, True)
    return page_of(kind, Numbers("title", ("run r", "model m"), frame), SMALL)


@pytest.mark.parametrize("n", [1, 3, 16, 48])
def test_a_page_has_a_panel_per_layer(n):
    drawn = []
    page = page_of_layers(n, drawn)
    assert drawn == list(range(n))
    shown = [axes for axes in page.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == [f"layer {i}" for i in range(n)]
    # panels stay large enough to read: at least 1.2 inches each way, on a page 15 inches wide
    assert page.get_figwidth() <= 15
    columns = shown[0].get_gridspec().ncols
    assert page.get_figwidth() / columns >= 1.2
    assert (page.get_supxlabel(), page.get_supylabel()) == ("x", "y")
    assert page.get_suptitle() == "title\nrun r · model m"
    assert [text.get_text() for text in page.legends[0].get_texts()] == ["a", "b"]


@pytest.mark.parametrize("n, last", [(65, "layers 64-64"), (128, "layers 126-127")])
def test_beyond_64_layers_neighbours_share_a_panel(n, last):
    drawn = []
    page = page_of_layers(n, drawn)
    assert drawn == list(range(n))
    titles = [axes.get_title() for axes in page.axes if axes.get_visible()]
    assert titles[0] == "layers 0-1" and titles[-1] in (last, "layer 64")
    assert len(titles) == -(-n // 2) and page.get_figwidth() <= 16


def test_nothing_of_a_page_lies_over_another_part_of_it(checked):
    page = draw_page(find_figure("ranks", "check"), checked, Style(dpi=40))
    page.canvas.draw()
    (legend,) = page.legends
    title = page._suptitle.get_window_extent()
    assert page.bbox.y1 >= title.y1 and title.y0 >= legend.get_window_extent().y1
    lowest = legend.get_window_extent().y0
    assert all(panel.get_tightbbox().y1 <= lowest for panel in page.axes)
    below = page._supxlabel.get_window_extent().y1
    assert all(panel.get_tightbbox().y0 >= below for panel in page.axes)


def test_every_page_of_a_check_shows_what_was_found(checked):
    assert tuple(figures("check")) == CHECK_FIGURES
    for draw in CHECK_FIGURES:
        page = draw_page(find_figure(draw, "check"), checked, SMALL)
        assert [axes.get_title() for axes in page.axes] == ["layer 0", "layer 3"]
        assert page.get_supxlabel() and page.get_supylabel()
        assert page.get_suptitle().endswith("run r · model m · null n")
    checks = checked.layers
    drawn = plot_of(plot_qq, quantiles(checked))
    assert len(drawn.lines) == E + 2  # experts, all of them, uniform
    drawn = plot_of(plot_ranks, order_statistics(checked))
    assert [line.get_label() for line in drawn.lines] == [
        *(f"k = {k}" for k in (1, 2, 4, 8)),
        "uniform",
    ]
    drawn = plot_of(plot_experts, bias_of_experts(checked))
    popularity, share = drawn.lines[0].get_data()
    assert np.array_equal(popularity, checks[0].popularity)
    assert share[2] == checks[0].by_expert[2].share_below(0.05)
    assert set(drawn.lines[2].get_xdata()) == {8 / E}  # an even share
    drawn = plot_of(plot_histogram, densities(checked))
    density = drawn.patches[0].get_data().values
    assert density.sum() == pytest.approx(len(density), rel=1e-3)  # half a lump lies beyond 1
    assert density[0] == pytest.approx(32 * checks[0].trimmed.share_below(1 / 32))


def test_curves_of_ranks_stay_in_their_frame(log):
    """Logits far beyond the null: p-values of 1e-40 lie at the upper edge."""
    narrow = Checked(check(normal_kde((0, 3)), log), ("run r",), top_k=8)
    numbers = order_statistics(narrow)
    frame = numbers.frame.with_columns(observed=20 * pl.col("observed"))
    assert frame["observed"].max() > 20
    for plot, data in ((plot_ranks, frame), (plot_qq, quantiles(narrow).frame)):
        drawn = plot(axes(), data.filter(pl.col("layer") == 0))
        low, high = drawn.get_ylim()
        for line in drawn.lines[:-1]:  # the last is the diagonal
            assert low <= min(line.get_ydata()) and max(line.get_ydata()) <= high


def test_pages_of_tails_show_layers_that_all_models_have():
    models = (("a" * 50, normal_kde([0, 3])), ("b.parquet", normal_kde([3, 4])))
    page = draw_page(find_figure("tails", "tails"), Tails(models), SMALL)
    assert [axes.get_title() for axes in page.axes] == ["layer 3"]
    labels = [text.get_text() for text in page.legends[0].get_texts()]
    assert labels == ["…" + "a" * 31, "b.parquet"]


def test_two_null_models_are_told_apart_where_they_agree():
    kde = normal_kde([3])
    numbers = points_of_tails(Tails((("x/n.parquet", kde), ("x/n.parquet", kde))))
    first, second = plot_of(plot_tail, numbers, 3).lines
    assert (first.get_label(), second.get_label()) == ("a: x/n.parquet", "b: x/n.parquet")
    assert first.get_color() != second.get_color()
    assert first.get_linewidth() > second.get_linewidth() and second.get_linestyle() == "--"


def test_tails_mark_what_the_first_and_the_last_rank_must_reach():
    tails = Tails((("n", normal_kde([3])),), ("run r", "model m"), alpha=0.2, n_experts=16)
    numbers = points_of_tails(tails)
    assert numbers.about == ("run r", "model m", "null n (trim 0:0)", "alpha 0.2")
    levels = [line.get_ydata()[0] for line in plot_of(plot_tail, numbers, 3).lines[1:]]
    assert levels == [0.2 / 16, 0.2]
    assert points_of_tails(Tails(tails.models)).facts == {}


def test_tails_are_drawn_for_pooled_and_expert_nulls(log):
    by_expert = fit_kde(log, FitOptions(null="expert"))
    pooled = plot_of(plot_tail, points_of_tails(Tails((("n", normal_kde([0])),))))
    assert len(pooled.lines) == 1
    assert len(plot_of(plot_tail, points_of_tails(Tails((("n", by_expert),)))).lines) == E
    with pytest.raises(InvalidOption, match=r"figures end in one of .*\.png"):
        check_figure_name("page.doc")
