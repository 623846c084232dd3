"""The power is cut anywhere in a command that writes: the old file is there or the new, whole."""

from pathlib import Path

import pytest

from bhlog.analysis.cli import main
from tests.analysis.test_refused import JOBS, files, run
from tests.disk import between
from tests.power import cuts

__all__ = ["run"]  # a fixture


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("again", [False, True], ids=["new", "over another"])
def test_what_is_there_is_whole_and_what_was_told_is_there(tmp_path, run, job, again):
    before, place = tmp_path / "before", tmp_path / "job"
    for folder in (before, place):
        folder.mkdir()
    words = [word.replace("RUN", str(run)).replace("OUT", f"{place}/in") for word in JOBS[job]]
    old = {}
    if again:
        target = Path(words[words.index("--out" if "--out" in words else "--save") + 1])
        if job == "replay":
            pytest.skip("a replay is never written over another")
        target = target.relative_to(place)
        old = {target.as_posix(): b"old"}
        for folder in (before, place):
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            (folder / target).write_bytes(b"old")
    with between(place) as disk:
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
        disk.note("say", "done")
    new = files(place)
    states = 0
    for cut, said, folder in cuts(disk, before, tmp_path / "cuts"):
        states += 1
        left = {
            name: data
            for name, data in files(folder).items()
            if "/.part/" not in name and not name.endswith(".part")
        }
        if said:
            assert left == new, cut
        if job == "replay":
            for replay in {name.rpartition("/")[0] for name in left}:
                whole = {name: data for name, data in new.items() if name.startswith(replay)}
                assert whole.items() <= left.items(), cut
        for name, data in left.items():
            assert data in (new[name], old.get(name)), (cut, name)
        assert left.keys() >= old.keys(), cut
    assert states > 3
