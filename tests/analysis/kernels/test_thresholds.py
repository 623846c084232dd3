from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bhlog.analysis.sweep.critical import CriticalAlphas
from bhlog.analysis.sweep.grid import GRID
from bhlog.capture.contract.null.curve import NullCurve
from tests.synthetic import normal_null


def agree(curve, alphas, E):
    found = CriticalAlphas.under(curve, alphas, E).thresholds
    expected = np.stack([curve.thresholds(alpha, E) for alpha in alphas.tolist()], axis=1)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))


@st.composite
def curves(draw):
    """Tails with plateaus, jumps and tiny drops, on grids near 0 and far from it."""
    drops = draw(
        st.lists(st.sampled_from([0.0, 1e-300, 1e-17, 1e-9, 0.001, 0.2, 1.0]), min_size=1,
                 max_size=40)
    )  # fmt: skip
    tail = 1 - np.concatenate([[0.0], np.cumsum(drops) / max(1.0, sum(drops))])
    tail = np.clip(tail * draw(st.sampled_from([1.0, 0.9, 1e-5])), 0, 1)
    dx = draw(st.sampled_from([2.0**-19, 0.1, 1 / 3, 2.0]))
    x0 = draw(st.sampled_from([-7.3, -1e-9, 0.0, 1e5])) - draw(st.sampled_from([0, 1])) * dx
    kernel = draw(st.sampled_from(["imported", "conformal"]))
    return NullCurve(None, 0, x0, dx, np.minimum.accumulate(tail), kernel=kernel)


@settings(max_examples=400, deadline=None)
@given(
    curve=curves(),
    alphas=st.lists(st.floats(1e-12, 0.999), min_size=1, max_size=12, unique=True),
    E=st.sampled_from([1, 2, 7, 64]),
)
def test_thresholds_of_a_grid_are_those_of_each_alpha_bit_for_bit(curve, alphas, E):
    agree(curve, np.sort(alphas), E)


@pytest.mark.parametrize("kernel", ["imported", "conformal"])
def test_thresholds_at_the_whole_grid(kernel):
    curve = replace(normal_null(0).curves[0], kernel=kernel)
    agree(curve, np.array(GRID), 60)
