"""The rule as it is written, row by row, and rows that are hard for it."""

import math

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

VALUES = [-np.inf, np.inf, np.nan, -1.0, -0.0, 0.0, 1e-30, 0.5, 0.5, 1.0, 2.0, 3.0, 4.5]


def plain_rule(row, null, alpha, min_k, max_k):
    """(n_rejected, experts) of one row by the rule as it is written; None if nothing is finite."""
    E = len(row)
    keys = [x if math.isfinite(x) else -math.inf for x in row]
    if not any(math.isfinite(x) for x in row):
        return None
    order = sorted(range(E), key=lambda i: (-keys[i], i))
    n = 0
    for k in range(1, E + 1):
        logit = keys[order[k - 1]]
        p = float(null.p_value(np.array([logit]))[0]) if math.isfinite(logit) else math.inf
        if p <= k * alpha / E:
            n = k
    return n, order[: min(max(n, min_k), max_k)]


@st.composite
def rows_of_logits(draw, sizes=(2, 3, 8, 63, 64, 65, 130, 512)):
    """(6, E) float32: a few values with ties, NaN and infinities; normal ones; or one constant."""
    E = draw(st.sampled_from(sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["few values", "normal", "constant"]))
    if kind == "few values":
        return rng.choice(np.array(VALUES, np.float32), (6, E))
    if kind == "constant":
        return np.full((6, E), rng.normal(), np.float32)
    return rng.normal(0, 2, (6, E)).astype(np.float32)


def lists(rows):
    """A column of lists of experts."""
    return pa.array([list(row) for row in rows], pa.list_(pa.uint16()))
