import os
import platform
import subprocess
import sys

import pytest

LOOP = """
import resource, threading
import numpy as np
from contextlib import nullcontext
from bhlog.analysis.allocator import kept_memory

def paged_in(around):
    def loop():
        with around():
            for _ in range(20):
                np.ones(1 << 18)  # 2 MiB: 512 pages
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(50):
                np.ones(1 << 18)
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    found = []
    thread = threading.Thread(target=loop)  # as tasks of Dask run
    thread.start()
    thread.join()
    return found[0] // 50

print(*map(paged_in, (nullcontext, kept_memory, nullcontext)))
"""


def pages(asked: str | None) -> list[int]:
    """Pages that an array of 512 takes: as it is, inside kept_memory, and after it."""
    environ = {**os.environ, "MALLOC_TRIM_THRESHOLD_": asked} if asked else {**os.environ}
    told = subprocess.run(
        [sys.executable, "-c", LOOP], env=environ, capture_output=True, text=True, check=True
    )
    return [*map(int, told.stdout.split())]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_memory_is_kept_while_a_task_runs_where_it_would_be_given_back():
    before, inside, after = pages("65536")
    assert before >= 500 <= after
    assert inside < 50


@pytest.mark.parametrize("asked", [None, "much"])
def test_elsewhere_nothing_changes(asked):
    before, inside, _ = pages(asked)
    assert abs(before - inside) < 50
