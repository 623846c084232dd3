import json
import os
import re
import signal
import subprocess
import sys
from importlib.resources import files

import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.run import open_log
from bhlog.capture import checkpoint, session
from bhlog.capture.apps import watch
from tests.synthetic import normal_kde


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question.\n" * 4)
    return path


def bhlog(*arguments):
    """Run the command in this process; return its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_capture_writes_a_run_and_says_what_it_holds(text, tmp_path, capsys):
    run = tmp_path / "run"
    assert bhlog("capture", "demo", "--text", text, "--out", run, "--max-length", 50) == 0
    assert "172 tokens, 688 rows in 1 shard, " in capsys.readouterr().out
    log = open_log(run)
    assert log.manifest.routing.kind == "native" and log.manifest.closed
    assert log.manifest.options["max_length"] == 50


def test_capture_routes_by_bh_and_keeps_the_null_model(text, tmp_path):
    null, run = tmp_path / "null.parquet", tmp_path / "run"
    normal_kde(range(4)).save(null)
    assert bhlog(
        "capture", "demo", "--text", text, "--out", run, "--route", "bh", "--alpha", 0.3,
        "--kde", null, "--max-k", 8, "--renormalize", "yes", "--sample-every", 2,
    ) == 0  # fmt: skip
    log = open_log(run)
    options = log.manifest.routing.options
    assert (options.alpha, options.max_k, options.renormalize) == (0.3, 8, True)
    assert (run / "kde.parquet").read_bytes() == null.read_bytes()
    assert log.manifest.totals.sampled_out == 86


def test_capture_reads_json_lines_by_field(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"body": "abc"}) + "\n" + json.dumps({"body": "de"}) + "\n")
    run = tmp_path / "run"
    assert bhlog("capture", "demo", "--text", path, "--field", "body", "--out", run) == 0
    assert open_log(run).manifest.totals.tokens == 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--alpha", 1.5, "--route", "bh"], "alpha must be between 0 and 1, got 1.5"),
        (["--route", "bh"], "needs a null model"),
        (["--route", "bh", "--empirical", "--max-k", 65], "max_k is 65, but the model has 64"),
        (["--route", "bh", "--empirical", "--min-k", 9, "--max-k", 8], "at least min_k (9), got 8"),
        (["--route", "bh", "--kde", "nothing.parquet"], "nothing.parquet: "),
        (["--kde", "null.parquet"], "--kde needs --route bh"),
        (["--alpha", 0.3], "--alpha needs --route bh"),
        (["--max-k", 4], "--max-k needs --route bh"),
        (["--max-length", 0], "max_length must be at least 1"),
        (["--batch-size", 0], "batch_size must be at least 1"),
        (["--dtype", "float64"], "no dtype 'float64'"),
        (["--sample-every", 0], "sample_every must be at least 1"),
        (["--generate", -1], "generate must be at least 0"),
        (["--device", "abacus"], "no device 'abacus' here"),
        (["--device", "meta"], "no device 'meta' here"),
        (["--device", "cuda:99"], "no device 'cuda:99' here"),
        (["--resume"], "no run to resume"),
    ],
)
def test_a_wrong_option_ends_in_one_line_and_leaves_nothing(
    text, tmp_path, capsys, arguments, says
):
    run = tmp_path / "run"
    assert bhlog("capture", "demo", "--text", text, "--out", run, *arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error and error.startswith("bhlog: ")
    assert not run.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "nothing.txt"], "nothing.txt: no such file or folder"),
        (["--alpha", 0.3], "--alpha needs --route bh"),
        (["--route", "bh"], "needs a null model"),
        (["--route", "bh", "--alpha", 1.5], "alpha must be between 0 and 1, got 1.5"),
        (["--route", "bh", "--kde", "nothing.parquet"], "nothing.parquet: "),
        (["--trim-high", 8], "--trim-high is for --fit-kde: name its file"),
        (["--out", "."], "not empty"),
    ],
)
def test_a_plain_mistake_is_found_before_torch_is_imported(text, tmp_path, arguments, says):
    code = (
        "import sys; from bhlog.analysis.cli import main\ntry: main()\nfinally: print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, "capture", "demo", "--text", text, "--out", "run"]
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and says in done.stderr
    assert "torch" not in done.stdout.split()


def test_a_run_that_is_there_is_not_overwritten(text, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "mine.txt").write_text("precious")
    assert bhlog("capture", "demo", "--text", text, "--out", run) == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("content", "says"), [("", "nothing to capture"), (None, "no such file or folder")]
)
def test_text_that_is_empty_or_missing_is_named(tmp_path, capsys, content, says):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_text(content)
    assert bhlog("capture", "demo", "--text", path, "--out", tmp_path / "run") == 1
    assert says in capsys.readouterr().err


def test_a_model_without_routers_is_refused(text, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert bhlog("capture", tmp_path / "llama", "--text", text, "--out", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert "no router that bhlog knows" in error and "README.md lists all" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("broken", ["nothing", "config", "weights", "tokenizer"])
def test_a_folder_that_is_no_model_is_named(text, tmp_path, capsys, broken):
    (tmp_path / "model").mkdir()
    if broken == "config":
        (tmp_path / "model" / "config.json").write_text('{"model_type": "olmoe"')
    if broken in ("weights", "tokenizer"):
        for name in ("config.json", "model.safetensors"):
            content = (files("bhlog.capture.demo") / name).read_bytes()
            cut = content[:5000] if broken == "weights" else content
            (tmp_path / "model" / name).write_bytes(cut)
    if broken == "tokenizer":
        (tmp_path / "model" / "tokenizer.json").write_text("{")
    assert bhlog("capture", tmp_path / "model", "--text", text, "--out", tmp_path / "run") == 1
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sent",
    [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)],
)
def test_an_interrupted_capture_says_how_to_go_on_and_goes_on(
    text, tmp_path, capsys, monkeypatch, sent
):
    run, batches = tmp_path / "run", []
    command = ["capture", "demo", "--text", text, "--max-length", 40, "--batch-size", 2]

    def interrupted(model, batch, *options):
        batches.append(batch)
        if len(batches) == 2:
            os.kill(os.getpid(), sent)
        return run_batch(model, batch, *options)

    run_batch = session._run
    monkeypatch.setattr(session, "_run", interrupted)
    # a shell starts background jobs, such as this suite may be, with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert bhlog(*command, "--out", run) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    assert f"{run} is closed; the same command with --resume" in capsys.readouterr().err
    assert open_log(run).manifest.totals.tokens == 80
    assert bhlog("verify", run) == 0

    text.write_text(text.read_text().upper())
    assert bhlog(*command, "--out", run, "--resume") == 1
    assert "give the texts and the options of the run again" in capsys.readouterr().err
    text.write_text("To be, or not to be, that is the question.\n" * 4)
    assert bhlog(*command, "--out", run, "--resume") == 0
    assert bhlog(*command, "--out", tmp_path / "whole") == 0
    cut, whole = open_log(run), open_log(tmp_path / "whole")
    assert cut.tokens().equals(whole.tokens())
    assert signal.getsignal(sent) in (signal.SIG_DFL, before)


def test_a_folder_in_use_is_refused_before_the_model_is_loaded(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", pytest.fail)
    assert bhlog("capture", "demo", "--text", text, "--out", text) == 1
    assert "a file; choose another name" in capsys.readouterr().err


def test_progress_is_lines_where_no_bar_can_move(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(watch.ProgressLines, "EVERY_SECONDS", 0.0)
    run = tmp_path / "run"
    command = ["capture", "demo", "--text", text, "--max-length", 40, "--batch-size", 2]
    assert bhlog(*command, "--out", run) == 0
    lines = capsys.readouterr().err.splitlines()
    assert re.search(r"run: 160 of 172 tokens, [\d,]+ tokens/s$", lines[1])  # nothing is sealed yet


def test_progress_says_what_is_sealed(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(watch.ProgressLines, "EVERY_SECONDS", 0.0)
    command = ["capture", "demo", "--text", text, "--max-length", 40, "--batch-size", 1]
    assert bhlog(*command, "--out", tmp_path / "run", "--shard-rows", 1) == 0
    assert re.search(r"tokens/s, [\d.]+ kB$", capsys.readouterr().err, re.MULTILINE)
