"""Sequence-level top-k against a sort of a sequence's probabilities, over real files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bhlog.analysis.commands import compare as command
from bhlog.analysis.fold import Scope
from bhlog.analysis.replay.comparison import compare
from bhlog.analysis.replay.families.seqtopk import SeqTopK
from bhlog.analysis.replay.match import match_experts
from bhlog.analysis.replay.rows import Rows
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.named import ROUTED, parse
from bhlog.capture.contract.rule import Bounds
from tests.analysis.replay import slow
from tests.synthetic import write_run

E = 16


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    pools=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    k=st.floats(0.1, E),
)
def test_the_largest_probabilities_of_a_pool_are_taken(seed, pools, k):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (len(pools), E)).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # ties within a row, whose probabilities are the same bits
    logits[rng.random(logits.shape) < 0.05] = np.nan
    n = SeqTopK(k).decide(Rows(logits, pools=np.array(pools)), Bounds(0)).n_selected
    for pool in {*pools}:
        mine = np.flatnonzero(np.array(pools) == pool)
        if all(slow.finite(logits[i].tolist()) for i in mine):
            assert n[mine].tolist() == slow.seq_top_k(logits[mine].tolist(), k)


def test_equal_probabilities_go_to_the_earlier_token():
    rows = Rows(np.zeros((3, 4), np.float32))
    assert SeqTopK(2).decide(rows, Bounds(0)).n_selected.tolist() == [4, 2, 0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seqtopk") / "run"
    return open_log(
        write_run(folder, n_experts=E, n_sequences=6, length=30, n_shards=1, decode_from=20)
    )


def test_a_prompt_shares_its_budget_and_a_decoded_token_has_its_own(run):
    frame = compare(run, ["seqtopk:4", "topk:4"], scope=Scope([1]), bounds=Bounds(0))
    rows = run.sql("SELECT * FROM routing WHERE layer = 1 AND phase = 'prefill'").pl().to_dicts()
    counts = [4] * 60
    for sequence in range(6):
        mine = [row["logits"] for row in rows if row["sequence"] == sequence]
        counts += slow.seq_top_k(mine, 4)
    one = frame.row(0, named=True)
    assert one["mean_experts"] == 4 == np.mean(counts)
    assert one["histogram"] == np.bincount(counts, minlength=E + 1).tolist()
    assert one["noise_experts"] is None
    assert one["probability_kept"] > frame["probability_kept"][2]  # of topk:4


def test_it_is_brought_to_a_budget(run):
    (found,) = match_experts(run, [SeqTopK(8)], 3.3)
    assert compare(run, [found])["mean_experts"][-1] == pytest.approx(3.3, abs=0.35)


def test_parts_of_sequences_and_routing_by_it_are_refused_in_a_line(run):
    for scope in (Scope(sample=0.5), Scope(where="position > 3")):
        with pytest.raises(InvalidOption, match=r"seqtopk:4 ranks whole batches, but"):
            compare(run, ["seqtopk:4"], scope=scope)
    with pytest.raises(InvalidOption, match="k is 99, but the model has 16 experts"):
        compare(run, ["seqtopk:99"])
    with pytest.raises(InvalidOption, match="has not read; replay it"):
        parse("seqtopk:4", ROUTED)
    assert "seqtopk" not in command._all_policies(run, None, Scope(sample=0.5))
    assert "seqtopk" in command._all_policies(run, None, Scope())
