"""Commands on a terminal of 80 columns, which pipes hide: nothing is cut, whatever is asked."""

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest

from bhlog.analysis.cli import main
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

LAYERS = tuple(range(48))
WIDTH = 80


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a BH run of 48 layers, and a file called as a picture is in chats."""
    folder = tmp_path_factory.mktemp("terminal")
    write_run(
        folder / "bh", layers=LAYERS, n_experts=16, n_sequences=2, length=12, n_shards=1, top_k=4,
        options=BhOptions(alpha=0.3), kde=normal_kde(LAYERS), sources=(":key:.txt",),
    )  # fmt: skip
    return folder


@pytest.fixture
def on_terminal(place, monkeypatch):
    """Runs a command on a terminal of WIDTH columns; gives what it shows, without colours."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
        seen = []
        reader = threading.Thread(target=lambda: seen.extend(pieces(ours)))
        reader.start()
        with monkeypatch.context() as patched, os.fdopen(theirs, "w") as terminal:
            patched.setattr(sys, "stdout", terminal)
            with pytest.raises(SystemExit) as end:
                main([str(a) for a in arguments])
        reader.join()
        os.close(ours)
        assert not end.value.code
        shown = b"".join(seen).decode().replace("\r\n", "\n")
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)

    return run


def pieces(terminal):
    """What is written to a terminal, until it is closed."""
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # Linux says so when the other end is closed
            return
        if not piece:
            return
        yield piece


@pytest.fixture
def piped(place, monkeypatch, capsys):
    """Runs a command into a pipe; gives what it prints."""
    monkeypatch.chdir(place)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        assert not end.value.code
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ("sweep", "bh"),
        ("sweep", "bh", "--experts", "4"),
        ("replay", "bh", "--alpha", "0.3"),
        ("compare", "bh", "--policy", "bh:0.3", "--policy", "topk:4", "--policy", "topp:0.9"),
        ("compare", "bh", "--policy", "bh:0.3", "--policy", "topk:4", "--by-layer"),
        ("sql", "bh", "SELECT * FROM routing LIMIT 2"),
        ("sql", "bh", "--query", "experts_per_token"),
        ("kde", "show", "bh"),
        ("verify", "bh"),
        ("info", "bh"),
    ],
    ids=lambda a: " ".join(a[:3]),
)
def test_every_number_is_whole_and_no_line_is_too_long(on_terminal, piped, arguments):
    shown = on_terminal(*arguments)
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert "…" not in shown and "..." not in re.sub(r"sha256 \w+\.\.\.", "", shown)
    number = re.compile(r"(?<![\w.-])-?[\d,]*\.?\d+(?:e[+-]\d+)?(?![\w.])")
    assert set(number.findall(piped(*arguments))) <= set(number.findall(shown))


def test_48_layers_of_a_sweep_can_be_read(on_terminal, piped):
    rows = json.loads(piped("sweep", "bh", "--format", "json"))
    found = [{} for _ in rows]
    for block in on_terminal("sweep", "bh").strip().split("\n\n"):
        header, *lines = (line.split() for line in block.splitlines())
        assert header[0] == "alpha"
        for known, line in zip(found, lines, strict=True):
            known |= dict(zip(header, line, strict=True))
    assert found == [{name: f"{value:.4g}" for name, value in row.items()} for row in rows]


def test_a_pipe_gets_the_table_whole(piped):
    lines = piped("sweep", "bh").splitlines()
    assert len(lines) == 13 and len(lines[0].split()) == len(LAYERS) + 3


def test_a_source_that_looks_like_a_picture_stays_text(on_terminal):
    assert ":key:.txt" in on_terminal("info", "bh")
    query = "SELECT DISTINCT source FROM tokens"
    assert on_terminal("sql", "bh", query).split() == ["source", ":key:.txt"]
