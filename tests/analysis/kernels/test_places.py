import numpy as np

from bhlog.analysis.kernels.places import NOWHERE, find_places, threshold_places

VALUES = (-3e38, -2, -1e-40, -0.0, 0.0, 1e-45, 0.5, 0.50000006, 3e38, np.inf, -np.inf, np.nan)


def test_places_compare_as_the_values_do():
    values = np.array(VALUES, dtype=np.float32)
    places = np.empty(len(values), dtype=np.int32)
    find_places(values.view(np.int32), places)
    finite = np.isfinite(values)
    assert (places[~finite] == NOWHERE).all()
    thresholds = values[finite | (values == np.inf)]
    at = threshold_places(thresholds)
    expected = values[finite, None] >= thresholds
    assert np.array_equal(places[finite, None] >= at, expected)
    assert not (places[~finite, None] >= at).any()
