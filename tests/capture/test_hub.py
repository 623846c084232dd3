"""Models by hub name, from a local cache and without a network."""

import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files

import pytest
from safetensors.torch import load_file, save_file

from bhlog.analysis.run import open_log

pytestmark = pytest.mark.slow

MAIN, OTHER = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A hub cache that holds the demo's model as tiny/olmoe, at two revisions."""
    folder = tmp_path_factory.mktemp("hub")
    model = folder / "models--tiny--olmoe"
    for commit in (MAIN, OTHER):
        snapshot = model / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            shutil.copy(str(files("bhlog.capture.demo") / name), snapshot / name)
    weights = load_file(model / "snapshots" / OTHER / "model.safetensors")
    halved = {name: value * 0.5 for name, value in weights.items()}
    save_file(halved, model / "snapshots" / OTHER / "model.safetensors", {"format": "pt"})
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(MAIN)
    (model / "refs" / "halved").write_text(OTHER)
    return folder


@pytest.fixture(scope="module")
def bhlog(cache, tmp_path_factory):
    """Runs several commands in one process that knows the cache and no network."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_text("To be, or not to be, that is the question.\n")

    def run(*commands):
        code = (
            "import json, sys; from bhlog.analysis.cli import main\n"
            "for command in json.loads(sys.argv[1]):\n"
            "    try: main(command)\n"
            "    except SystemExit as end: print('code', end.code, file=sys.stderr)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(commands)],
            cwd=folder,
            env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return folder, done.stderr

    return run


def test_a_hub_name_loads_from_the_cache_and_the_run_says_which_commit(bhlog):
    text = ["--text", "text.txt"]
    folder, _ = bhlog(
        ["capture", "tiny/olmoe", *text, "--out", "main"],
        ["capture", "tiny/olmoe", *text, "--out", "halved", "--revision", "halved"],
        ["capture", "tiny/olmoe", *text, "--out", "commit", "--revision", OTHER],
        ["capture", "demo", *text, "--out", "demo"],
    )
    logs = {name: open_log(folder / name) for name in ("main", "halved", "commit", "demo")}
    models = {name: log.manifest.model for name, log in logs.items()}
    assert models["main"].name == "tiny/olmoe"
    assert [models[n].revision for n in ("main", "halved", "commit")] == [MAIN, OTHER, OTHER]
    first = {name: log.read(next(log.row_groups()), ["logits"]) for name, log in logs.items()}
    assert first["main"].equals(first["demo"])
    assert first["halved"].equals(first["commit"]) and not first["halved"].equals(first["main"])


def test_what_is_not_on_the_hub_ends_in_one_line_each(bhlog):
    options = ["--text", "text.txt", "--out", "run"]
    folder, said = bhlog(
        ["capture", "tiny/nothing", *options],
        ["capture", "./tiny/olmoe", *options],
        ["capture", "/tiny/olmoe", *options],
        ["capture", "a/b/c", *options],
        ["capture", "tiny/olmoe", *options, "--revision", "nothing"],
        ["capture", ".", *options, "--revision", "main"],
    )
    lines = [line for line in said.splitlines() if line.startswith("bhlog: ")]
    assert len(lines) == said.count("code 1") == 6
    assert "looked up on the hub and in its cache" in lines[0]
    assert all("no such folder, and no name on the hub" in line for line in lines[1:4])
    assert "tiny/olmoe: the model cannot be loaded" in lines[4]
    assert "a revision is of a model on the hub" in lines[5]
    assert not (folder / "run").exists()
