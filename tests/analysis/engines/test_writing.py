"""What an import leaves behind: a whole run, or nothing."""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bhlog.analysis.run import open_log
from tests.analysis.engines.traces import run_command
from tests.disk import between, faults


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logits")
    for layer in range(2):
        np.save(folder / f"router_logits_L{layer}.npy", np.eye(8, dtype=np.float16))
    return folder


@pytest.mark.slow
def test_an_import_that_the_disk_refuses_ends_in_a_line_and_leaves_no_half(
    logits, tmp_path, capsys
):
    def call(out):
        return run_command(capsys, "numpy", logits, "--top-k", "2", "--out", out / "run")

    (tmp_path / "whole").mkdir()
    with between(tmp_path / "whole") as disk:
        assert call(tmp_path / "whole")[0] == 0
    for number, fault in enumerate(faults(disk.counts)):
        out = tmp_path / f"job{number}"
        out.mkdir()
        with between(out, fault) as disturbed:
            code, _, err = call(out)
        assert disturbed.struck and code == 1, fault
        assert err.startswith("bhlog: ") and err.count("\n") == 1, (fault, err)
        if (out / "run").exists():  # it had its name before its folder could be synced
            assert set(open_log(out / "run").verify()["status"]) == {"ok"}, fault
        else:  # a disk that opens nothing any more may keep what is called .part
            assert all(path.name.endswith(".part") for path in out.iterdir())
            assert call(out)[0] == 0
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("with_what", [signal.SIGKILL, signal.SIGINT])
def test_an_import_that_is_killed_leaves_no_run(with_what, tmp_path):
    rng = np.random.default_rng(0)
    for layer in range(8):
        path = tmp_path / f"router_logits_L{layer}.npy"
        np.save(path, rng.random((60_000, 64), dtype=np.float32))
    code = "import sys; from bhlog.analysis.cli import main; main(sys.argv[1:])"
    words = ["import", "numpy", tmp_path, "--top-k", "4", "--out", tmp_path / "run"]
    with subprocess.Popen([sys.executable, "-c", code, *map(str, words)]) as process:
        deadline = time.monotonic() + 60
        while not [*tmp_path.glob("run.*.part/routing/rank*.parquet")]:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(with_what)
        process.wait()
    assert process.returncode and not (tmp_path / "run").exists()
    if with_what == signal.SIGINT:
        assert not [*tmp_path.glob("run*")]
