import numpy as np
import pyarrow as pa
import pytest

from bhlog.analysis.replay.families.bh import Bh
from bhlog.analysis.replay.families.threshold import Threshold
from bhlog.analysis.replay.families.topk import TopK
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.rule import Bounds
from tests.synthetic import normal_logits, normal_null

LOGITS = normal_logits(np.random.default_rng(0), 20, 16)


@pytest.mark.parametrize(
    ("policy", "given", "bounds"),
    [
        (TopK(4), (None, None), (1, 16)),
        (TopK(4), (0, 7), (0, 7)),
        (TopK(4, min_k=2), (0, 7), (2, 7)),
        (TopK(4, max_k=9), (3, 7), (3, 9)),
        (TopK(4, min_k=0, max_k=9), (3, 7), (0, 9)),
    ],
)
def test_a_policys_own_bounds_come_first(policy, given, bounds):
    assert policy.bounds(16, Bounds(*given)) == bounds


@pytest.mark.parametrize(
    ("policy", "given", "message"),
    [
        (TopK(4, max_k=17), (None, None), "max_k is 17, but the model has 16 experts"),
        (TopK(4), (17, None), "min_k is 17, but the model has 16 experts"),
        (TopK(4, min_k=8), (None, 7), r"max_k must be at least 1 and at least min_k \(8\), got 7"),
        (TopK(17), (None, None), "k is 17, but the model has 16 experts"),
    ],
)
def test_bounds_that_do_not_fit_are_errors(policy, given, message):
    with pytest.raises(InvalidOption, match=message):
        policy.bounds(16, Bounds(*given))


def test_the_count_is_clamped_and_a_test_keeps_it_as_n_rejected():
    null = normal_null(0)
    raw = Bh(0.3).decide(Rows(LOGITS, null), Bounds(0)).n_rejected
    choice = Bh(0.3).decide(Rows(LOGITS, null), Bounds(2, 4))
    assert raw.min() < 2 and raw.max() > 4
    assert choice.n_rejected.tolist() == raw.tolist()
    assert choice.n_selected.tolist() == np.clip(raw, 2, 4).tolist()
    assert choice.chosen.sum(axis=1).tolist() == choice.n_selected.tolist()
    assert Threshold(0.1).decide(Rows(LOGITS)).n_rejected is None


def test_a_row_without_a_finite_logit_keeps_the_logged_experts_or_none():
    logits = LOGITS.copy()
    logits[3] = np.nan
    logged = pa.array([[5, 2, 9]] * 20, pa.list_(pa.uint16()))
    choice = TopK(4).decide(Rows(logits, logged=logged))
    assert np.flatnonzero(choice.chosen[3]).tolist() == [2, 5, 9]
    assert choice.n_selected[2:5].tolist() == [4, 3, 4]
    assert not TopK(4).decide(Rows(logits)).chosen[3].any()


def test_rows_need_a_null_model_only_where_p_values_are_tested():
    assert TopK(4).decide(Rows(LOGITS)).n_selected.tolist() == [4] * 20
    with pytest.raises(KdeMismatch, match="--kde FILE"):
        Bh(0.3).decide(Rows(LOGITS))


def test_a_policy_moves_to_another_value_and_keeps_its_options():
    assert str(Bh(0.3, max_k=5).at(0.25)) == "bh:0.25,max_k=5"
    with pytest.raises(InvalidOption, match="alpha"):
        Bh(0.3).at(2.0)
