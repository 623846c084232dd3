"""The power is cut anywhere in a capture: what was promised stays, and a resume does the rest."""

import shutil

import pytest

from bhlog.analysis.run import open_log
from bhlog.capture.contract import files
from bhlog.capture.contract.errors import RouterLogError
from bhlog.capture.contract.manifest import MANIFEST_NAME
from tests.capture.blocks import no_errors
from tests.capture.writing.test_refused import _one_id, begin, capture, rows, whole
from tests.disk import between
from tests.power import cuts

pytestmark = pytest.mark.slow
__all__ = ["_one_id", "whole"]  # fixtures


@pytest.mark.parametrize("job", ["capture", "resume"])
def test_what_was_promised_survives_and_the_rest_is_done_again(tmp_path, whole, job):
    before, place = tmp_path / "before", tmp_path / "job"
    before.mkdir()
    if job == "resume":
        capture(before, blocks=1)
        (before / "null.parquet").unlink()
    shutil.copytree(before, place)
    with between(place) as disk:
        capture(place, resume=job == "resume", say=lambda what: disk.note("say", what))
    expected, n = rows(whole / "run"), 0
    for cut, said, folder in cuts(disk, before, tmp_path / "cuts"):
        n += 1
        run, null = folder / "run", folder / "null.parquet"
        if null.exists() or "fitted" in said:
            assert null.read_bytes() == (whole / "null.parquet").read_bytes(), cut
        promised = max([0 if job == "capture" else 1, *(s for s in said if isinstance(s, int))])
        there = (run / MANIFEST_NAME).exists()
        assert there or (job == "capture" and not said), cut
        if there:
            no_errors(run)
            log = open_log(run)
            found = sorted({r["sequence"] for r in log.tokens().to_pylist()})
            assert found == list(range(len(found))) and len(found) >= promised, (cut, found)
            if "closed" in said:
                assert log.manifest.closed
        with between(folder):
            if not there and run.exists() and any(run.iterdir()):
                with pytest.raises(RouterLogError, match="not empty"):
                    begin(folder)
                shutil.rmtree(run)
            capture(folder, resume=there)
        no_errors(run)
        assert rows(run) == expected, cut
        shutil.rmtree(folder)
    assert n > 15


@pytest.mark.filterwarnings("ignore:.* files are missing")
@pytest.mark.parametrize("left_out", ["fsync", "sync_folder"])
def test_a_log_that_is_not_synced_is_found_out(tmp_path, whole, left_out, monkeypatch):
    if left_out == "sync_folder":
        monkeypatch.setattr(files, "sync_folder", lambda folder: None)
    (tmp_path / "job").mkdir()
    with between(tmp_path / "job") as disk:
        capture(tmp_path / "job", say=lambda what: disk.note("say", what))
    if left_out == "fsync":
        disk.done = [step for step in disk.done if not (step[0] == "sync" and step[1] in range(99))]
    broken = 0
    for _, said, folder in cuts(disk, tmp_path / "before", tmp_path / "cuts"):
        try:
            assert not said or rows(folder / "run")[1].num_rows >= 10
        except (RouterLogError, AssertionError, AttributeError):
            broken += 1
    assert broken
