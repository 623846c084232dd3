"""Programs end as they should, even right after they read a file."""

import subprocess
import sys
from pathlib import Path

import pytest

from bhlog import open_log
from bhlog.analysis.sweep.profiling import profile_log
from tests.synthetic import normal_kde, write_run

TASKS = Path("/proc/self/task")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A null model file and a profile, by the class that loads each."""
    folder = tmp_path_factory.mktemp("exit")
    kde = normal_kde([0, 1])
    kde.save(folder / "null.parquet")
    log = open_log(write_run(folder / "run", layers=[0, 1], kde=kde))
    profile_log(log, alphas=[0.1, 0.3]).save(folder / "bh.profile")
    return {
        "bhlog.capture.contract.null.model.KdeModel": folder / "null.parquet",
        "bhlog.analysis.sweep.profile.Profile": folder / "bh.profile",
    }


@pytest.mark.parametrize("command", ["info RUN", "verify RUN", "sql RUN tokens", "--help"])
@pytest.mark.parametrize("where", ["/dev/full", "closed"])
def test_output_that_nobody_can_take_ends_in_a_line(files, command, where):
    run = next(iter(files.values())).with_name("run")
    words = command.replace("RUN", str(run)).replace("tokens", "'SELECT * FROM tokens'")
    shell = f"{sys.executable} -c 'from bhlog.analysis.cli import main; main()' {words}"
    shell += " >&-" if where == "closed" else f" >{where}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    if where == "closed":
        assert (done.returncode, done.stderr) in ((0, ""), (0, f"{run}: 200 rows\n")), done.stderr
    else:
        assert done.returncode == 1
        assert done.stderr == "bhlog: the output: No space left on device\n"


@pytest.mark.parametrize(
    "name", ["bhlog.capture.contract.null.model.KdeModel", "bhlog.analysis.sweep.profile.Profile"]
)
def test_reading_a_file_starts_no_thread(files, name):
    # A thread of Arrow's that lets go of Python's memory while the interpreter ends, aborts it.
    module, _, kind = name.rpartition(".")
    code = (
        f"import os, pyarrow.parquet\nfrom {module} import {kind}\n"
        f"before = len(os.listdir({str(TASKS)!r}))\n"
        f"{kind}.load({str(files[name])!r})\n"
        f"print(len(os.listdir({str(TASKS)!r})) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
