"""Runs that hold decisions alone: checked as far as they go."""

import pytest

from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify
from bhlog.capture.contract.errors import CorruptManifest
from tests.analysis.verify.damage import (
    E,
    edit_manifest,
    edit_shard,
    edited,
    errors,
    small_run,
    with_column,
)
from tests.synthetic import without_logits


@pytest.fixture
def run(tmp_path):
    return without_logits(small_run(tmp_path / "run"))


def test_a_sound_run_has_no_errors_and_no_remarks(run):
    assert {finding.status for finding in verify(open_log(run))} == {"ok"}


def wrong_expert(rows):
    rows[0][0] = E


def twice(rows):
    row = next(row for row in rows if len(row) > 1)
    row[1] = row[0]


@pytest.mark.parametrize(
    ("column", "change", "words"),
    [
        ("experts", wrong_expert, f"an expert is not below {E}"),
        ("experts", twice, "an expert is there twice"),
        ("weights", lambda rows: rows[3].__setitem__(0, -1.0), "NaN, infinite or negative"),
        ("n_rejected", lambda rows: rows.__setitem__(2, None), "no n_rejected under BH"),
    ],
)
def test_decisions_are_checked(run, column, change, words):
    edit_shard(run, with_column(column, edited(change)))
    assert any(words in detail for _, _, detail in errors(run))


def test_expert_bytes_are_told_by_the_manifest(run):
    assert open_log(run).expert_bytes is None
    edit_manifest(run, options={"expert_bytes": {"1": 7, "4": 9}})
    log = open_log(run)
    assert log.expert_bytes == {1: 7, 4: 9}
    assert errors(run) == []
    told = log.cache("40B")
    assert told.equals(log.cache("40B", expert_bytes={1: 7, 4: 9}))


@pytest.mark.parametrize("told", [3, ["1"], {"a": 7}, {"1": 0}, {"1": -7}, {"1": "7"}, {"1": True}])
def test_other_expert_bytes_are_refused(run, told):
    edit_manifest(run, options={"expert_bytes": told})
    with pytest.raises(CorruptManifest, match="expert_bytes"):
        open_log(run).cache("40B")
