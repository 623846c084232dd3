"""Every command and every Python block of the README runs, in order, in one folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(
    r"^```(?P<language>console|python)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE
)


def commands():
    """Of each console block and Python block in turn: its kind, its text and the output shown."""
    for block in BLOCK.finditer(README.read_text(encoding="utf-8")):
        if block["language"] == "python":
            yield "python", block["body"], ""
            continue
        for part in re.split(r"^\$ ", block["body"], flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            n = next(i for i, line in enumerate(lines) if not line.endswith("\\")) + 1
            yield "console", "\n".join(lines[:n]), "\n".join(lines[n:])


def words(text):
    """Words and names in a text; not its numbers, which differ from machine to machine."""
    return set(re.findall(r"[A-Za-z_]{3,}", text))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the README's reader works: a text to read, and bhlog on the path."""
    path = tmp_path_factory.mktemp("readme")
    (path / "notes.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    (path / "talk.jsonl").write_text('{"text": "How are you?"}\n{"text": "Fine, thank you."}\n')
    return path


@pytest.mark.parametrize(("kind", "text", "shown"), list(commands()))
def test_the_readme_does_what_it_says(folder, kind, text, shown):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "200",
    }
    arguments = [sys.executable, "-W", "error", "-c", text] if kind == "python" else None
    done = subprocess.run(
        arguments or ["bash", "-c", text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{shlex.quote(text)}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip(), f"{text} printed nothing"
    missing = words(shown) - words(done.stdout + done.stderr)
    assert not missing, f"{shlex.quote(text)} does not print {missing}:\n{done.stdout}"
