"""Figures show what the log holds: what is drawn is held against a direct count."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from bhlog.analysis.figures import figures
from bhlog.analysis.figures import sample as sample_module
from bhlog.analysis.figures.drawing import FIGURES, SEED_FIGURES, draw_figures
from bhlog.analysis.figures.load import expert_load, source_load
from bhlog.analysis.figures.sample import sample_rows
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.manifest import Manifest
from bhlog.capture.contract.null.model import KdeModel, LayerNull
from bhlog.capture.contract.rule import BhOptions, empirical_p_values
from tests.synthetic import normal_kde, normal_logits, write_run

PNG = b"\x89PNG\r\n\x1a\n"
LAYERS = (0, 1, 5)


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
        options=BhOptions(alpha=0.3),
        kde=normal_kde(layers),
    )
    paths = draw_figures(open_log(run))
    assert [path.name for path in paths] == [f"{name}.png" for name in FIGURES]
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert sorted(path.name for path in (run / "figures").iterdir()) == sorted(
        path.name for path in paths
    )


def test_the_notebook_figures_are_the_first_six():
    assert SEED_FIGURES == (
        "p_values",
        "step_up",
        "expert_heatmap",
        "experts_histogram",
        "logits_p_values",
        "passing_rate",
    )


def test_drawing_leaves_pyplot_alone(run, tmp_path):
    code = (
        "import sys; from bhlog.analysis.figures.drawing import draw_figures; "
        "from bhlog.analysis.run import open_log; "
        f"draw_figures(open_log({str(run)!r}), out={str(tmp_path)!r}); "
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
    assert names == ["expert_heatmap", "experts_histogram", "mean_experts"]
    assert set(names) | set(reasons) == set(FIGURES)
    assert "bhlog kde fit" in reasons["step_up"]
    assert "fewer than two sources" in reasons["sources"]
    with pytest.raises(KdeMismatch, match="no null model of its own"):
        draw_figures(open_log(native), ["p_values"], tmp_path)


def test_a_native_run_with_a_null_model_shows_p_values(native, tmp_path):
    paths = draw_figures(
        open_log(native), SEED_FIGURES, tmp_path, kde=normal_kde((0, 1, 2)), alpha=0.2
    )
    assert len(paths) == 6


def test_options_that_do_not_fit_are_refused(run, tmp_path):
    with pytest.raises(InvalidOption, match="alpha must be between 0 and 1"):
        draw_figures(open_log(run), ["expert_heatmap"], tmp_path, alpha=2)
    with pytest.raises(KdeMismatch, match="but not 1, 5"):
        draw_figures(open_log(run), out=tmp_path, kde=normal_kde((0,)))


def test_an_empirical_run_is_drawn_by_its_own_p_values(tmp_path):
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


def test_a_null_per_expert_is_drawn(run, tmp_path):
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
    drawn = figures.plot_p_value_histogram(axes(), p)
    heights = drawn.patches[0].get_data().values
    assert heights.sum() * 0.02 == pytest.approx(1)
    assert heights[0] == pytest.approx(2 / 3 / 0.02)


def test_the_step_up_picture_marks_the_cut_and_the_choice():
    p = np.array([0.5, 0.001, 0.02, 0.9, np.nan, 0.03])
    drawn = figures.plot_step_up(axes(), p, 0.3, n_rejected=3, n_selected=2)
    selected, others = (c.get_offsets() for c in drawn.collections)
    assert selected.tolist() == [[1, 0.001], [2, 0.02]]
    assert others.tolist() == [[3, 0.03], [4, 0.5], [5, 0.9], [6, 1.0]]
    line, cut = drawn.lines
    assert line.get_ydata().tolist() == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
    assert set(cut.get_xdata()) == {3.5}
    assert drawn.get_title() == "n_rejected 3, n_selected 2"


def test_the_experts_histogram_tells_mean_and_bounds():
    drawn = figures.plot_experts_histogram(axes(), np.array([0, 1, 0, 3, 0]), min_k=1, max_k=4)
    assert [bar.get_height() for bar in drawn.patches] == [0, 25, 0, 75, 0]
    texts = [text.get_text() for text in drawn.get_legend().get_texts()]
    assert texts == ["mean 2.50", "min_k 1", "max_k 4"]


def test_the_heatmap_shows_shares_in_per_cent():
    drawn = figures.plot_expert_heatmap(axes(), np.array([[0.5, 0.25], [0, 1]]), [3, 7])
    assert drawn.images[0].get_array().tolist() == [[50, 25], [0, 100]]
    assert [tick.get_text() for tick in drawn.get_yticklabels()] == ["3", "7"]


def test_the_scatter_keeps_small_p_values_on_the_axes():
    l, p = np.array([[1.0, 9.0, np.nan]], np.float32), np.array([[0.5, 0.0, np.nan]])
    drawn = figures.plot_logits_against_p_values(axes(), l, p, np.array([4]))
    assert sorted(drawn.collections[0].get_offsets().tolist()) == [[1, 0.5], [9, 1e-8]]


def test_the_passing_rate_shows_both_rates():
    drawn = figures.plot_passing_rate(
        axes(), np.array([0.5, 1.0]), np.array([1.0, 1.0]), alpha=0.3, min_k=1, max_k=2
    )
    rejected, passes = drawn.lines[:2]
    assert rejected.get_ydata().tolist() == [100, 100]
    assert passes.get_ydata().tolist() == [50, 100]


def test_mean_experts_are_shown_with_the_middle_of_the_tokens():
    counts = np.zeros((2, 11), np.int64)
    counts[0, 1:11] = 1
    counts[1, 4] = 7
    drawn = figures.plot_mean_experts(axes(), counts, [0, 1])
    assert drawn.lines[0].get_ydata().tolist() == [5.5, 4]
    spans = [path.vertices[:, 1].tolist() for path in drawn.collections[0].get_paths()]
    assert spans == [[1, 9], [4, 4]]
    assert drawn.lines[1].get_ydata()[0] == pytest.approx((55 + 28) / 17)


def test_the_sweep_is_what_replay_counts(run, monkeypatch, tmp_path):
    drawn = {}

    def keep(axes, alphas, mean, layers, **options):
        drawn.update(alphas=alphas, mean=mean, layers=layers, **options)

    monkeypatch.setattr(figures, "plot_sweep", keep)
    log = open_log(run)
    draw_figures(log, ["sweep"], tmp_path)
    assert drawn["layers"] == LAYERS and drawn["alpha"] == 0.3
    for j in (0, 20, 40):
        frame = log.replay(drawn["alphas"][j]).drop_nulls("layer")
        assert drawn["mean"][:, j].tolist() == pytest.approx(frame["mean_experts"].to_list())
