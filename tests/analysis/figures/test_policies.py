from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import same_color

from bhlog.analysis.figures.gallery.policies import Compared
from bhlog.analysis.figures.page import draw_page
from bhlog.analysis.figures.registry import find_figure
from bhlog.analysis.figures.style import Style
from bhlog.analysis.replay.cost_curves import CostCurve, CostCurves, Mark

TEXTS = ("bh:0.3", "by:0.9", "hc:0.5", "hc+:0.5", "storey:0.3", "threshold:0.02", "topp:0.5", "a:1")
MEANS = np.arange(1.0, 17.0)
KEPT = 1 - np.exp(-MEANS / 5)


def curves_of(n):
    curves, marks = [], [Mark("topk:4", "topk", 4.0, float(KEPT[3]))]
    for i, text in enumerate(TEXTS[:n]):
        label = text.split(":")[0]
        kept = KEPT * (1 - 0.02 * i)
        curves.append(CostCurve(label, MEANS, kept))
        marks.append(Mark(text, label, float(MEANS[i]), float(kept[i])))
    native = CostCurve("topk", MEANS, KEPT)
    return CostCurves(native, tuple(curves), tuple(marks), 12.0, 1234, False)


def draw_comparison(curves, dpi=40, errors=None, paired=None):
    subject = Compared(curves, ("run a", "model b", "null c"), errors or {}, paired or {})
    return draw_page(find_figure("policies", "policies"), subject, Style(dpi=dpi))


@pytest.mark.parametrize("n", range(1, 9))
def test_one_to_eight_policies_are_told_apart_and_fit_the_page(n):
    figure = draw_comparison(curves_of(n))
    figure.canvas.draw()
    left, right = figure.axes
    lines = [line for line in left.lines if line.get_marker() == "None"]
    assert [line.get_label() for line in lines] == ["topk", *(t.split(":")[0] for t in TEXTS[:n])]
    looks = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(set(looks)) == n + 1
    (legend,) = figure.legends
    boxes = [text.get_window_extent() for text in legend.get_texts()]
    rows = {}
    for box in boxes:
        rows.setdefault(round(box.y0), []).append(box)
    for row in rows.values():
        assert all(a.x1 < b.x0 for a, b in pairwise(sorted(row, key=lambda box: box.x0)))
    page = figure.bbox
    for box in (legend.get_window_extent(), *(a.get_tightbbox() for a in (left, right))):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 <= page.y1


def test_dots_lie_on_the_curve_of_their_colour():
    figure = draw_comparison(curves_of(7))
    for axes in figure.axes:
        lines = [line for line in axes.lines if line.get_marker() == "None"]
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        assert len(dots) == 8
        for dot in dots:
            (x,), (y,) = dot.get_data()
            (line,) = (one for one in lines if same_color(one.get_color(), dot.get_color()))
            along = line.get_xdata() if len(line.get_xdata()) > 2 else [0, 16]
            assert np.interp(x, along, line.get_ydata()) == pytest.approx(y)


def test_axes_say_what_they_show_and_in_what_unit():
    figure = draw_comparison(curves_of(2))
    left, right = figure.axes
    assert left.get_xlabel() == right.get_xlabel() == "mean experts per token"
    assert left.get_ylabel() == "router probability kept"
    assert right.get_ylabel() == "kept beyond top-k (percentage points)"
    assert left.get_xlim() == right.get_xlim() == (0, 12)
    assert "a sample of 1,234 rows" in figure.get_suptitle()
    assert "Policies at equal cost\nrun a · model b · null c" in figure.get_suptitle()
    assert "dots: topk:4, bh:0.3, by:0.9" in figure.get_suptitle()
    gain = right.lines[2].get_ydata()  # after the line of top-k and the curve of bh
    assert gain == pytest.approx(-2 * KEPT)


def test_the_gain_axis_holds_what_is_shown():
    low, high = draw_comparison(curves_of(8)).axes[1].get_ylim()
    assert low < -100 * 0.14 * KEPT[11] < low + 4 and 0 < high < 2


def test_intervals_stand_on_the_dots_whose_error_is_known_and_the_title_says_what_they_are():
    figure = draw_comparison(curves_of(2), errors={"bh:0.3": 0.05})
    left, right = figure.axes
    (bars,) = [container for container in left.containers if container.has_yerr]
    assert not right.containers
    (segment,) = bars.lines[2][0].get_segments()
    assert segment[1][1] - segment[0][1] == pytest.approx(2 * 1.96 * 0.05, rel=1e-3)
    assert "bars: 95 % intervals" in figure.get_suptitle()
    assert "bars" not in draw_comparison(curves_of(2)).get_suptitle()


def test_differences_to_the_first_policy_stand_in_a_panel_of_their_own_with_their_intervals():
    paired = {"bh:0.3": (-0.02, 0.005), "by:0.9": (0.01, 0.004)}
    figure = draw_comparison(curves_of(2), paired=paired)
    left, _, last = figure.axes
    assert last.get_xlabel() == "kept beyond topk:4, row by row\n(percentage points)"
    assert [text.get_text() for text in last.get_yticklabels()] == [*paired]
    dots = [line for line in last.lines if line.get_marker() == "o"]
    bars = [container for container in last.containers if container.has_xerr]
    for (value, se), dot, bar in zip(paired.values(), dots, bars, strict=True):
        assert dot.get_xdata() == pytest.approx([100 * value])
        (segment,) = bar.lines[2][0].get_segments()
        ends = segment[:, 0]
        assert ends == pytest.approx([100 * (value - 1.96 * se), 100 * (value + 1.96 * se)])
        assert last.get_xlim()[0] < ends[0] and ends[1] < last.get_xlim()[1]
    curve = [line.get_color() for line in left.lines if line.get_label() in ("bh", "by")]
    assert [dot.get_color() for dot in dots] == curve
    assert "bars: 95 % intervals" in figure.get_suptitle()
