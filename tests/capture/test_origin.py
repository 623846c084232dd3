"""What a manifest says of how its run came to be."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from bhlog.analysis.run import open_log
from bhlog.capture.checkpoint import load_model
from bhlog.capture.documents import MOST_NAMED, read_documents, text_sha256
from bhlog.capture.observe import observe
from bhlog.capture.origin import origin_here
from bhlog.capture.session import capture
from bhlog.capture.text import windows
from tests.capture.tiny import batch


def git(*words: str) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b")
    run = subprocess.run(["git", *settings, *words], capture_output=True, text=True, check=True)
    return run.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    git("init", "-q")
    Path("code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-qm", "one")
    return tmp_path


def test_the_commit_is_that_of_the_working_folder(repository, monkeypatch):
    git("tag", "v1")
    assert origin_here().commit == git("rev-parse", "HEAD")
    inner = repository / "a"
    inner.mkdir()
    monkeypatch.chdir(inner)
    (repository / "code.py").write_text("2\n")
    assert origin_here().commit == git("rev-parse", "HEAD") + "-dirty"


def test_outside_of_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert origin_here().commit is None


def test_without_git_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert origin_here().commit is None


def test_an_observed_run_keeps_the_program_that_made_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/train.py", "--hf-token", "x", "--steps=3"])
    with observe(model, tmp_path / "run"):
        model(*batch([3]))
    origin = open_log(tmp_path / "run").manifest.origin
    assert origin.command == ("train.py", "--hf-token", "...", "--steps=3")
    assert (origin.texts, origin.tokenizer) == ({}, None)


def test_a_notebooks_kernel_is_no_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "kernel.json"])
    assert origin_here().command == ()


def test_a_capture_keeps_its_texts_and_tokenizer(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name * 9)
    loaded = load_model("demo")
    texts = windows(read_documents([tmp_path]), loaded.tokenizer, max_length=64)
    capture(loaded, texts, tmp_path / "run", text_sha256=text_sha256([tmp_path]))
    origin = open_log(tmp_path / "run").manifest.origin
    assert origin.tokenizer == "bytes"
    assert origin.texts == {
        name: hashlib.sha256((name * 9).encode()).hexdigest() for name in ("a.txt", "b.txt")
    }


def test_many_files_have_one_sum(tmp_path):
    for number in range(MOST_NAMED + 1):
        (tmp_path / f"{number:04d}.txt").write_text(str(number))
    (once,) = text_sha256([tmp_path]).items()
    assert once[0] == f"{MOST_NAMED + 1} files"
    (tmp_path / "0007.txt").write_text("8")
    assert text_sha256([tmp_path]) != dict([once])
