import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.null.estimate import fit_kde
from bhlog.analysis.run import open_log
from bhlog.capture.contract.null.model import KdeModel
from tests.synthetic import write_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kde")
    write_run(folder / "a", layers=(0, 1, 4), n_experts=16, n_sequences=4, length=60, seed=1)
    write_run(folder / "b", layers=(0, 1, 4), n_experts=16, n_sequences=2, length=60, seed=2)
    fit_kde(open_log(folder / "a")).save(folder / "a.parquet")
    fit_kde(open_log(folder / "b")).save(folder / "b.parquet")
    return folder


@pytest.fixture
def bhlog(place, monkeypatch, capsys):
    """Runs `bhlog kde ...` beside the runs; gives exit code, stdout and stderr."""
    monkeypatch.chdir(place)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["kde", *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return stop.value.code, out, err

    return run


def rows(out):
    return json.loads(out)


def test_fit_writes_a_model_and_prints_a_line_per_layer(bhlog, place):
    code, out, _ = bhlog(
        "fit", "a", "b", "--out", "ab.parquet", "--trim-high", "2", "--keep-trim", "0:0",
        "--kernel", "epanechnikov", "--bandwidth", "0.2", "--layers", "0-1", "--format", "json",
    )  # fmt: skip
    assert code == 0
    assert [row["layer"] for row in rows(out)] == [0, 1]
    assert rows(out)[0] | {"source": ""} == {
        "layer": 0, "n": 360 * 14, "left_out": 0, "lowest": rows(out)[0]["lowest"],
        "highest": rows(out)[0]["highest"], "trim": "0:2", "kept": "0:0",
        "kernel": "epanechnikov", "rule": "fixed", "bandwidth": 0.2,
        "grid_points": rows(out)[0]["grid_points"], "dx": rows(out)[0]["dx"], "source": "",
    }  # fmt: skip
    assert sorted(KdeModel.load(place / "ab.parquet")) == [0, 1]


def test_refit_and_merge_equal_a_fit_from_scratch(bhlog, place):
    for out, arguments in {
        "isj.parquet": ("fit", "a", "--bandwidth", "isj"),
        "refit.parquet": ("refit", "a.parquet", "--bandwidth", "isj"),
        "both.parquet": ("fit", "a", "b"),
        "merged.parquet": ("merge", "b.parquet", "a.parquet"),
    }.items():
        assert bhlog(*arguments, "--out", out)[0] == 0
    assert (place / "isj.parquet").read_bytes() == (place / "refit.parquet").read_bytes()
    assert (place / "both.parquet").read_bytes() == (place / "merged.parquet").read_bytes()


def test_show_gives_thresholds_and_a_figure(bhlog, place):
    code, out, err = bhlog(
        "show", "a.parquet", "--alpha", "0.1", "--format", "csv", "--figure", "tails.png"
    )
    assert code == 0
    assert out.splitlines()[0].split(",")[-3:] == ["t_1", "t_16", "source"]
    assert (place / "tails.png").read_bytes()[:4] == b"\x89PNG"
    assert "wrote tails.png" in err


def test_compare_prints_distances_and_mean_experts(bhlog, place):
    for more, says in {
        (): "bhlog: mean experts of 4,096 rows of independent logits, as a.parquet has them; "
        "--run RUN takes real rows\n",
        ("--run", "a", "--figure", "both.svg"): "wrote both.svg\n",
    }.items():
        code, out, err = bhlog("compare", "a.parquet", "b.parquet", *more, "--format", "json")
        assert code == 0
        assert list(rows(out)[0]) == ["layer", "ks", "wasserstein", "experts_a", "experts_b"]
        assert err == says


def test_compare_says_what_it_leaves_out(bhlog):
    bhlog("fit", "a", "--layers", "0,4", "--out", "few.parquet")
    code, out, err = bhlog("compare", "few.parquet", "a.parquet", "--run", "a", "--format", "json")
    assert (code, [row["layer"] for row in rows(out)]) == (0, [0, 4])
    assert err == "bhlog: left out layers 1, which one of them lacks\n"


def test_a_run_with_a_null_model_stands_for_it(bhlog, place):
    KdeModel.load(place / "a.parquet").save(place / "b" / "kde.parquet")
    code, out, _ = bhlog("compare", "b", "a.parquet", "--format", "json")
    (place / "b" / "kde.parquet").unlink()
    assert (code, rows(out)[0]["ks"]) == (0, 0)


@pytest.mark.parametrize("draw", ["qq", "histogram", "experts", "ranks"])
def test_check_prints_layers_or_experts_and_draws(bhlog, place, draw):
    figure = f"{draw}.png"
    code, out, _ = bhlog(
        "check", "a.parquet", "b", "--figure", figure, "--draw", draw, "--format", "json"
    )
    assert code == 0
    assert [row["layer"] for row in rows(out)] == [0, 1, 4]
    assert {"ks", "p_0.05", "ks_expert", "ks_worst", "ks_rank_1"} <= set(rows(out)[0])
    assert (place / figure).stat().st_size > 5000
    code, out, _ = bhlog(
        "check", "a.parquet", "b", "--by-expert", "--layers", "4", "--format", "json"
    )
    assert len(rows(out)) == 16


def test_a_choice_of_what_to_draw_needs_a_file(bhlog):
    code, out, err = bhlog("check", "a.parquet", "b", "--draw", "ranks")
    assert (code, out) == (2, "") and "--draw ranks needs a file: --figure FILE" in err


def test_import_and_export(bhlog, place):
    old = place / "old"
    old.mkdir()
    x = np.linspace(-1, 1, 21)
    for layer in (0, 3):
        content = pickle.dumps({"x": x, "cdf": (x + 1) / 2})
        (old / f"distribution_model_layer_{layer}.pkl").write_bytes(content)
    assert bhlog("import", "old", "--out", "old.parquet")[0] == 0
    assert bhlog("export", "old.parquet", "--out", "old.npz")[0] == 0
    with np.load(place / "old.npz", allow_pickle=False) as arrays:
        assert arrays["layers"].tolist() == [0, 3]
        assert arrays["tail_3"] == pytest.approx((1 - x) / 2)
        assert arrays["x_0"] == pytest.approx(x)
    code, out, err = bhlog("compare", "old", "old.parquet", "--format", "json")
    assert (code, list(rows(out)[0]), rows(out)[0]["ks"]) == (0, ["layer", "ks", "wasserstein"], 0)
    assert "mean experts need --run RUN or --n-experts E" in err
    code, _, err = bhlog("show", "old.parquet", "--alpha", "0.1")
    assert (code, err.count("\n")) == (1, 1) and "add --n-experts E" in err
    code, _, err = bhlog("refit", "old.parquet", "--kernel", "tophat", "--out", "x.parquet")
    assert (code, err.count("\n")) == (1, 1) and "has no histogram" in err
    code, _, err = bhlog("check", "old.parquet", "a")
    assert (code, err.count("\n")) == (1, 1) and "layers 0, 3, but not 1, 4" in err


def test_a_pickle_that_names_more_is_refused_with_what_it_named(bhlog, place):
    bad = place / "bad"
    bad.mkdir()
    (bad / "distribution_model_layer_0.pkl").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    code, _, err = bhlog("import", "bad", "--out", "bad.parquet")
    assert code == 1
    assert "bad/distribution_model_layer_0.pkl: names os.system" in err
    assert not (place / "ran").exists()
    assert not (place / "bad.parquet").exists()


MISTAKES = {
    "no run": (("fit", "nowhere", "--out", "x.parquet"), "nowhere: no such folder"),
    "no folder": (("fit", "a", "--out", "a/run.json/x"), "its folder cannot be made"),
    "out is a folder": (("fit", "a", "--out", "a"), "a: is a folder"),
    "layer": (("fit", "a", "--out", "x.parquet", "--layers", "9"), "no layer 9 in a"),
    "trim": (("fit", "a", "--out", "x.parquet", "--trim-high", "16"), "leave nothing"),
    "where": (("fit", "a", "--out", "x.parquet", "--where", "lyer = 1"), "no column 'lyer'"),
    "sample": (("fit", "a", "--out", "x.parquet", "--sample", "2"), "sample must be"),
    "bandwidth": (("fit", "a", "--out", "x.parquet", "--bandwidth", "-1"), "bandwidth must be"),
    "not kept": (("refit", "a.parquet", "--out", "x.parquet", "--trim-high", "3"), "it keeps 0:0"),
    "no model": (("show", "nothing.parquet"), "nothing.parquet: cannot read"),
    "experts": (
        ("show", "a.parquet", "--alpha", "0.1", "--n-experts", "8"),
        "for routers of 16 experts, but these have 8",
    ),
    "export": (("export", "a.parquet", "--out", "a/run.json/x.npz"), "folder cannot be made"),
    "merge": (("merge", "a.parquet", "a/run.json", "--out", "x.parquet"), "not a null model file"),
    "refit": (("refit", "nothing", "--out", "x.parquet"), "nothing: cannot read"),
    "narrow": (("fit", "a", "--out", "x.parquet", "--bandwidth", "1e-9"), "between 0.001 and 64"),
    "wide": (("refit", "a.parquet", "--out", "x.parquet", "--bandwidth", "1e9"), "between 0.001"),
    "alpha": (("show", "a.parquet", "--alpha", "3"), "alpha must be between"),
    "figure": (("show", "a.parquet", "--figure", "x.doc"), "figures end in one of"),
    "not a model": (("check", "a/run.json", "a"), "a/run.json: not a null model file"),
    "no pickles": (("import", "a", "--out", "x.parquet"), "no distribution_model_layer"),
    "import a file": (("import", "a.parquet", "--out", "x.parquet"), "no such folder"),
    "compare alpha": (
        ("compare", "a.parquet", "b.parquet", "--alpha", "1", "--run", "a"),
        "alpha must be between",
    ),
    "max_k": (
        ("compare", "a.parquet", "b.parquet", "--run", "a", "--max-k", "17"),
        "max_k is 17, but the model has 16",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(bhlog, place, mistake):
    arguments, message = MISTAKES[mistake]
    code, out, err = bhlog(*arguments)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (place / "x.parquet").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--bandwidth", "wide", "neither scott, silverman, nrd0, isj nor a number"),
        ("--layers", "5-2", "not a list of layers such as 0-3,7"),
        ("--layers", "0-99999999999", "not a list of layers such as 0-3,7"),
        ("--layers", "0;1", "not a list of layers such as 0-3,7"),
        ("--keep-trim", "8", "not a trimming level such as 0:8"),
        ("--threads", "0", "range x>=1"),
    ],
)
def test_an_option_that_cannot_be_read_is_a_usage_error(bhlog, option, value, message):
    code, _, err = bhlog("fit", "a", "--out", "x.parquet", option, value)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    "command", ["fit", "refit", "merge", "show", "compare", "check", "import", "export"]
)
def test_help_ends_in_an_example(bhlog, command):
    code, out, _ = bhlog(command, "--help")
    assert code == 0
    assert f"  bhlog kde {command} " in out.split("example:")[1]


def test_the_commands_load_without_scipy_matplotlib_or_polars_fits():
    program = (
        "import sys, bhlog.analysis.commands.kde; "
        "print([m for m in ('scipy', 'matplotlib', 'torch', 'duckdb') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


def test_check_simulates_what_bh_finds_where_the_truth_is_known(bhlog, tmp_path):
    run = write_run(tmp_path / "run", layers=(0, 1), n_experts=16, n_sequences=2, length=40)
    null = tmp_path / "null.parquet"
    bhlog("fit", str(run), "--trim-high", "4", "--out", str(null))
    arguments = ["check", str(null), str(run), "--simulate", "--format", "json"]
    code, out, err = bhlog(*arguments, "--alpha", "0.1", "--signals", "2", "--shift", "3")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert [(row["layer"], row["null"]) for row in rows] == [
        (layer, null) for layer in (0, 1) for null in ("as it is", "fitted again")
    ]
    assert bhlog(*arguments, "--layers", "0")[0] == 2
    assert bhlog(*arguments, "--signals", "99")[::2] == (
        1,
        "bhlog: signals must be from 0 to 16, got 99\n",
    )
