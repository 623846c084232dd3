"""A run's card: datasets finds the tables, and nothing takes a user's own README.md for it."""

import pytest

from bhlog.analysis.run import open_log
from bhlog.capture.contract.card import CARD_NAME
from bhlog.capture.contract.errors import RunExists
from bhlog.capture.observe import observe
from bhlog.capture.writing.folder import remove_run
from tests.capture.tiny import batch


@pytest.fixture
def run(model, tmp_path):
    with observe(model, tmp_path / "run"):
        model(*batch([7, 4]))
    return tmp_path / "run"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the library's own
@pytest.mark.parametrize(
    ("name", "count"), [(None, "rows"), ("routing", "rows"), ("tokens", "tokens")]
)
def test_datasets_finds_both_tables(run, tmp_path, name, count):
    import datasets

    (run / "figures").mkdir()
    (run / "figures" / "load.png").write_bytes(b"no table")
    table = datasets.load_dataset(str(run), name, split="train", cache_dir=str(tmp_path / "cache"))
    assert table.num_rows == getattr(open_log(run).manifest.totals, count)


def test_the_card_is_part_of_the_run(run):
    findings = open_log(run).verify()
    assert set(findings["status"]) == {"ok"}
    remove_run(run)
    assert list(run.iterdir()) == []


def test_somebodys_own_readme_is_kept(run):
    (run / CARD_NAME).write_text("my notes")
    with pytest.raises(RunExists, match="not part of a run"):
        remove_run(run)
    assert (run / CARD_NAME).read_text() == "my notes"
    assert (run / "run.json").exists()
