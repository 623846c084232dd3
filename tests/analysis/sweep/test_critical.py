import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bhlog.analysis.sweep.critical import ONE, Counted, CriticalAlphas
from bhlog.capture.contract.null.model import NullCurve
from bhlog.capture.contract.rule import count_rejected, finite_keys, no_finite_logit
from tests.analysis.replay.plain import rows_of_logits
from tests.synthetic import normal_logits, normal_null, to_bfloat16

ALPHAS = np.array([1e-6, 0.001, 0.01, 0.05, 0.1, 0.3, 0.31, 0.5, 0.9, 0.999])
CURVES = {
    "normal": normal_null(0).curves[0],
    "plateaus": NullCurve(None, 0, -2.0, 0.5, np.array([1, 0.6, 0.6, 0.6, 0.2, 0.2, 1e-3, 0, 0.0])),
    "steps": NullCurve(None, 0, 0.0, 1.0, np.array([0.9, 0.9, 0.01, 0.01])),
    "one value": NullCurve(None, 0, 0.0, 2.0**-20, np.array([1.0, 0.0])),
}


def direct(logits, thresholds):
    """(E, J): rows with n_rejected >= k at each alpha, counted alpha by alpha."""
    E, J = thresholds.shape
    sorted_keys = -np.sort(-finite_keys(logits[~no_finite_logit(logits)]), axis=1)
    counts = np.empty((E, J), dtype=np.int64)
    for j in range(J):
        n = count_rejected(sorted_keys, thresholds[:, j])
        counts[:, j] = [(n >= k).sum() for k in range(1, E + 1)]
    return counts


def grid_of(name, alphas, E):
    return CriticalAlphas.under(CURVES[name], alphas, E).thresholds


@settings(max_examples=150, deadline=None)
@given(
    logits=rows_of_logits(),
    narrow=st.booleans(),
    curve=st.sampled_from([*CURVES]),
    shift=st.sampled_from([0.0, 1e-3, 3.0]),
)
def test_counts_at_every_alpha_are_the_direct_ones(logits, narrow, curve, shift):
    logits = (logits - np.float32(shift)).astype(np.float32)
    if narrow:
        logits = np.where(np.isfinite(logits), to_bfloat16(logits), logits)
    thresholds = grid_of(curve, ALPHAS, logits.shape[1])
    rows = CriticalAlphas(thresholds).count(logits).rows
    assert np.array_equal(np.cumsum(rows, axis=1)[:, :-1], direct(logits, thresholds))
    assert (rows.sum(axis=1) == (~no_finite_logit(logits)).sum()).all()


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("curve", CURVES)
def test_logits_at_the_thresholds_themselves_and_next_to_them(curve, narrow):
    E = 8
    thresholds = grid_of(curve, ALPHAS, E)
    at = thresholds.ravel()
    values = np.concatenate([at, np.nextafter(at, -np.inf), np.nextafter(at, np.inf), [0.0, -0.0]])
    values = values.astype(np.float32)
    if narrow:
        values = to_bfloat16(values)
    logits = np.random.default_rng(0).choice(values, (2000, E))
    rows = CriticalAlphas(thresholds).count(logits).rows
    assert np.array_equal(np.cumsum(rows, axis=1)[:, :-1], direct(logits, thresholds))


def test_parts_and_a_single_alpha_change_nothing():
    logits = normal_logits(np.random.default_rng(1), 3000, 16)
    logits[5:9] = np.nan
    thresholds = grid_of("normal", ALPHAS, 16)
    whole = CriticalAlphas(thresholds).count(logits, weigh=True)
    first, rest = (
        CriticalAlphas(thresholds).count(part, weigh=True) for part in (logits[:7], logits[7:])
    )
    assert np.array_equal(whole.rows, (first + rest).rows)
    assert np.array_equal(whole.kept, (first + rest).kept)
    one = CriticalAlphas(np.ascontiguousarray(thresholds[:, 5:6])).count(logits).rows
    assert np.array_equal(one[:, 0], whole.rows[:, :6].sum(axis=1))


def test_probability_is_the_softmax_of_each_rank():
    logits = normal_logits(np.random.default_rng(2), 200, 8)
    thresholds = grid_of("normal", ALPHAS, 8)
    counted = CriticalAlphas(thresholds).count(logits, weigh=True)
    weights = np.exp(logits.astype(np.float64))
    softmax = -np.sort(-weights / weights.sum(axis=1, keepdims=True), axis=1)
    assert counted.kept.sum(axis=1) / ONE == pytest.approx(softmax.sum(axis=0), rel=1e-5)
    j = 5
    selected = np.sort(logits, axis=1)[:, ::-1] >= thresholds[:, j]
    reached = np.maximum.accumulate(selected[:, ::-1], axis=1)[:, ::-1]
    assert counted.kept[:, : j + 1].sum(axis=1) / ONE == pytest.approx(
        (softmax * reached).sum(axis=0), rel=1e-5, abs=6 / ONE
    )  # float32 sums, and a rounding for each alpha


@pytest.mark.parametrize(
    ("least", "most", "size"),
    [(0, 0, 1), (-128, 127, 1), (0, 128, 2), (-129, 5, 2), (-2, 1 << 15, 4), (0, 1 << 40, 8)],
)
def test_counts_travel_in_as_few_bytes_as_they_need_and_add_up_after(least, most, size):
    steps = np.zeros((4, 1000), dtype=np.int64)
    steps[1, 3], steps[2, 5] = least, most
    data = pickle.dumps(Counted(steps, None))
    assert len(data) < 4000 * size + 500
    back = pickle.loads(data)
    assert np.array_equal((back + back).steps, 2 * steps)
    assert back.kept is None
