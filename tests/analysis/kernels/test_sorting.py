import numpy as np
import pytest
from numba import njit

from bhlog.analysis.kernels.sorting import WIDTH, network, sort_columns


@njit
def sort(columns, pairs):
    sort_columns(columns, pairs)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 60, 64, 65, 130, 512])
def test_columns_fall(n):
    rng = np.random.default_rng(n)
    columns = rng.integers(-50, 50, (n, WIDTH)).astype(np.int32)
    expected = -np.sort(-columns, axis=0)
    sort(columns, network(n))
    assert np.array_equal(columns, expected)


def test_a_network_that_sorts_zeros_and_ones_sorts_all():
    n = 10
    rows = (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.int32)
    for start in range(0, 2**n, WIDTH):
        columns = np.ascontiguousarray(rows[start : start + WIDTH].T)
        sort(columns, network(n))
        assert (np.diff(columns, axis=0) <= 0).all()
