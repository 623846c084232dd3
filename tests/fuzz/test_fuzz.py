"""The invariant of tests/fuzz: an error in one line or the right answer, never another."""

from zipfile import ZipFile

import pytest

from bhlog.capture.contract.errors import InvalidOption
from tests.fuzz.__main__ import CORPUS, verdicts
from tests.fuzz.readers import READERS, Missed, Reader
from tests.fuzz.worker import GOOD, verdict_of
from tests.fuzz.world import FORMATS

KEPT = sorted(CORPUS.glob("*.zip"))


@pytest.mark.filterwarnings("ignore:.* files are missing")  # as workers do
@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_files_of_earlier_findings_are_refused_or_read_as_they_are(path, tmp_path):
    with ZipFile(path) as archive:
        archive.extractall(tmp_path)
    readers = next(READERS[format] for format in READERS if path.stem.startswith(f"{format}-"))
    for name, reader in readers.items():
        if reader.weight > 1:
            verdict, detail = verdict_of(tmp_path, reader)
            assert verdict in GOOD, (name, verdict, detail)


def raising(error):
    def ask(root):
        raise error

    return ask


@pytest.mark.parametrize(
    ("ask", "plain", "unchanged", "verdict"),
    [
        (lambda root: 1.0, None, 2.0, "wrong"),
        (lambda root: 1.0, lambda root: 2.0, None, "wrong"),
        (lambda root: 1.0, raising(KeyError("x")), None, "wrong"),
        (lambda root: [float("nan"), 1.0], lambda root: (float("nan"), 1 + 1e-12), None, "right"),
        (lambda root: 1.0, None, None, "answered"),
        (raising(KeyError("x")), None, None, "traceback"),
        (raising(MemoryError()), None, None, "memory"),
        (raising(Missed("x")), None, None, "missed"),
        (raising(InvalidOption("two\nlines \x1b[2J")), None, None, "refused"),  # made one line
        (raising(InvalidOption("")), None, None, "lines"),
    ],
)
def test_each_breach_of_the_invariant_has_a_verdict(ask, plain, unchanged, verdict, tmp_path):
    assert verdict_of(tmp_path, Reader(ask, plain), unchanged)[0] == verdict


BAD_WORKER = """
import json, os, sys, time
for seed in range(int(sys.argv[2]), int(sys.argv[3])):
    print(seed, flush=True)
    if seed == 11:
        os.abort()
    if seed == 13:
        time.sleep(100)
    print(json.dumps({"seed": seed, "verdict": "same"}), flush=True)
"""


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_is_told_and_replaced():
    found = verdicts("x", range(10, 16), worker_code=("-c", BAD_WORKER), time_limit=3)
    told = [(one["seed"], one["verdict"]) for one in found]
    assert told == [(10, "same"), (11, "death"), (12, "same"), (13, "hang"), (14, "same"),
                    (15, "same")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_mutants_are_refused_or_read_right(format):
    found = list(verdicts(format, range(40)))
    assert len(found) == 40
    assert not [one for one in found if one["verdict"] not in GOOD]
