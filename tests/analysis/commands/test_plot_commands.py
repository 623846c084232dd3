"""`bhlog plot` as a user meets it; what the figures show is tested with them."""

import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.figures.registry import figures
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

LAYERS = (0, 1, 5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(
        tmp_path_factory.mktemp("bh") / "run",
        layers=LAYERS,
        n_sequences=4,
        length=20,
        options=BhOptions(alpha=0.3, max_k=6),
        kde=normal_kde(LAYERS),
    )


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "run"
    return write_run(folder, layers=LAYERS, n_sequences=4, length=20, sources=("one",))


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return end.value.code, *capsys.readouterr()


def test_bhlog_plot_prints_the_files(run, tmp_path, capsys):
    code, out, err = call(
        capsys, "plot", run, "sweep", "sources", "--out", tmp_path, "--format", "csv"
    )
    assert (code, err) == (0, "")
    assert out.splitlines() == ["figure", f"{tmp_path}/sweep.png", f"{tmp_path}/sources.png"]


def test_bhlog_plot_says_once_why_figures_are_left_out(native, tmp_path, capsys):
    code, _, err = call(capsys, "plot", native, "--out", tmp_path)
    assert code == 0
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        "bhlog: left out p_values, step_up, logits_p_values, passing_rate, sweep: "
    )


def test_another_null_model_may_be_a_file_or_that_of_a_run(run, native, tmp_path, capsys):
    for kde in (run, run / "kde.parquet"):
        code, _, err = call(
            capsys, "plot", native, "p_values", "--kde", kde, "--alpha", "0.2", "--out", tmp_path
        )
        assert (code, err) == (0, "")
        assert (tmp_path / "p_values.png").stat().st_size > 5000


def test_bhlog_plot_takes_a_format_and_writes_the_numbers(run, tmp_path, capsys):
    code, out, err = call(
        capsys, "plot", run, "sweep", "--image", "svg", "--data", "--alpha", "0.1", "--max-k", "3",
        "--out", tmp_path, "--format", "csv",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.splitlines() == ["figure", f"{tmp_path}/sweep.svg", f"{tmp_path}/sweep.csv"]
    text = (tmp_path / "sweep.svg").read_text()
    assert "alpha 0.1" in text and "alpha 0.3" not in text and "max_k 3" in text
    header, *rows = (tmp_path / "sweep.csv").read_text().splitlines()
    assert header == "layer,alpha,mean_experts,noise"
    cells = [row.split(",") for row in rows]
    assert max(float(mean) for _, _, mean, _ in cells) <= 3
    assert all((layer == "") == (noise != "") for layer, _, _, noise in cells)  # over all layers
    assert max(float(noise) for _, _, _, noise in cells if noise) <= 3


def test_bhlog_plot_lists_figures_without_a_run(capsys):
    code, out, _ = call(capsys, "plot", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(figures())
    assert call(capsys, "plot")[0] == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["RUN", "heatmap"],
        ["RUN", "--kde", "nothing.parquet"],
        ["RUN", "--kde", "RUN/run.json"],
        ["RUN", "--alpha", "0"],
        ["RUN", "--min-k", "9", "--max-k", "2"],
        ["RUN", "--out", "/dev/null/figures"],
    ],
)
def test_a_mistake_is_one_line(run, capsys, arguments):
    code, out, err = call(capsys, "plot", *[a.replace("RUN", str(run)) for a in arguments])
    assert (code, out) == (1, "")
    assert not (run / "figures").exists()
    assert err.startswith("bhlog: ") and err.count("\n") == 1
