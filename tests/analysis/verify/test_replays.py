import json
import os
import random
from collections import Counter

import pytest

from bhlog.analysis.database.connection import connect
from bhlog.analysis.replay.decisions import write_decisions
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import RouterLogError
from bhlog.capture.contract.rule import BhOptions
from tests.analysis.verify.damage import errors, small_run, warnings

QUESTION = "SELECT sum(n_selected), sum(list_sum(weights)), sum(list_sum(experts)) FROM replays"


@pytest.fixture
def run(tmp_path):
    run = small_run(tmp_path / "run")
    write_decisions(open_log(run), [BhOptions(alpha=0.2)], run / "replay")
    return run


@pytest.fixture
def folder(run):
    return next((run / "replay").iterdir())


def asked(run):
    with connect(open_log(run)) as database, database.errors():
        return database.sql(QUESTION).fetchall()


def test_a_replay_that_is_whole_has_no_error(run):
    assert errors(run) == warnings(run) == []


def test_a_part_that_was_deleted_is_an_error_everywhere(run, folder):
    (folder / "rank00000-00001.parquet").unlink()
    assert [e[0] for e in errors(run)] == ["replay"]
    with pytest.raises(RouterLogError, match=r"rank00000-00001\.parquet: cannot be opened"):
        asked(run)


def test_a_part_that_nobody_listed_is_an_error_everywhere(run, folder):
    part = folder / "rank00000-00001.parquet"
    os.link(part, folder / "rank00000-00007.parquet")
    assert [e[2] for e in errors(run)] == ["not in _replay.json"]
    with pytest.raises(RouterLogError, match=r"not in _replay\.json beside it"):
        asked(run)


def test_a_list_that_was_changed_is_an_error_everywhere(run, folder):
    path = folder / "_replay.json"
    data = json.loads(path.read_text())
    del data["parts"]["rank00000-00001.parquet"]
    path.write_text(json.dumps(data))
    assert ["does not have its checksum" in e[2] for e in errors(run)] == [True]
    with pytest.raises(RouterLogError, match="does not have its checksum"):
        asked(run)


def test_a_replay_without_its_list_is_an_error_everywhere(run, folder):
    (folder / "_replay.json").unlink()
    assert ["_replay.json: missing: its replay is not whole" in e[2] for e in errors(run)] == [True]
    with pytest.raises(RouterLogError, match=r"_replay\.json: missing: its replay is not whole"):
        asked(run)


def test_a_replay_of_an_older_run_may_have_no_list_which_is_a_warning(run, folder, monkeypatch):
    monkeypatch.setattr("bhlog.analysis.run_folder._NO_LISTS", 2)
    right = asked(run)
    (folder / "_replay.json").unlink()
    assert errors(run) == [] and asked(run) == right
    assert [detail.startswith("no _replay.json") for _, detail in warnings(run)] == [True]


@pytest.mark.slow
def test_a_bit_that_flips_is_an_error_or_the_same_answer(run, folder):
    right, draw, told = asked(run), random.Random(1), Counter()
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for _ in range(12):
            at = draw.randrange(len(data))
            changed = bytearray(data)
            changed[at] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            told["verify"] += bool(errors(run))  # some bytes of a page header say nothing
            try:
                assert asked(run) == right
            except RouterLogError as error:
                assert "\n" not in str(error)
                told["error"] += 1
        path.write_bytes(data)
    assert told["error"] > 20 and told["verify"] > 20
