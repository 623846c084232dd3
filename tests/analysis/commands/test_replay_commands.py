import csv
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.run import open_log
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

LAYERS = (0, 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay-commands")
    common = {"layers": LAYERS, "n_experts": 8, "n_sequences": 4, "length": 10, "top_k": 2}
    kde = normal_kde(LAYERS)
    write_run(folder / "native", **common, seed=1)
    write_run(folder / "bh", options=BhOptions(alpha=0.3, max_k=4), kde=kde, **common, seed=1)
    write_run(folder / "other", kde=kde, **common, seed=2)
    kde.save(folder / "null.parquet")
    return folder


@pytest.fixture
def bhlog(place, monkeypatch, capsys):
    """Runs the command beside the runs; gives exit code, stdout and stderr."""
    monkeypatch.chdir(place)

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return stop.value.code, out, err

    return call


def test_replay_prints_a_line_per_alpha_and_layer(bhlog):
    code, out, _ = bhlog("replay", "bh", "--alpha", "0.1", "--alpha", "0.3")
    heading, *rest = out.splitlines()
    lines = [line.split() for line in rest]
    assert code == 0
    assert heading == "bh: 1 to 4 experts a token, as in the run"
    assert lines[0][:4] == ["alpha", "layer", "rows", "mean_experts"]
    assert [line[:2] for line in lines[1:]] == [
        [alpha, layer] for alpha in ("0.1", "0.3") for layer in ("0", "2", "all")
    ]


def test_json_and_csv_hold_every_column(bhlog):
    rows = json.loads(bhlog("replay", "bh", "--alpha", "0.3", "--format", "json")[1])
    assert rows[-1]["layer"] is None
    assert rows[-1]["logged_jaccard"] == 1
    assert len(rows[0]["histogram"]) == 9
    out = bhlog("sweep", "bh", "--alpha", "0.3", "--format", "csv")[1]
    (row,) = csv.DictReader(io.StringIO(out))
    assert float(row["layer_0"]) > 1


def test_options_of_the_run_are_kept_unless_given(bhlog):
    def bounds(*options):
        out = bhlog("replay", "bh", "--alpha", "0.9", *options, "--format", "json")[1]
        row = json.loads(out)[-1]
        return row["min_k"], row["max_k"], row["max_experts"]

    assert bounds() == (1, 4, 4)
    assert bounds("--min-k", "2", "--max-k", "8")[:2] == (2, 8)


def test_a_native_run_takes_a_null_model(bhlog):
    code, _, err = bhlog("replay", "native", "--alpha", "0.3")
    assert (code, "bhlog kde fit native" in err) == (1, True)
    code, out, _ = bhlog("replay", "native", "--kde", "null.parquet", "--alpha", "0.3")
    assert (code, len(out.splitlines())) == (0, 5)
    heading = "native: 1 to 8 experts a token: a native run has no bounds of its own"
    assert out.splitlines()[0] == heading


def test_layers_and_conditions_choose_rows(bhlog):
    out = bhlog(
        "replay", "bh", "--alpha", "0.3", "--layers", "2", "--where", "position < 3",
        "--format", "json",
    )[1]  # fmt: skip
    assert [(row["layer"], row["rows"]) for row in json.loads(out)] == [(2, 12), (None, 12)]


def test_written_decisions_are_a_table_in_sql(bhlog, tmp_path, place):
    run = write_run(
        tmp_path / "run", layers=LAYERS, n_experts=8, options=BhOptions(alpha=0.3),
        kde=normal_kde(LAYERS),
    )  # fmt: skip
    code, _, err = bhlog(
        "replay", run, "--alpha", "0.1", "--renormalize", "yes", "--out", run / "replay"
    )
    name = "alpha-0.1_k-1-8_renormalized"
    assert (code, f"wrote {run}/replay/{name}" in err) == (0, True)
    rows = pq.read_table(run / "replay" / name).to_pylist()
    assert all(sum(row["weights"]) == pytest.approx(1, rel=1e-6) for row in rows)  # float32
    query = "SELECT replay, count(*) AS n, sum(n_selected) AS experts FROM replays GROUP BY replay"
    out = bhlog("sql", run, query, "--format", "json")[1]
    experts = sum(row["n_selected"] for row in rows)
    assert json.loads(out) == [{"replay": name, "n": len(rows), "experts": experts}]


def test_sweep_prints_the_default_alphas_and_the_target(bhlog):
    out = bhlog("sweep", "bh", "--format", "json")[1]
    assert [row["alpha"] for row in json.loads(out)] == [
        0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9
    ]  # fmt: skip
    rows = json.loads(bhlog("sweep", "bh", "--target-experts", "3", "--format", "json")[1])
    assert [row["layer"] for row in rows] == [0, 2, None]
    assert all(3 <= row["mean_experts"] < 3.2 for row in rows)
    replayed = bhlog("replay", "bh", "--alpha", rows[-1]["alpha"], "--format", "json")
    assert json.loads(replayed[1])[-1]["mean_experts"] == pytest.approx(rows[-1]["mean_experts"])


def test_a_budget_is_shared_among_layers(bhlog):
    out = bhlog("sweep", "bh", "--experts", "3", "--per-layer", "--format", "json")[1]
    rows = json.loads(out)
    assert [row["layer"] for row in rows] == [0, 2, None]
    assert rows[-1]["alpha"] is None
    assert 3 <= rows[-1]["mean_experts"] < 3.1
    assert 0 < rows[-1]["probability_kept"] < 1


def test_a_saved_profile_answers_without_the_log(bhlog, tmp_path):
    saved = tmp_path / "bh.profile"
    whole = bhlog("sweep", "bh", "--kept", "--save", saved)
    assert f"wrote {saved}" in whole[2]
    assert bhlog("sweep", saved)[1] == whole[1]
    for options in (["--target-experts", "3"], ["--target-experts", "3", "--per-layer"]):
        assert bhlog("sweep", saved, *options)[1] == bhlog("sweep", "bh", "--kept", *options)[1]
    code, _, err = bhlog("sweep", saved, "--alpha", "0.30005")
    assert (code, "0.30005 is between two alphas" in err) == (0, True)


def test_several_runs_and_profiles_count_together(bhlog, tmp_path):
    saved = tmp_path / "other.profile"
    bhlog("sweep", "other", "--save", saved)
    options = ["--alpha", "0.3", "--min-k", "1", "--max-k", "8", "--format", "json"]
    together = json.loads(bhlog("sweep", "bh", saved, *options)[1])
    parts = [json.loads(bhlog("sweep", run, *options)[1])[0]["overall"] for run in ("bh", "other")]
    assert together[0]["overall"] == pytest.approx(sum(parts) / 2)


def test_fidelity_compares_layer_by_layer(bhlog):
    rows = json.loads(bhlog("fidelity", "native", "bh", "--format", "json")[1])
    assert [(row["layer"], row["tokens"], row["jaccard"]) for row in rows] == [
        (0, 40, 1), (2, 40, 1)
    ]  # fmt: skip


MISTAKES = {
    "alpha must be between 0 and 1, got 1.5": ["replay", "bh", "--alpha", "1.5"],
    "max_k is 9, but the model has 8 experts": ["replay", "bh", "--alpha", "0.1", "--max-k", "9"],
    "min_k (5), got 4": ["replay", "bh", "--alpha", "0.1", "--min-k", "5"],
    "no layer 1 in bh; it has layers 0, 2": ["replay", "bh", "--alpha", "0.1", "--layers", "1"],
    "no column 'lyer'": ["replay", "bh", "--alpha", "0.1", "--where", "lyer = 1"],
    "no rows to replay where position > 99": [
        "replay", "bh", "--alpha", "0.1", "--where", "position > 99"
    ],
    "--out writes every row": ["replay", "bh", "--alpha", "0.1", "--out", "x", "--layers", "0"],
    "a setting is asked for twice": [
        "replay", "bh", "--alpha", "0.1", "--alpha", "0.1", "--out", "x"
    ],
    "nowhere: no such folder": ["replay", "nowhere", "--alpha", "0.1"],
    "cannot read": ["replay", "bh", "--alpha", "0.1", "--kde", "nowhere.parquet"],
    "no rows to count where": ["sweep", "bh", "--where", "position > 99"],
    "--per-layer shares a budget": ["sweep", "bh", "--per-layer"],
    "gives 9 experts per token": ["sweep", "bh", "--experts", "9"],
    "columns are layer, expert": ["sweep", "null.parquet"],
    "its folder cannot be made": ["sweep", "bh", "--save", "null.parquet/where"],
    "would count twice": ["sweep", "bh", "bh"],
    "bounds must be 0 <= min_k <= max_k <= 8": ["sweep", "bh", "--max-k", "9"],
    "routed natively; expected a run that a policy routed": ["fidelity", "bh", "native"],
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line_on_stderr(bhlog, message):
    code, out, err = bhlog(*MISTAKES[message])
    assert (code, out) == (1, "")
    assert err.startswith("bhlog: ")
    assert message in err
    assert err.count("\n") == 1
    assert not Path("x").exists() or not [*Path("x").iterdir()]


def test_options_of_a_run_are_refused_for_a_profile(bhlog, tmp_path):
    saved = tmp_path / "p"
    bhlog("sweep", "bh", "--save", saved)
    for option in (["--kde", "null.parquet"], ["--layers", "0"], ["--where", "layer = 0"]):
        code, _, err = bhlog("sweep", saved, *option)
        assert (code, "need a run" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["replay", "bh"], "'--alpha'"),
        (["replay", "bh", "--alpha", "0.1", "--renormalise", "yes"], "--renormalize"),
        (["replay", "bh", "--alpha", "0.1", "--renormalize", "maybe"], "'model', 'yes', 'no'"),
        (["sweep"], "RUN..."),
        (["swep", "bh"], "sweep"),
    ],
)
def test_a_wrong_word_answers_with_the_right_one(bhlog, arguments, hint):
    code, _, err = bhlog(*arguments)
    assert code == 2
    assert hint in err


def test_help_says_where_sql_finds_decisions(bhlog):
    code, out, _ = bhlog("replay", "--help")
    assert code == 0
    assert "RUN/replay is where bhlog sql finds them" in " ".join(out.split())


def test_a_replay_that_is_there_is_not_overwritten(bhlog, tmp_path):
    options = ["replay", "bh", "--alpha", "0.1", "--out", tmp_path / "out"]
    assert bhlog(*options)[0] == 0
    code, _, err = bhlog(*options)
    assert (code, "is there already" in err) == (1, True)
    assert len(open_log("bh").shards) == 2


def test_sweep_says_which_layers_no_alpha_brings_down_to_the_target(bhlog):
    code, out, err = bhlog("sweep", "bh", "--experts", "1.5", "--min-k", "2", "--format", "json")
    assert code == 0
    assert {(row["alpha"], row["mean_experts"]) for row in json.loads(out)} == {(1e-6, 2)}
    assert err == (
        "bhlog: 2 layers cannot come down to 1.5 experts a token: at alpha 1e-06, the smallest, "
        "layer 0 takes 2; min_k and logits beyond the null model's support (p = 0 at any alpha) "
        "set a floor\n"
    )
    assert bhlog("sweep", "bh", "--experts", "3")[2] == ""
