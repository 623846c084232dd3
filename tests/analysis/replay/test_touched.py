"""Distinct experts of a forward, against sets of them, however the log is cut."""

import pickle
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bhlog.analysis.fold import Scope
from bhlog.analysis.replay import touched
from bhlog.analysis.replay.comparison import compare
from bhlog.analysis.replay.touched import TouchedExperts, mean_distinct
from bhlog.analysis.run import open_log
from tests.synthetic import write_run

E, POLICIES = 12, 2


@st.composite
def logs(draw):
    """Forwards of each row, what two policies chose, and where to cut."""
    numbers = draw(st.lists(st.integers(0, 20), min_size=1, max_size=60))
    if draw(st.booleans()):
        numbers.sort()
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    cuts = sorted({0, len(numbers), *draw(st.lists(st.integers(0, len(numbers)), max_size=6))})
    return np.array(numbers), rng.random((POLICIES, len(numbers), E)) < 0.2, cuts


@settings(max_examples=60, deadline=None)
@given(log=logs(), most=st.integers(2, 25))
def test_a_forward_counts_each_expert_once_wherever_the_log_is_cut(log, most):
    numbers, chosen, cuts = log
    sets = [defaultdict(set) for _ in range(POLICIES)]
    for policy in range(POLICIES):
        for number, row in zip(numbers.tolist(), chosen[policy], strict=True):
            sets[policy][number] |= {*np.flatnonzero(row).tolist()}
    expected = [sum(map(len, found.values())) / len(found) for found in sets]
    if len(sets[0]) > most and (np.diff(numbers) < 0).any():
        expected = [None, None]  # too many to hold, in no order
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(touched, "MOST", most)
        total, held = TouchedExperts(POLICIES), []
        for start, end in pairwise(cuts):
            part, middle = TouchedExperts(POLICIES), (start + end) // 2
            for piece in (slice(start, middle), slice(middle, end)):
                if len(numbers[piece]):
                    part.add(
                        numbers[piece], np.pad(chosen[:, piece], ((0, 0), (0, 0), (0, 64 - E)))
                    )
            total.merge(pickle.loads(pickle.dumps(part)))
            held.append(sum(len(n) for n, _ in total.held))
        assert max(held) <= most
        assert mean_distinct({0: total}) == [[mean, mean] for mean in expected]


@pytest.mark.parametrize("where", ["phase = 'decode'", "forward < 3 AND layer = 2"])
def test_whole_forwards_are_told_and_parts_of_them_are_not(tmp_path, where):
    shape = {"layers": (0, 2), "n_experts": E, "n_sequences": 4, "length": 20, "top_k": 3}
    log = open_log(write_run(tmp_path / "run", decode_from=12, **shape))
    ((distinct,),) = log.sql(
        "SELECT avg(n) FROM (SELECT count(DISTINCT expert) AS n FROM selections "
        f"WHERE {where} GROUP BY rank, forward, layer)"
    ).fetchall()
    scopes = [Scope(where=where), Scope(where="position > 1"), Scope(sample=0.5)]
    found = [compare(log, ["topk:3"], scope=one)["distinct_experts"][-1] for one in scopes]
    assert found == [pytest.approx(distinct), None, None]
