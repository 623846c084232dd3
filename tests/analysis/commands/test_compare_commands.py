import csv
import io
import json

import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.replay.registry import families
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

LAYERS = (0, 2)
PNG = b"\x89PNG\r\n\x1a\n"

USUAL = [name for name in families() if name != "lfdr"]  # which needs a central null
TESTS = ("alpha", "beta", "x")  # parameters of policies that test


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(
        tmp_path_factory.mktemp("bh") / "run",
        layers=LAYERS,
        n_sequences=6,
        length=20,
        options=BhOptions(alpha=0.3, max_k=12),
        kde=normal_kde(LAYERS),
    )


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native") / "run"
    return write_run(folder, layers=LAYERS, n_sequences=6, length=20)


@pytest.fixture
def bhlog(capsys):
    """Run `bhlog compare`; gives exit code, stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main(["compare", *(str(a) for a in arguments)])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def table(text):
    header, *lines = [line.split() for line in text.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_policies_stand_side_by_side(native, bhlog):
    code, out, err = bhlog(native, "--policy", "topk:4", "--policy", "topp:0.9,max_k=6")
    assert code == 0 and "a sample of 120 tokens a layer" in err
    four, nine = table(out)
    assert four["policy"] == "topk:4" and nine["policy"] == "topp:0.9,max_k=6"
    assert (four["mean_experts"], four["native_recall"], four["flops"]) == ("4", "0.5", "0.5")


def test_without_policies_all_are_brought_to_the_models_own_cost(run, bhlog):
    code, out, err = bhlog(run)
    assert code == 0
    lines = table(out)
    assert [line["policy"].split(":")[0] for line in lines] == USUAL
    near = [line["policy"] for line in lines if abs(float(line["mean_experts"]) - 8) <= 0.05]
    assert {name.split(":")[0] for name in near} >= {"bh", "storey", "threshold", "topk", "topp"}
    _, bounds, missed = err.splitlines()
    assert bounds == "bhlog: max_k 12 as in the run; --min-k and --max-k say otherwise"
    assert missed.startswith("bhlog: no value gives exactly 8 experts, this is the nearest: ")


def test_without_p_values_the_tests_are_left_out_and_named(native, bhlog, tmp_path):
    code, out, err = bhlog(native)
    assert code == 0
    assert [line["policy"].split(":")[0] for line in table(out)] == [
        "entropy",
        "minp",
        "seqtopk",
        "threshold",
        "topk",
        "topp",
    ]
    assert "left out bh, by, hc, hc+, lfdr, storey" in err and "--kde FILE" in err
    normal_kde(LAYERS).save(tmp_path / "null.parquet")
    out = bhlog(native, "--kde", tmp_path / "null.parquet")[1]
    assert len(table(out)) == len(USUAL)


def test_a_budget_solves_for_the_value(run, bhlog):
    code, out, _ = bhlog(run, "--policy", "bh", "--policy", "topk", "--experts", "4")
    assert code == 0
    bh, topk = table(out)
    assert bh["policy"].startswith("bh:0.") and topk["policy"] == "topk:4"
    assert float(bh["mean_experts"]) == pytest.approx(4, abs=0.05)  # 240 rows, some of them jump


def test_lines_for_each_layer(native, bhlog):
    lines = table(bhlog(native, "--policy", "topk:4", "--by-layer")[1])
    assert [line["layer"] for line in lines] == ["0", "2", "all"]
    lines = table(bhlog(native, "--policy", "topk:4", "--by-layer", "--layers", "2")[1])
    assert [line["layer"] for line in lines] == ["2", "all"]


def test_rows_bounds_and_all_columns(native, bhlog):
    out = bhlog(
        native, "--policy", "topk:2", "--min-k", "3", "--max-k", "5", "--where", "position < 5",
        "--all-columns",
    )[1]  # fmt: skip
    header, line = (text.split() for text in out.splitlines())
    found = dict(zip(header, line, strict=False))  # the histogram, last, has spaces
    assert (found["min_k"], found["max_k"], found["rows"]) == ("3", "5", "60")
    assert (found["mean_experts"], found["at_min_k"], found["none_rejected"]) == ("3", "1", "-")


def test_json_and_csv_hold_every_column(native, bhlog):
    (line,) = json.loads(bhlog(native, "--policy", "topk:4", "--format", "json")[1])
    assert line["histogram"] == [0] * 4 + [240] + [0] * 12
    (text,) = csv.DictReader(io.StringIO(bhlog(native, "--policy", "topk:4", "--format", "csv")[1]))
    assert list(text) == list(line)
    assert json.loads(text["histogram"]) == line["histogram"] and text["layer"] == ""


def test_the_list_names_every_family_with_an_example_that_parses(native, bhlog):
    code, out, err = bhlog("--list", "--format", "json")
    assert (code, err) == (0, "")
    listed = json.loads(out)
    assert [line["policy"].split(":")[0] for line in listed] == list(families())
    assert all(line["chooses"].endswith(".") for line in listed)
    examples = [line["policy"] for line in listed if line["parameter"] not in TESTS]
    assert bhlog(native, *(f"--policy={text}" for text in examples))[0] == 0


def test_a_figure_is_written(run, bhlog, tmp_path):
    code, out, err = bhlog(run, "--experts", "4", "--figure", tmp_path / "cost.png")
    assert code == 0 and len(table(out)) == len(USUAL)
    assert (tmp_path / "cost.png").read_bytes().startswith(PNG)
    assert f"wrote {tmp_path}/cost.png" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", "bg:0.3"], "bhlog: policy 'bg:0.3': no policy 'bg'"),
        (["--policy", "bh"], "bhlog: policy 'bh': alpha is missing, as in bh:0.3"),
        (["--policy", "topk:x"], "k must be a whole number, got 'x'"),
        (["--policy", "topk:17"], "k is 17, but the model has 16 experts"),
        (["--policy", "bh:0.3,max_k=17"], "max_k is 17, but the model has 16 experts"),
        (["--policy", "topk:4", "--min-k", "9", "--max-k", "3"], "at least min_k (9), got 3"),
        (["--experts", "17"], "from 0 to the model's 16 experts, got 17"),
        (["--experts", "nan"], "from 0 to the model's 16 experts, got nan"),
        (["--policy", "topk:4", "--layers", "1"], "no layer 1"),
        (["--policy", "topk:4", "--where", "phas = 1"], "where: no column 'phas'"),
        (["--policy", "topk:4", "--where", "position"], "expected a condition"),
        (["--policy", "topk:4", "--where", "position > 99"], "no rows where position > 99"),
        (["--kde", "nowhere.parquet"], "nowhere.parquet: cannot read a null model"),
        (["--figure", "cost.xyz"], "cost.xyz: figures end in"),
        (["--figure", f"{__file__}/cost.png"], "its folder cannot be made"),
    ],
)
def test_a_mistake_is_one_line(run, bhlog, arguments, message):
    code, out, err = bhlog(run, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("bhlog: ") and message in err and err.count("\n") == 1


def test_a_test_without_a_null_model_says_how_to_get_one(native, bhlog):
    code, _, err = bhlog(native, "--policy", "bh:0.3")
    assert code == 1 and "bhlog kde fit" in err and err.count("\n") == 1


def test_a_run_is_needed(bhlog):
    code, _, err = bhlog()
    assert code == 2 and "name the run to compare policies on, or --list" in err
