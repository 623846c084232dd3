"""Scores by lm-evaluation-harness: the bare harness's own, and rows that know their requests."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from bhlog.analysis.null.estimate import fit_kde
from bhlog.analysis.run import open_log
from bhlog.capture.apps.evaluation import evaluate
from bhlog.capture.apps.harness import byte_tokenizer, harness_model, named_requests
from bhlog.capture.apps.scoring import Exam, Examiner, Setting, scores
from bhlog.capture.checkpoint import LoadedModel
from bhlog.capture.contract.errors import InvalidOption, RouterLogError, RunExists
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.observe import observe, route
from bhlog.capture.text import ByteTokenizer
from bhlog.capture.writing.fitting import KdeFit
from tests.capture.tiny import TRANSFORMERS_4, tiny_model
from tests.synthetic import write_run

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'bhlog[eval]'")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TRANSFORMERS_4, reason="the harness asks for transformers 5"),
    pytest.mark.filterwarnings("ignore"),  # the harness's own and its libraries'
]
TASKS = ("choice", "letter", "write", "read")
WORDS = ("module", "class", "value", "list", "name", "string", "object", "type", "call", "error")
DOCS = [
    {
        "question": f"The {WORDS[i % 10]} of {'each ' * (i % 4)}{WORDS[(3 * i + 1) % 10]} is",
        "choices": [WORDS[(i + 2) % 10], WORDS[(i + 5) % 10] + "s", "\u00e9\x00\x00s"],
        "letters": ["A", "B", "C"],
        "answer": i % 3,
    }
    for i in range(10)
]
COMMON = """
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
"""
KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "letter": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{letters}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - metric: acc
""",
    "write": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["Q"]
  max_gen_toks: 5
metric_list:
  - metric: exact_match
""",
    "read": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - metric: word_perplexity
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder of small tasks, of files alone."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for task, kind in KINDS.items():
        (folder / f"{task}.yaml").write_text(COMMON.format(task=task, data=data) + kind)
    return folder


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    """A random OLMoE that reads bytes; few positions, so that texts are read in windows."""
    model = tiny_model(max_position_embeddings=24)
    model.resize_token_embeddings(257, mean_resizing=False)
    model.config._name_or_path = "tiny"
    return LoadedModel(model, ByteTokenizer(), 256, "bytes")


def asked(loaded, folder, out, *, tasks=TASKS, **options) -> Examiner:
    return Examiner(loaded, Exam(tasks, include_path=str(folder), **options), out)


def bare(loaded, tasks, names=TASKS, **options):
    """What the harness says without bhlog."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    lm = harness_model(loaded, batch_size=4)
    done = lm_eval.simple_evaluate(lm, tasks=list(names), task_manager=manager, **options)
    return done["results"], done["samples"]


def rows(run: Path) -> pl.DataFrame:
    """Tokens with their logits and names, in an order of their own."""
    table = open_log(run).sql(
        "SELECT source, sample_id, position, token_id, layer, logits, sequence FROM routing "
        "JOIN tokens USING (rank, sequence, position, token_id)"
    )
    return table.pl().sort("source", "sample_id", "position", "layer", "sequence", "token_id")


@pytest.mark.parametrize("which", ["demo", "tiny"])
def test_native_scores_are_the_bare_harnesss_digit_for_digit(which, request, tasks, tmp_path):
    loaded = request.getfixturevalue(which)
    expected, samples = bare(loaded, tasks)
    asked(loaded, tasks, tmp_path, batch_size=4).score(Setting(None))
    table = scores(tmp_path, [Setting(None)])
    assert {*table["task"]} == {*TASKS}
    for row in table.rows(named=True):
        (key,) = (k for k in expected[row["task"]] if k.startswith(f"{row['metric']},"))
        assert row["score"] == expected[row["task"]][key]
        assert row["documents"] == len(samples[row["task"]]) == len(DOCS)
        error = expected[row["task"]][key.replace(",", "_stderr,", 1)]
        assert row["score_se"] == (error if isinstance(error, float) else None)
        assert row["mean_experts"] == loaded.model.config.num_experts_per_tok


def test_rows_are_those_of_their_requests(tiny, tasks, tmp_path):
    asked(tiny, tasks, tmp_path, batch_size=4).score(Setting(None))
    texts = defaultdict(list)
    tokens = open_log(tmp_path / "native").tokens().to_pylist()
    tokens.sort(key=lambda t: (t["sequence"], t["position"]))
    for token in tokens:
        texts[token["source"], token["sample_id"], token["sequence"]].append(token)
    most = tiny.model.config.max_position_embeddings
    seen = defaultdict(set)
    for (task, sample, _), row in texts.items():
        document, _, which = sample.partition("/")
        doc = DOCS[int(document)]
        question = list(doc["question"].encode())
        ids = [token["token_id"] for token in row]
        assert [token["position"] for token in row] == list(range(len(row)))
        seen[task].add(sample)
        if task == "choice":
            answer = list(f" {doc['choices'][int(which)]}".encode())
            assert ids == (question + answer)[:-1][-most:]
        elif task == "letter":
            assert which == "0+1+2"  # one forward answers all three
            assert ids == question[-most:]
        elif task == "write":
            prompt = [token for token in row if token["phase"] == "prefill"]
            assert [t["token_id"] for t in prompt] == question[-(most - 5) :]
            assert which == "0" and len(row) >= len(prompt)
        else:
            fed = [256, *question][:-1]
            assert any(ids == fed[i : i + len(ids)] for i in range(len(fed)))
    assert seen["choice"] == {f"{i}/{j}" for i in range(10) for j in range(3)}
    assert all(len(seen[task]) == 10 for task in ("letter", "write", "read"))


@pytest.mark.parametrize("size", [1, 3, "auto"])
def test_other_batches_log_the_same_rows(tiny, tasks, tmp_path, size):
    names = ("choice", "letter", "write")
    for folder, batch_size in (("a", 4), ("b", size)):
        asked(tiny, tasks, tmp_path / folder, tasks=names, batch_size=batch_size).score(
            Setting(None)
        )
    one, other = rows(tmp_path / "a" / "native"), rows(tmp_path / "b" / "native")
    same = ["source", "sample_id", "position", "token_id", "layer"]
    assert one.height > 0 and one.select(same).equals(other.select(same))
    a, b = (np.stack(table["logits"].to_numpy()) for table in (one, other))
    np.testing.assert_allclose(a, b, atol=1e-4)  # sums in another order


def test_the_adapter_works_around_ones_own_call(tiny, tasks, tmp_path):
    lm = harness_model(tiny, batch_size=3)
    before = dict(vars(lm))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    with route(lm.model, tmp_path / "run", policy="topk:1") as patcher:
        with named_requests(lm, patcher, {"choice": [4, 7]}):
            lm_eval.simple_evaluate(
                lm, tasks=["choice"], task_manager=manager, samples={"choice": [4, 7]}
            )
        assert vars(lm).keys() == before.keys()
    run = open_log(tmp_path / "run")
    assert {*run.tokens()["sample_id"].to_pylist()} == {
        f"{i}/{j}" for i in (4, 7) for j in range(3)
    }
    assert run.sql("SELECT max(n_selected) FROM routing").fetchall() == [(1,)]
    with (
        observe(tiny.model, tmp_path / "other") as patcher,
        pytest.raises(InvalidOption, match="expected lm_eval's HFLM"),
        named_requests(tiny.model, patcher),
    ):
        pass


def test_settings_differ_by_pairs_and_finished_ones_are_skipped(demo, tasks, tmp_path):
    settings = [Setting(None), Setting(BhOptions.of("topk:1")), Setting(BhOptions.of("minp:0.5"))]
    examiner = asked(demo, tasks, tmp_path, tasks=("choice",), batch_size=4)
    for setting in settings[:2]:
        examiner.score(setting)
    finished = (tmp_path / "topk-1" / "run.json").stat().st_mtime_ns
    with pytest.raises(RunExists, match="--resume"):
        examiner.score(settings[1])
    with observe(demo.model, tmp_path / "minp-0.5"):  # as one that was cut off
        pass
    for setting in settings:
        examiner.score(setting, resume=True)
    assert (tmp_path / "topk-1" / "run.json").stat().st_mtime_ns == finished
    other = asked(demo, tasks, tmp_path, tasks=("choice",), limit=3)
    with pytest.raises(InvalidOption, match="another model, exam or setting"):
        other.score(settings[0], resume=True)
    table = scores(tmp_path, settings)
    routed = {}
    for setting in settings:
        with (
            route(demo.model, policy=setting.text)
            if setting.options
            else observe(demo.model, tmp_path / "plain")
        ):
            _, samples = bare(demo, tasks, ("choice",))
        routed[setting.text] = {d["doc_id"]: d["acc_norm"] for d in samples["choice"]}
    for row in table.filter(pl.col("metric") == "acc_norm").rows(named=True):
        gaps = [routed[row["policy"]][d] - routed["native"][d] for d in range(len(DOCS))]
        assert row["difference"] == pytest.approx(np.mean(gaps))
        assert row["difference_se"] == pytest.approx(np.std(gaps, ddof=1) / np.sqrt(len(gaps)))
        assert row["score"] == pytest.approx(np.mean(list(routed[row["policy"]].values())))
    assert table.filter(pl.col("policy") == "topk:1")["mean_experts"].unique().to_list() == [1.0]
    assert table.filter(pl.col("policy") == "topk:1")["flops"].unique().to_list() == [1 / 8]


def test_a_policy_is_run_on_logits_centred_as_those_of_its_null(tmp_path):
    run = open_log(write_run(tmp_path / "run", n_sequences=2, length=16))
    nulls = {kind: fit_kde(run, FitOptions(centre=kind)) for kind in ("none", "median")}
    for kind, kde in nulls.items():
        setting = Setting.of(BhOptions(0.3), kde)
        assert setting.options.centre == kind
        assert setting.kde is kde
        setting.options.check_null(kde)
    assert Setting.of(BhOptions.of("topk:2"), nulls["median"]).kde is None


def test_documents_that_fit_the_null_are_not_scored(demo, tasks, tmp_path):
    examiner = asked(demo, tasks, tmp_path, tasks=("choice",), fit_docs=3, limit=5)
    assert examiner.left_out == {"choice": range(3)}
    kde = examiner.fit(KdeFit(tmp_path / "null.parquet", trim_high=8))
    assert kde.sha256 == KdeModel.load(tmp_path / "null.parquet").sha256
    setting = Setting.of(BhOptions(0.3), kde)
    examiner.score(setting)

    def documents(run):
        names = open_log(tmp_path / run).tokens()["sample_id"].to_pylist()
        return {int(name.partition("/")[0]) for name in names}

    assert documents("fit") == {0, 1, 2} and documents("bh-0.3") == {3, 4, 5, 6, 7}
    assert scores(tmp_path, [setting])["documents"].unique().to_list() == [5]
    with pytest.raises(InvalidOption, match="choice has 10 documents"):
        asked(demo, tasks, tmp_path, tasks=("choice",), fit_docs=10)


def test_the_command_prints_a_table_and_draws_it(tasks, tmp_path):
    text = tmp_path / "fit.txt"
    text.write_text("import this\n" * 40)
    out, table = tmp_path / "runs", tmp_path / "table.json"
    done = CliRunner().invoke(
        evaluate,
        f"demo --tasks choice --include-path {tasks} --alpha 0.3 --policy topk:4 --limit 4 "
        f"--fit-kde {tmp_path}/null.parquet --fit-text {text} --trim-high 8 --out {out} "
        f"--figure {tmp_path}/f.png --table {table}",
    )
    assert done.exit_code == 0, done.output
    found = json.loads(table.read_text())
    assert [row["policy"] for row in found[::2]] == ["native", "bh:0.3", "topk:4"]
    assert (tmp_path / "f.png").exists()
    assert {*open_log(out / "bh-0.3").verify(replay=True)["status"]} == {"ok"}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--tasks", "choise"], "did you mean choice"),
        (["--tasks", "choice", "--alpha", "0.3"], "bh:0.3 needs a null model"),
        (["--tasks", "choice", "--fit-docs", "3"], "--fit-kde FILE goes with"),
        (["--tasks", "choice", "--policy", "topk:4", "--policy", "topk:4"], "asked for twice"),
        (["--tasks", "choice", "--policy", "storey:0.3"], "no policy 'storey'"),
        (["--tasks", "choice", "--batch-size", "none"], "whole number above 0 or auto"),
    ],
)
def test_wrong_options_end_in_one_line(tasks, tmp_path, options, words):
    arguments = ["demo", "--include-path", str(tasks), "--out", str(tmp_path / "runs"), *options]
    error = CliRunner().invoke(evaluate, arguments).exception
    assert isinstance(error, RouterLogError) and words in str(error)
    assert "\n" not in str(error) and not (tmp_path / "runs").exists()


def test_a_byte_is_a_token():
    text = "caf\u00e9\x00\n\t \U0001f600 <|endoftext|"
    tokenizer = byte_tokenizer(257)
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == 256
