"""The n-th open, write, fsync or rename of a command that writes a file fails, for every n."""

import shutil
from pathlib import Path

import pytest

from bhlog.analysis.cli import main
from bhlog.capture.contract.rule import BhOptions
from tests.disk import between, faults
from tests.synthetic import normal_kde, write_run

LAYERS = (0, 2)
JOBS = {
    "fit": ["kde", "fit", "RUN", "--out", "OUT/null.parquet"],
    "fit and table": ["kde", "fit", "RUN", "--out", "OUT/n.parquet", "--table", "OUT/n.csv"],
    "refit": ["kde", "refit", "RUN/kde.parquet", "--bandwidth", "0.2", "--out", "OUT/n.parquet"],
    "replay": ["replay", "RUN", "--alpha", "0.1", "--alpha", "0.2", "--out", "OUT/replays"],
    "sql": ["sql", "RUN", "SELECT count(*) FROM routing", "--out", "OUT/a.csv"],
    "sql to Parquet": ["sql", "RUN", "SELECT * FROM tokens", "--out", "OUT/a.parquet"],
    "profile": ["sweep", "RUN", "--alpha", "0.1", "--save", "OUT/profile.parquet"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(
        tmp_path_factory.mktemp("refused") / "run",
        layers=LAYERS,
        n_experts=8,
        n_sequences=4,
        length=10,
        top_k=2,
        options=BhOptions(alpha=0.3, max_k=4),
        kde=normal_kde(LAYERS),
    )


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_refused_command_ends_in_a_line_and_leaves_old_or_new_whole(tmp_path, run, job, capsys):
    def call(out: Path) -> int | str | None:
        with pytest.raises(SystemExit) as stop:
            main([word.replace("RUN", str(run)).replace("OUT", str(out)) for word in JOBS[job]])
        return stop.value.code

    whole = tmp_path / "whole"
    whole.mkdir()
    with between(whole) as disk:
        assert call(whole) == 0, capsys.readouterr().err
    new = files(whole)
    assert new and not any(name.endswith(".part") for name in new)
    counts = disk.counts
    capsys.readouterr()
    for number, fault in enumerate(faults(counts)):
        out = tmp_path / f"job{number}"
        out.mkdir()
        with between(out, fault) as disturbed:
            assert call(out) == 1, fault
        assert disturbed.struck
        error = capsys.readouterr().err
        assert error.startswith("bhlog: ") and error.count("\n") == 1, (fault, error)
        left = {name: data for name, data in files(out).items() if "/.part/" not in name}
        assert left.items() <= new.items(), (fault, set(left) - set(new))
        if job != "replay" or not left:  # a whole replay is never written again
            with between(out):
                assert call(out) == 0, capsys.readouterr().err
            assert files(out) == new
        capsys.readouterr()
        shutil.rmtree(out)
