"""Figures show what the log holds: what is drawn is held against a direct count."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from bhlog.analysis.figures import drawing
from bhlog.analysis.figures import sample as sample_module
from bhlog.analysis.figures.axes import draw_layers_by
from bhlog.analysis.figures.gallery.experts import (
    plot_expert_heatmap,
    plot_experts_histogram,
    plot_mean_experts,
)
from bhlog.analysis.figures.gallery.p_values import (
    p_value_density,
    passing_ranks,
    plot_logits_against_p_values,
    plot_p_value_histogram,
    plot_passing_rate,
    plot_step_up,
    sample_tokens,
    step_up_ranks,
)
from bhlog.analysis.figures.gallery.sources import load_of_sources, plot_source_difference
from bhlog.analysis.figures.gallery.sweep import plot_sweep, swept
from bhlog.analysis.figures.load import expert_load, source_load
from bhlog.analysis.figures.page import draw_page
from bhlog.analysis.figures.registry import (
    Numbers,
    _registered,
    figure,
    figures,
    find_figure,
    tidy,
)
from bhlog.analysis.figures.run_data import RunData
from bhlog.analysis.figures.sample import sample_rows
from bhlog.analysis.figures.style import STYLE, Style
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.manifest import Manifest
from bhlog.capture.contract.null.model import KdeModel, LayerNull
from bhlog.capture.contract.rule import BhOptions, Bounds, empirical_p_values
from tests.synthetic import normal_kde, normal_logits, write_run

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = Style(dpi=20, layout=None)  # of a picture that no test looks at
FIGURES = figures()
NOTEBOOK = (
    "p_values",
    "step_up",
    "expert_heatmap",
    "experts_histogram",
    "logits_p_values",
    "passing_rate",
)
LAYERS = (0, 1, 5)
LOGGED = (
    "cache",
    "expert_heatmap",
    "experts_histogram",
    "mean_experts",
    "n_selected_by_position",
    "sources",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(
        tmp_path_factory.mktemp("bh") / "run",
        layers=LAYERS,
        n_experts=16,
        n_sequences=7,
        length=20,
        options=BhOptions(alpha=0.3, max_k=6),
        kde=normal_kde(LAYERS),
    )


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "run"
    return write_run(folder, n_sequences=4, length=20, sources=("one",))


def draw_figures(log, *arguments, **options):
    return drawing.draw_figures(log, *arguments, **{"style": SMALL, **options})


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are drawn, but no picture is made: for tests of what is drawn from what."""
    monkeypatch.setattr(drawing, "save_figure", lambda page, path: path)


def make_empirical(run):
    """Turn a run into one that was routed by empirical p-values, as its manifest says."""
    manifest = Manifest.from_json((run / "run.json").read_bytes(), "run.json")
    routing = replace(
        manifest.routing, options=replace(manifest.routing.options, p_values="empirical")
    )
    replace(manifest, routing=replace(routing, kde_sha256=None)).write(run)
    (run / "kde.parquet").unlink()


def rows_of(run, layer):
    tables = [pq.read_table(path) for path in sorted((run / "routing").glob("*.parquet"))]
    return [row for table in tables for row in table.to_pylist() if row["layer"] == layer]


def axes():
    return Figure().subplots()


@pytest.mark.parametrize("E, L", [(2, 1), (8, 4), (64, 2), (128, 48)])
def test_every_figure_is_drawn_for_any_number_of_experts_and_layers(tmp_path, E, L):
    layers = tuple(range(3, 3 + L))
    run = write_run(
        tmp_path / "run",
        layers=layers,
        n_experts=E,
        n_sequences=2,
        length=6,
        top_k=min(8, E),
        options=BhOptions(alpha=0.3),
        kde=normal_kde(layers),
    )
    style = Style(dpi=20) if (E, L) == (128, 48) else SMALL
    paths = draw_figures(open_log(run), style=style)
    assert [path.name for path in paths] == [f"{name}.png" for name in FIGURES]
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert sorted(path.name for path in (run / "figures").iterdir()) == sorted(
        path.name for path in paths
    )


@pytest.mark.slow
def test_drawing_leaves_pyplot_alone(run, tmp_path):
    code = (
        "import sys; from bhlog.analysis.figures.drawing import draw_figures; "
        "from bhlog.analysis.figures.style import Style; from bhlog.analysis.run import open_log; "
        f"log, out = open_log({str(run)!r}), {str(tmp_path)!r}; "
        "draw_figures(log, out=out, style=Style(dpi=20, layout=None)); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_named_figure_alone_is_drawn(run, tmp_path):
    done = []
    paths = draw_figures(
        open_log(run), ["passing_rate", "passing_rate"], tmp_path / "out", progress=done.append
    )
    assert paths == [tmp_path / "out" / "passing_rate.png"]
    assert done == [1]


def test_a_mistyped_figure_gets_the_nearest_right_one(run, tmp_path):
    with pytest.raises(InvalidOption, match=r"no figure 'sweeps'; did you mean 'sweep'\?"):
        draw_figures(open_log(run), ["sweeps"], tmp_path)


def test_a_native_run_without_a_null_model_leaves_p_values_out_and_says_why(native, tmp_path):
    reasons = {}
    paths = draw_figures(open_log(native), out=tmp_path, left_out=reasons.__setitem__)
    names = [path.stem for path in paths]
    assert names == [
        "cache", "expert_heatmap", "experts_histogram", "mean_experts", "n_selected_by_position",
    ]  # fmt: skip
    assert set(names) | set(reasons) == set(FIGURES)
    assert "bhlog kde fit" in reasons["step_up"]
    assert "fewer than two sources" in reasons["sources"]
    with pytest.raises(KdeMismatch, match="no null model of its own"):
        draw_figures(open_log(native), ["p_values"], tmp_path)


def test_a_native_run_with_a_null_model_shows_p_values(native, tmp_path, unsaved):
    paths = draw_figures(open_log(native), NOTEBOOK, tmp_path, kde=normal_kde((0, 1, 2)), alpha=0.2)
    assert len(paths) == 6


def test_options_that_do_not_fit_are_refused(run, tmp_path):
    with pytest.raises(InvalidOption, match="alpha must be between 0 and 1"):
        draw_figures(open_log(run), ["expert_heatmap"], tmp_path, alpha=2)
    with pytest.raises(KdeMismatch, match="but not 1, 5"):
        draw_figures(open_log(run), out=tmp_path, kde=normal_kde((0,)))


def test_an_empirical_run_is_drawn_by_its_own_p_values(tmp_path, unsaved):
    run = write_run(
        tmp_path / "run", n_sequences=4, length=9, options=BhOptions(), kde=normal_kde((0, 1, 2))
    )
    make_empirical(run)
    log = open_log(run)
    assert len(draw_figures(log)) == len(FIGURES)
    (sample, *_) = sample_rows(log, log.manifest.routing.options)
    for sequence in range(4):  # a forward reads one sequence
        rows = sample.sequence == sequence
        assert np.array_equal(sample.p[rows], empirical_p_values(sample.logits[rows]))


def test_a_null_per_expert_is_drawn(run, tmp_path, unsaved):
    kde = KdeModel(
        {
            layer: LayerNull(layer, tuple(replace(null.curves[0], expert=i) for i in range(16)))
            for layer, null in normal_kde(LAYERS).items()
        }
    )
    assert len(draw_figures(open_log(run), out=tmp_path, kde=kde)) == len(FIGURES)


def test_nonfinite_logits_are_drawn_around(tmp_path):
    l = normal_logits(np.random.default_rng(0), 40, 8).reshape(2, 2, 10, 8)
    l[0, 0, 3, 2], l[1, 0, 4, 1], l[1, 1, 5] = np.nan, np.inf, -np.inf
    run = write_run(
        tmp_path / "run",
        layers=(0, 1),
        n_experts=8,
        n_sequences=4,
        length=5,
        logits=l,
        options=BhOptions(alpha=0.3),
        kde=normal_kde((0, 1)),
    )
    assert len(draw_figures(open_log(run))) == len(FIGURES)


@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_a_run_without_rows_is_one_clear_error(tmp_path, native):
    run = write_run(tmp_path / "run", n_sequences=1, length=1, n_shards=1)
    for path in run.glob("*/*.parquet"):
        path.unlink()
    with pytest.raises(InvalidOption, match="no rows to draw"):
        draw_figures(open_log(run), ["expert_heatmap"])
    with pytest.raises(InvalidOption, match="no rows to draw"):
        draw_figures(open_log(run), ["p_values"], kde=normal_kde((0, 1, 2)))
    assert draw_figures(open_log(run), left_out=lambda name, why: None) == []


def test_a_folder_that_cannot_be_made_is_one_clear_error(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidOption, match=r"file/figures: cannot make the folder"):
        draw_figures(open_log(run), out=tmp_path / "file" / "figures")


def test_load_is_what_a_count_of_rows_gives(run):
    load = expert_load(open_log(run))
    for i, layer in enumerate(LAYERS):
        rows = rows_of(run, layer)
        assert load.rows[i] == len(rows)
        for expert in range(16):
            assert load.experts[i, expert] == sum(expert in row["experts"] for row in rows)
        for n in range(17):
            assert load.n_selected[i, n] == sum(row["n_selected"] == n for row in rows)
    assert np.allclose(load.share.sum(axis=1), load.n_selected @ np.arange(17) / load.rows)


def test_source_load_is_what_a_count_of_rows_gives(run):
    load = source_load(open_log(run))
    assert load.names == ("docs", "code") and load.tokens == (80, 60) and load.n_sources == 2
    for i, layer in enumerate(LAYERS):
        rows = rows_of(run, layer)
        for side in (0, 1):  # even sequences are docs
            mine = [row["experts"] for row in rows if row["sequence"] % 2 == side]
            share = [sum(expert in experts for experts in mine) / len(mine) for expert in range(16)]
            assert load.share[side, i].tolist() == share


def test_sources_are_the_two_with_most_tokens(tmp_path):
    run = write_run(tmp_path / "run", n_sequences=7, length=3, sources=("a", "b", "c"))
    load = source_load(open_log(run))
    assert (load.names, load.n_sources) == (("a", "b"), 3)


@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_rows_without_their_tokens_have_no_source(tmp_path):
    run = write_run(tmp_path / "run", n_sequences=4, length=3)
    (run / "tokens" / "rank00000-00001.parquet").unlink()
    assert source_load(open_log(run)).tokens == (3, 3)


def test_a_sample_holds_rows_of_the_log_with_their_decisions(run):
    log = open_log(run)
    for sample in sample_rows(log, log.manifest.routing.options):
        assert len(sample.p) == 140  # all of them: fewer than MOST_ROWS
        logged = {(r["sequence"], r["position"]): r for r in rows_of(run, sample.layer)}
        for i in range(len(sample.p)):
            row = logged[sample.sequence[i], sample.position[i]]
            assert sample.logits[i].tolist() == row["logits"]
            assert sample.n_rejected[i] == row["n_rejected"]
            assert sample.n_selected[i] == row["n_selected"]


@pytest.mark.parametrize("empirical", [False, True])
def test_a_sample_is_bounded_however_long_the_log(tmp_path, monkeypatch, empirical):
    monkeypatch.setattr(sample_module, "MOST_ROWS", 10)
    monkeypatch.setattr("bhlog.analysis.spread.MOST_GROUPS", 3)
    run = write_run(
        tmp_path / "run",
        layers=(0, 1),
        n_sequences=12,
        length=20,
        n_shards=6,
        options=BhOptions(),
        kde=normal_kde((0, 1)),
    )
    if empirical:
        make_empirical(run)
    log = open_log(run)
    read = []
    original = log.read
    monkeypatch.setattr(
        log, "read", lambda group, *a, **k: read.append(group) or original(group, *a, **k)
    )
    samples = sample_rows(log, log.manifest.routing.options)
    assert [len(sample.p) for sample in samples] == [12, 12]  # 10, rounded up in each group
    assert len(read) == 6
    assert {group.shard[-13:-8] for group in read} == {"00000", "00002", "00005"}


def test_the_p_value_histogram_is_a_density():
    p = np.array([0.01, 0.011, 0.5, np.nan])
    drawn = plot_p_value_histogram(axes(), p_value_density(p))
    heights = drawn.patches[0].get_data().values
    assert heights.sum() * 0.02 == pytest.approx(1)
    assert heights[0] == pytest.approx(2 / 3 / 0.02)


def test_the_step_up_picture_marks_the_cut_and_the_choice():
    p = np.array([0.5, 0.001, 0.02, 0.9, np.nan, 0.03])
    drawn = plot_step_up(axes(), step_up_ranks(p, 0.3, n_rejected=3, n_selected=2))
    selected, others, _ = (c.get_offsets() for c in drawn.collections)
    assert selected.tolist() == [[1, 0.001], [2, 0.02]]
    assert others.tolist() == [[3, 0.03], [4, 0.5], [5, 0.9], [6, 1.0]]
    line, cut = drawn.lines
    assert line.get_ydata().tolist() == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
    assert set(cut.get_xdata()) == {3.5}
    assert drawn.get_title() == "n_rejected 3, n_selected 2"


def test_the_step_up_picture_marks_points_above_its_axis():
    p = np.array([0.5, 0.001, 0.02, 0.9, np.nan, 0.03])
    drawn = plot_step_up(axes(), step_up_ranks(p, 0.3, n_rejected=3, n_selected=2))
    low, high = drawn.get_ylim()
    ranks, p = drawn.collections[2].get_offsets().T
    assert ranks.tolist() == [5, 6]  # 0.9, and 1 for NaN
    assert all(low < p) and all(p < high) and high < 0.9
    assert drawn.collections[2].get_label() == "p above the axis"
    assert drawn.get_xlabel() == "rank k (p up to 1)"


def test_step_up_of_a_native_run_speaks_of_what_the_rule_would_do(run, native):
    kde = normal_kde((0, 1, 2))
    page = draw_page(find_figure("step_up"), RunData(open_log(native), kde, 0.2), SMALL)
    assert "replayed" in page.get_suptitle()
    for panel in page.axes:
        assert "would reject" in panel.get_title() and "n_selected" not in panel.get_title()
    page = draw_page(find_figure("step_up"), RunData(open_log(run)), SMALL)
    assert all("n_selected" in panel.get_title() for panel in page.axes)
    assert "replayed" not in page.get_suptitle()
    assert "replayed" in sample_tokens(RunData(open_log(run), alpha=0.1)).title


def test_the_experts_histogram_tells_mean_and_bounds():
    counts = np.array([0, 1, 0, 3, 0])
    frame = tidy(n_selected=np.arange(5), rows=counts, share=counts / 4)
    drawn = plot_experts_histogram(axes(), frame, min_k=1, max_k=4)
    assert [bar.get_height() for bar in drawn.patches] == [0, 25, 0, 75, 0]
    texts = [text.get_text() for text in drawn.get_legend().get_texts()]
    assert texts == ["mean 2.50", "min_k 1", "max_k 4"]
    drawn = plot_experts_histogram(axes(), frame, top_k=2)
    texts = [text.get_text() for text in drawn.get_legend().get_texts()]
    assert texts == ["mean 2.50", "native top-2"]


def layers_by_experts(shares, layers):
    return tidy(layer=np.array(layers)[:, None], expert=np.arange(shares.shape[1]), share=shares)


def test_the_heatmap_shows_shares_in_per_cent():
    shares = np.array([[0.5, 0.25], [0, 1]])
    drawn = plot_expert_heatmap(axes(), layers_by_experts(shares, [3, 7]), even=0.4)
    assert drawn.images[0].get_array().tolist() == [[50, 25], [0, 100]]
    assert [tick.get_text() for tick in drawn.get_yticklabels()] == ["3", "7"]
    bar = drawn.images[0].colorbar
    assert {line.get_ydata()[0] for line in bar.ax.lines} == {40}
    assert "even share, 40 %" in bar.ax.get_ylabel()


def test_beyond_64_layers_and_128_experts_neighbours_share_a_cell():
    shares = np.random.default_rng(0).random((65, 300))
    drawn = plot_expert_heatmap(axes(), layers_by_experts(shares, range(10, 75)))
    cells = drawn.images[0].get_array()
    assert cells.shape == (33, 100)
    assert cells[1, 2] == pytest.approx(100 * shares[2:4, 6:9].mean())
    assert cells[32, 99] == pytest.approx(100 * shares[64:, 297:].mean())
    assert drawn.get_xlabel() == "expert (mean of 3 in a cell)"
    assert drawn.get_ylabel() == "layer (mean of 2 in a cell)"
    labels = [int(tick.get_text()) for tick in drawn.get_yticklabels()]
    assert labels == [10 + 2 * place for place in drawn.get_yticks()]
    assert drawn.xaxis.get_major_formatter()(20, 0) == "60"  # ticks count experts, not cells


def test_sources_that_share_a_cell_show_the_largest_difference_of_either_sign():
    difference = np.zeros((1, 200))
    difference[0, [4, 5]] = 0.1, -0.3
    frame = layers_by_experts(difference, [0]).rename({"share": "difference"})
    cells = plot_source_difference(axes(), frame).images[0].get_array()
    assert cells.shape == (1, 100) and cells[0, 2] == pytest.approx(-30)


@pytest.mark.parametrize("L, E", [(48, 128), (61, 256), (128, 512)])
def test_labels_of_large_models_do_not_overlap(L, E):
    frame = layers_by_experts(np.zeros((L, E)), range(L))
    kind = find_figure("expert_heatmap")
    page = Figure(figsize=kind.size, dpi=30)
    drawn = page.subplots()
    draw_layers_by(
        drawn, frame, "share", across="expert", pick=lambda cells: cells[..., 0], picked="first"
    )
    page.canvas.draw()
    for side, labels in ((0, drawn.get_xticklabels()), (1, drawn.get_yticklabels())):
        boxes = sorted(
            (box.min[side], box.max[side])
            for box in (label.get_window_extent() for label in labels if label.get_text())
        )
        assert len(boxes) > 4
        assert all(a[1] < b[0] for a, b in pairwise(boxes))


def test_the_scatter_keeps_small_p_values_on_the_axes():
    l, p = np.array([[1.0, 9.0, np.nan]], np.float32), np.array([[0.5, 0.0, np.nan]])
    drawn = plot_logits_against_p_values(axes(), tidy(layer=4, logit=l, p=p))
    assert sorted(drawn.collections[0].get_offsets().tolist()) == [[1, 0.5], [9, 1e-8]]


def test_the_passing_rate_shows_both_rates():
    frame = tidy(rank=[1, 2], passes=[0.5, 1.0], rejected=[1.0, 1.0])
    drawn = plot_passing_rate(axes(), frame, min_k=1, max_k=2)
    rejected, passes = drawn.lines[:2]
    assert rejected.get_ydata().tolist() == [100, 100]
    assert passes.get_ydata().tolist() == [50, 100]


def test_the_passing_rate_shows_a_max_k_only_where_there_is_one(run, native):
    assert passing_ranks(RunData(open_log(run))).facts["max_k"] == 6
    facts = passing_ranks(RunData(open_log(native), normal_kde((0, 1, 2)))).facts
    assert facts["max_k"] is None and facts["top_k"] == 8
    bounded = RunData(open_log(native), normal_kde((0, 1, 2)), bounds=Bounds(max_k=5))
    assert passing_ranks(bounded).facts["max_k"] == 5
    frame = tidy(rank=[1, 2], passes=[0.5, 1.0], rejected=[1.0, 1.0])
    drawn = plot_passing_rate(axes(), frame, top_k=2)
    assert "max_k" not in " ".join(line.get_label() for line in drawn.lines)
    assert drawn.lines[-1].get_label() == "native top-2"


def test_mean_experts_are_shown_with_the_middle_of_the_tokens(monkeypatch, run):
    counts = np.zeros((2, 11), np.int64)
    counts[0, 1:11] = 1
    counts[1, 4] = 7
    data = RunData(open_log(run))
    data.load = SimpleNamespace(n_selected=counts)
    monkeypatch.setattr(type(data.log), "layers", (0, 1))
    numbers = find_figure("mean_experts").data(data)
    drawn = plot_mean_experts(axes(), numbers.frame, **numbers.facts)
    assert drawn.lines[0].get_ydata().tolist() == [5.5, 4]
    spans = [path.vertices[:, 1].tolist() for path in drawn.collections[0].get_paths()]
    assert spans == [[1, 9], [4, 4]]
    assert drawn.lines[1].get_ydata()[0] == pytest.approx((55 + 28) / 17)
    assert drawn.lines[2].get_label() == "native top-8"


def test_the_sweep_is_what_replay_counts(run):
    log = open_log(run)
    numbers = swept(RunData(log))
    each = numbers.frame.drop_nulls("layer")
    assert each["layer"].unique(maintain_order=True).to_list() == list(LAYERS)
    assert numbers.facts["alpha"] == 0.3
    alphas = each["alpha"].unique(maintain_order=True)
    for j in (0, 20, 40):
        frame = log.replay(alphas[j]).drop_nulls("layer")
        mean = each.filter(each["alpha"] == alphas[j])["mean_experts"]
        assert mean.to_list() == pytest.approx(frame["mean_experts"].to_list())
    overall = numbers.frame.filter(numbers.frame["layer"].is_null())
    assert overall["mean_experts"][20] == pytest.approx(
        each.filter(each["alpha"] == alphas[20])["mean_experts"].mean()
    )


def test_the_sweep_marks_the_alpha_asked_for(run, native):
    def labels(data):
        numbers = swept(data)
        drawn = plot_sweep(axes(), numbers.frame, **numbers.facts)
        return [line.get_label() for line in drawn.lines if not line.get_label().startswith("_")]

    log, kde = open_log(run), normal_kde((0, 1, 2))
    assert labels(RunData(log)) == ["all layers", "noise", "alpha 0.3", "native top-8"]
    assert labels(RunData(log, alpha=0.1)) == ["all layers", "noise", "alpha 0.1", "native top-8"]
    assert labels(RunData(open_log(native), kde)) == ["all layers", "noise", "native top-8"]


def test_the_sweep_keeps_the_bounds_asked_for(run):
    log = open_log(run)
    assert swept(RunData(log)).frame["mean_experts"].max() <= 6  # as in the run
    low = swept(RunData(log, bounds=Bounds(2, 3))).frame["mean_experts"]
    assert low.min() >= 2 and low.max() <= 3


def test_experts_by_position_are_what_a_count_of_rows_gives(run):
    numbers = find_figure("n_selected_by_position").data(RunData(open_log(run)))
    places = numbers.frame.select("first", "last").unique(maintain_order=True).rows()
    assert places[:8] == [*((i, i) for i in range(7)), (7, 8)] and places[-1][1] >= 19
    everywhere = []
    for layer in LAYERS:
        rows = rows_of(run, layer)
        everywhere += rows
        for first, last, n, mean in (
            numbers.frame.filter(pl.col("layer") == layer)
            .select("first", "last", "rows", "mean_experts")
            .iter_rows()
        ):
            mine = [row["n_selected"] for row in rows if first <= row["position"] <= last]
            assert (n, mean) == (len(mine), pytest.approx(np.mean(mine)))
    overall = numbers.frame.filter(pl.col("layer").is_null())
    assert overall["rows"].sum() == len(everywhere)
    mine = [row["n_selected"] for row in everywhere if 7 <= row["position"] <= 8]
    assert overall["mean_experts"][7] == pytest.approx(np.mean(mine))
    drawn = find_figure("n_selected_by_position").plot(axes(), numbers.frame, **numbers.facts)
    assert [line.get_label() for line in drawn.lines[-2:]] == ["all layers", "native top-8"]
    assert drawn.lines[0].get_xdata()[0] == 1  # the first position


def test_every_title_names_run_model_null_and_alpha(run, native):
    log = open_log(run)
    for data, null, alpha in (
        (RunData(log), "null the run's own (trim 0:0)", "0.3"),
        (RunData(log, run, 0.1), "null run (trim 0:0)", "0.1"),
    ):
        for name, kind in FIGURES.items():
            title = kind.data(data)
            about = " · ".join(title.about)
            assert about.startswith("run run · model synthetic · null ")
            logged = name in LOGGED
            assert (null if not logged else "null the run's own (trim 0:0)") in about
            assert f"alpha {alpha if not logged else '0.3'}" in about
    numbers = find_figure("mean_experts").data(RunData(open_log(native)))
    assert numbers.about[2] == "native top-8: no null model, no alpha"
    page = draw_page(find_figure("sweep"), RunData(log, alpha=0.1), SMALL)
    for part in ("run run", "model synthetic", "null the run's own", "alpha 0.1"):
        assert part in page.get_suptitle()


def test_a_figure_can_be_an_svg_or_a_pdf_with_its_numbers_beside_it(run, tmp_path):
    names = ["sources", "mean_experts"]
    log = open_log(run)
    paths = draw_figures(log, names, tmp_path, image="svg", data=True)
    assert [path.name for path in paths] == [
        "sources.svg", "sources.csv", "mean_experts.svg", "mean_experts.csv",
    ]  # fmt: skip
    text = paths[0].read_text()
    assert "<svg" in text and "model synthetic" in text  # text stays text
    frame = pl.read_csv(paths[1])
    assert frame.equals(load_of_sources(RunData(log)).frame.cast(frame.schema))
    (pdf,) = draw_figures(log, ["mean_experts"], tmp_path, image="pdf")
    assert pdf.read_bytes().startswith(b"%PDF")
    with pytest.raises(InvalidOption, match="no image format 'gif'; formats: png, svg, pdf"):
        draw_figures(log, names, tmp_path, image="gif")


def test_a_figure_of_the_users_own_is_drawn_by_its_name(run, tmp_path, monkeypatch):
    monkeypatch.setattr("bhlog.analysis.figures.registry._registered", dict(_registered))

    def rows(data):
        return Numbers("Rows", data.logged_about, tidy(layer=LAYERS, rows=data.load.rows))

    @figure("rows_by_layer", shows="rows by layer", data=rows)
    def plot_rows(axes, frame):
        axes.bar(frame["layer"], frame["rows"])
        return axes

    assert list(figures())[-1] == "rows_by_layer"  # after ours
    assert draw_figures(open_log(run), ["rows_by_layer"], tmp_path) == [
        tmp_path / "rows_by_layer.png"
    ]
    with pytest.raises(InvalidOption, match=r"figure 'sweep' of .*test_figures: .*sweep has a"):
        figure("sweep", shows="", data=rows)(plot_rows)


def test_the_style_sets_the_size_of_images(run, tmp_path):
    log = open_log(run)
    sizes = []
    for style in (STYLE, SMALL):
        (path,) = draw_figures(log, ["mean_experts"], tmp_path, style=style)
        sizes.append(int.from_bytes(path.read_bytes()[16:20], "big"))  # width in a PNG's header
    assert sizes == [1050, 140]
