import numpy as np
import pytest

from bhlog.analysis.kernels import patterns
from bhlog.analysis.kernels.patterns import count_patterns
from bhlog.capture.contract.null.histogram import Histogram, HistogramAccumulator
from bhlog.capture.contract.null.trim import Trim
from tests.synthetic import normal_logits, same_histogram


def mixed():
    """bfloat16 rows, with some between them that are not, and values that cannot be counted."""
    logits = normal_logits(np.random.default_rng(0), 3000, 16)
    logits[1000:1200] += np.float32(2.0**-13)
    logits[[3, 2000], 5] = np.nan, np.inf
    logits[7, 7] = -0.0
    return logits


def test_times_are_those_that_numpy_counts(monkeypatch):
    monkeypatch.setattr(patterns, "_STRETCH", 1 << 12)
    logits = mixed()
    times = np.zeros(1 << 16, dtype=np.int64)
    rest = list(count_patterns(logits, times))
    assert sum(len(part) for part in rest) < logits.size / 4
    bits = np.ascontiguousarray(logits).view(np.uint32).ravel()
    left = np.concatenate(rest).view(np.uint32)
    expected = np.bincount(bits >> 16, minlength=1 << 16)
    assert np.array_equal(times + np.bincount(left >> 16, minlength=1 << 16), expected)
    assert (left & 0xFFFF).any()


@pytest.mark.parametrize("by_expert", [False, True])
def test_histograms_are_the_same_integers(by_expert):
    logits = mixed()
    found = []
    for count in (None, count_patterns):
        counting = HistogramAccumulator((Trim(), Trim(0, 4)), by_expert=by_expert, count=count)
        counting.update(0, logits)
        counting.merge(counting.empty_copy())
        found.append(counting.histograms())
    assert found[0].keys() == found[1].keys()
    assert all(same_histogram(found[0][key], found[1][key]) for key in found[0])
    assert same_histogram(Histogram.of(logits, count=count_patterns), Histogram.of(logits))
