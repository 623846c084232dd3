"""Ctrl-C in every command: one line, status 130 and never a traceback, also when it comes often."""

import os
import signal
import subprocess
import sys
import time

import pytest

from bhlog.analysis.cli import bhlog, main
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

LAYERS = (0, 1)
# each piece of a log takes a while, as on a slow disk
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
import bhlog.analysis.log as log, bhlog.analysis.fold as fold
fold.PIECE_LOGITS = 64
pieces = log.Log.pieces
def slowly(*arguments, **options):
    print("reading", flush=True)
    for piece in pieces(*arguments, **options):
        time.sleep(0.3)
        yield piece
log.Log.pieces = slowly
from bhlog.analysis.cli import main
main()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupts")
    shape = {"layers": LAYERS, "n_experts": 8, "n_sequences": 8, "length": 40, "top_k": 2}
    kde = normal_kde(LAYERS)
    kde.save(folder / "null.parquet")
    write_run(folder / "native", **shape)
    write_run(folder / "bh", options=BhOptions(alpha=0.3, max_k=4), kde=kde, **shape)
    return folder


def test_an_interrupted_command_says_so(place, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(bhlog, "main", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["info", "bh"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "bhlog: interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 20])
@pytest.mark.parametrize(
    "arguments",
    [
        "replay bh --alpha 0.1 --threads 2",
        "replay bh --alpha 0.1 --out OUT",
        "sweep bh --threads 2",
        "compare bh --policy topk:2 --policy bh:0.2",
        "kde fit native --out x.parquet",
        "kde check null.parquet native",
        "fidelity native bh",
        "verify bh --replay",
    ],
)
def test_ctrl_c_ends_whatever_runs_in_one_line(place, tmp_path, arguments, times):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments.replace("OUT", str(tmp_path / "out")).split()],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline().startswith("reading")
    time.sleep(0.3)
    for _ in range(times):
        if process.poll() is None:
            os.kill(process.pid, signal.SIGINT)
        time.sleep(0.03)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip() == "bhlog: interrupted"
    assert not [*place.rglob("*.part"), *tmp_path.rglob("*.part")]


def test_what_duckdb_makes_of_an_interrupt_is_one(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise RuntimeError("Query interrupted")

    monkeypatch.setattr(bhlog, "main", interrupted)
    with pytest.raises(SystemExit) as end:
        main(["info", "bh"])
    assert end.value.code == 130
    assert capsys.readouterr().err == "bhlog: interrupted\n"


def test_while_the_program_loads_an_interrupt_ends_it_in_a_line():
    slowly = (
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click':\n"
        "            print('loading', flush=True)\n"
        "            time.sleep(20)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from bhlog.analysis.program import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", slowly, "info", "nothing"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout.readline() == b"loading\n"
        program.send_signal(signal.SIGINT)
        _, told = program.communicate(timeout=20)
    assert (program.returncode, told) == (130, b"bhlog: interrupted\n")
