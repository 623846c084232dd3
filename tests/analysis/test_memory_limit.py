"""Commands under `ulimit -v`: the right answer, or one line."""

import os
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from bhlog.analysis.memory_limit import is_out_of_memory, told
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

LAYERS = (0, 1, 2)
BHLOG = [sys.executable, "-c", "from bhlog.analysis.cli import main; main()"]
EVERY = "BHLOG_EVERY_FAULT" in os.environ
STEPS = [int(mib) for mib in np.geomspace(3000, 40, 20)]
JOBS = {
    "replay": ["replay", "RUN", "--alpha", "0.1", "--format", "json"],
    "decisions": ["replay", "RUN", "--alpha", "0.1", "--out", "OUT"],
    "sweep": ["sweep", "RUN", "--format", "json"],
    "sql": ["sql", "RUN", "SELECT layer, sum(n_selected) FROM routing GROUP BY 1 ORDER BY 1"],
    "fit": [
        "kde",
        "fit",
        "RUN",
        "--trim-high",
        "8",
        "--out",
        "OUT/null.parquet",
        "--format",
        "json",
    ],
    "verify": ["verify", "RUN"],
    **({"capture": ["capture", "demo", "--text", "TEXT", "--out", "OUT"]} if EVERY else {}),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("limited") / "run",
        layers=LAYERS,
        n_experts=64,
        n_sequences=8,
        length=250,
        options=BhOptions(alpha=0.3),
        kde=normal_kde(LAYERS),
        sealed=True,
    )


def answer(
    job: str, run: Path, out: Path, mib: int | None
) -> tuple[int, dict[str, bytes], list[str]]:
    """Exit status, what was printed and written, and the lines of stderr."""

    def limit() -> None:
        if mib is not None:
            resource.setrlimit(resource.RLIMIT_AS, (mib << 20, mib << 20))

    text = out.with_suffix(".txt")
    text.write_text("Of two that write one file, the last to finish wins, whole.\n" * 20)
    words = {"RUN": str(run), "OUT": str(out), "TEXT": str(text)}
    done = subprocess.run(
        [*BHLOG, *(words.get(w, w.replace("OUT", str(out))) for w in JOBS[job])],
        capture_output=True,
        preexec_fn=limit,
        timeout=100,
    )
    files = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.parquet")}
    printed = done.stdout.replace(str(out).encode(), b"OUT")
    return done.returncode, {**files, "": printed}, done.stderr.decode().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_memory_that_falls_in_steps_ends_a_command_in_a_line(tmp_path, run, job):
    if job == "capture" and find_spec("torch") is None:
        pytest.skip("needs torch")
    status, whole, _ = answer(job, run, tmp_path / "whole", None)
    assert status == 0
    ended = set()
    for mib in STEPS if EVERY else STEPS[4::8]:
        status, found, told = answer(job, run, tmp_path / f"limit{mib}", mib)
        ended.add(status)
        if status:
            assert status == 1 and told[-1].startswith("bhlog: "), (mib, told)
            assert all(line.startswith(("wrote ", "bhlog: ")) for line in told[:-1]), (mib, told)
            assert job == "capture" or found.items() - {("", found[""])} <= whole.items(), mib
        elif job == "capture":
            names = [name for name in whole if name.startswith("routing/")]
            assert names and all(found[name] == whole[name] for name in names)
        else:
            assert found == whole, mib
    assert 1 in ended


def test_what_says_that_memory_is_out_is_known_by_its_causes():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("can't start new thread"))
    try:
        try:
            raise ImportError("x.so: failed to map segment from shared object")
        except ImportError as error:
            raise OSError("cannot load x") from error
    except OSError as error:
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("a mistake"))
    assert "out of memory" in told() and "\n" not in told()
