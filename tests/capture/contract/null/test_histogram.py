import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null import histogram as histogram_module
from bhlog.capture.contract.null.histogram import (
    BIN_WIDTH,
    ONE_SPREAD,
    ONE_VALUE,
    Histogram,
    HistogramAccumulator,
    HistogramKey,
)
from bhlog.capture.contract.null.trim import Trim, kept
from tests.synthetic import normal_logits, same_histogram, to_bfloat16

finite = st.floats(-40, 40, width=32)
values = arrays(np.float32, st.integers(0, 60), elements=finite)
# half of the rows' logits from few values, so that ties at a cut are common
logits = arrays(
    np.float32,
    st.tuples(st.integers(1, 12), st.just(6)),
    elements=st.one_of(finite, st.sampled_from([0.0, 1.0, 1.5, np.nan, np.inf, -np.inf])),
)


def slow_histogram(values):
    """Counts and spread node by node, in Python's integers."""
    counts, spread, left_out = {}, {}, 0
    for value in values.ravel().tolist():
        if not abs(value) <= 1024:
            left_out += 1
            continue
        left, to_right = divmod(round(value * 2**30), 2**20)
        counts[left] = counts.get(left, 0) + 2**20 - to_right
        counts[left + 1] = counts.get(left + 1, 0) + to_right
        spread[left] = spread.get(left, 0) + to_right * (2**20 - to_right) // 2**28
    return {k: v for k, v in counts.items() if v}, {k: v for k, v in spread.items() if v}, left_out


def as_dicts(histogram):
    nodes = range(histogram.first, histogram.first + len(histogram.counts))
    counts = dict(zip(nodes, histogram.counts.tolist(), strict=True))
    spread = dict(zip(nodes, histogram.spread.tolist(), strict=True))
    return (
        {k: v for k, v in counts.items() if v},
        {k: v for k, v in spread.items() if v},
        histogram.left_out,
    )


def slow_kept(row, trim):
    """Experts of one row that a trimming level keeps, by sorting (falling logit, index)."""
    ranked = sorted((i for i in range(len(row)) if np.isfinite(row[i])), key=lambda i: (-row[i], i))
    return set(ranked[trim.high : len(ranked) - trim.low if trim.low else None])


@settings(deadline=None)
@given(values)
def test_a_histogram_shares_each_value_between_its_neighbours(x):
    assert as_dicts(Histogram.of(x)) == slow_histogram(x)


def test_bfloat16_values_counted_by_pattern_give_the_same_integers():
    rng = np.random.default_rng(0)
    x = to_bfloat16(rng.normal(0, 3, 1 << 15).astype(np.float32) ** 3)
    x[:8] = [0.0, -0.0, 1e-30, -1e-30, np.nan, np.inf, -np.inf, 2048.0]
    assert same_histogram(Histogram.of(x), Histogram._of_float32(x))
    assert Histogram.of(x).left_out >= 4


@settings(deadline=None)
@given(values, values, values)
def test_merging_commutes_and_associates_and_equals_counting_together(a, b, c):
    A, B, C = (Histogram.of(x) for x in (a, b, c))
    together = Histogram.of(np.concatenate([a, b, c]))
    assert same_histogram(A.merge(B).merge(C), together)
    assert same_histogram(C.merge(A.merge(B)), together)


@settings(deadline=None)
@given(arrays(np.float32, st.integers(1, 60), elements=finite))
def test_counts_keep_the_mean_and_spread_the_variance(x):
    h = Histogram.of(x)
    weights = h.counts / ONE_VALUE
    assert h.n == len(x)
    # positions are rounded to 2^-30 logits, spread to 2^-12 of a squared node
    assert weights @ h.nodes == pytest.approx(x.astype(float).sum(), abs=len(x) * 2**-29)
    squares = weights @ h.nodes**2 - BIN_WIDTH**2 * h.spread.sum() / ONE_SPREAD
    assert squares == pytest.approx((x.astype(float) ** 2).sum(), rel=1e-7, abs=len(x) * 1e-9)


def test_an_empty_histogram_is_neutral():
    h = Histogram.of(np.array([1.25], np.float32))
    assert same_histogram(Histogram.empty().merge(h), h)
    assert Histogram.of(np.array([np.nan], np.float32)).merge(h).left_out == 1


@settings(deadline=None)
@given(logits, st.integers(0, 2), st.integers(0, 3))
def test_trimming_drops_the_first_and_last_ranks_of_finite_logits(x, low, high):
    trim = Trim(low, high)
    keep = kept(x, trim)
    if keep is None:
        assert trim == Trim()
        return
    for row, inside in zip(x, keep, strict=True):
        assert set(np.flatnonzero(inside & np.isfinite(row))) == slow_kept(row, trim)


@settings(deadline=None)
@given(logits, st.booleans())
def test_an_accumulator_equals_counting_what_each_level_keeps(x, by_expert):
    trims = (Trim(0, 2), Trim(), Trim(1, 1))
    counting = HistogramAccumulator(trims, by_expert=by_expert)
    counting.update(3, x[:1])
    rest = counting.empty_copy()
    rest.update(3, x[1:])
    counting.merge(rest)
    found = counting.histograms()
    for trim in trims:
        keep = np.zeros(x.shape, bool)
        for row in range(len(x)):
            keep[row, list(slow_kept(x[row], trim))] = True
        for expert in range(6) if by_expert else (None,):
            columns = slice(None) if expert is None else [expert]
            expected, left_out = (
                x[:, columns][keep[:, columns]],
                (~np.isfinite(x[:, columns])).sum(),
            )
            h = found[HistogramKey(3, expert, trim)]
            assert as_dicts(h)[:2] == slow_histogram(expected)[:2]
            assert h.left_out == left_out


def test_large_bfloat16_batches_accumulate_to_the_same_integers():
    x = normal_logits(np.random.default_rng(1), 3000, 16)
    x[5, 3] = np.nan
    for trims in ((Trim(),), (Trim(0, 4), Trim())):
        counting = HistogramAccumulator(trims)
        for part in (x[:2500], x[2500:]):
            counting.update(0, part)
        for trim in trims:
            inside = kept(x, trim)
            expected = Histogram._of_float32(x.ravel() if inside is None else x[inside])
            assert same_histogram(counting.histograms()[HistogramKey(0, None, trim)], expected)


def test_a_level_that_leaves_nothing_is_refused():
    counting = HistogramAccumulator([Trim(2, 2)])
    with pytest.raises(InvalidOption, match="leave nothing of rows of 4 experts"):
        counting.update(0, np.zeros((1, 4), np.float32))
    with pytest.raises(InvalidOption, match="different trimming levels"):
        counting.merge(HistogramAccumulator())


def test_bfloat16_stretches_among_other_values_count_the_same_integers(monkeypatch):
    monkeypatch.setattr(histogram_module, "_PATTERN_CHUNK", 1 << 10)
    rng = np.random.default_rng(4)
    x = rng.normal(0, 2, (600, 64)).astype(np.float32)
    x[100:400] = to_bfloat16(x[100:400])
    x[200, 3] = np.inf
    counting = HistogramAccumulator()
    counting.update(0, x)
    expected = Histogram._of_float32(x.ravel())
    assert same_histogram(Histogram.of(x), expected)
    assert same_histogram(counting.histograms()[HistogramKey(0, None, Trim())], expected)


@pytest.mark.parametrize("by_expert", [False, True])
def test_what_was_counted_elsewhere_arrives_pickled_and_adds_up(by_expert):
    rng = np.random.default_rng(3)
    for values in (normal_logits(rng, 3000, 64), rng.normal(size=(999, 64)).astype(np.float32)):
        values[5, 7] = np.nan
        whole = HistogramAccumulator((Trim(), Trim(1, 2)), by_expert=by_expert)
        whole.update(4, values)
        parts = whole.empty_copy()
        for rows in np.array_split(values, 3):
            elsewhere = whole.empty_copy()
            elsewhere.update(4, rows)
            parts.merge(pickle.loads(pickle.dumps(elsewhere)))
        found, expected = parts.histograms(), whole.histograms()
        assert list(found) == list(expected)
        assert all(same_histogram(found[key], expected[key]) for key in expected)


def test_few_values_on_many_nodes_are_kept_packed_and_are_the_same_numbers():
    values = np.array([-700.0, 0.1, 0.1, 700.3], np.float32)
    few, many = Histogram.of(values), Histogram.of(np.linspace(-1, 1, 5000, dtype=np.float32))
    for histogram in (few, many):
        again = Histogram(histogram.first, histogram.counts, histogram.spread, 3)
        assert np.array_equal(again.counts, histogram.counts)
        assert np.array_equal(again.spread, histogram.spread)
        assert (again.n, again.left_out, len(again.nodes)) == (histogram.n, 3, len(again.counts))
    assert few._counts.values.nbytes < 100 < few.counts.nbytes  # of 1.4 million nodes
    assert many._counts.at is None
    same = few.merge(many)
    assert same.n == few.n + many.n and same.counts.sum() == few.counts.sum() + many.counts.sum()
