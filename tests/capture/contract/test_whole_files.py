import subprocess
import sys

import pytest

from bhlog.capture.contract import files
from bhlog.capture.contract.files import whole_file


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(ValueError), whole_file(path) as file:
        file.write(b"sec")
        raise ValueError
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_of_two_that_write_at_once_the_last_wins_whole(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as first:
        first.write(b"first" * 1000)
        with whole_file(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"!")
    assert path.read_bytes() == b"first" * 1000 + b"!"
    assert list(tmp_path.iterdir()) == [path]


WRITER = """
import sys
from pathlib import Path
from bhlog.capture.contract.files import whole_file
sys.stdin.readline()
for _ in range(100):
    with whole_file(Path(sys.argv[1])) as file:
        for _ in range(20):
            file.write(sys.argv[2].encode() * 500)
            file.flush()
"""


def test_processes_that_write_one_file_leave_one_of_theirs(tmp_path):
    path = tmp_path / "file"
    command = [sys.executable, "-c", WRITER, path]
    writers = [subprocess.Popen([*command, who], stdin=subprocess.PIPE) for who in "ab"]
    for writer in writers:
        writer.stdin.write(b"go\n")
        writer.stdin.close()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_bytes())
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen | {path.read_bytes()} <= {b"a" * 10_000, b"b" * 10_000}
    assert list(tmp_path.iterdir()) == [path]


def test_a_renamed_file_survives_a_power_cut(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files, "sync_folder", lambda folder: done.append(("sync", folder)))
    replace = type(tmp_path).replace
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda p, to: (done.append(("rename", to)), replace(p, to))
    )
    with whole_file(tmp_path / "run.json") as file:
        file.write(b"{}")
    assert done == [("rename", tmp_path / "run.json"), ("sync", tmp_path)]


def test_a_folder_that_is_not_there_is_the_callers_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "no" / "file"):
        pass
