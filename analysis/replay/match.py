"""Budget: the value of each policy's parameter that gives a number of experts per token."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.fold import WHOLE, Scope, fold
from bhlog.analysis.log import Log
from bhlog.analysis.replay.decide import Decider
from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.sampling import Sample, draw_sample
from bhlog.analysis.replay.settings import bounds_of
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import OPEN, Bounds

TOLERANCE = 0.001  # experts per token
HALVINGS = 40
SPREAD = 4.0  # about the standard deviation of n_selected: how wrong a sample may be
MOST_PASSES = 5


def match_experts(
    log: Log,
    policies: Sequence[Policy],
    experts: float,
    *,
    kde: KdeModel | None = None,
    bounds: Bounds = OPEN,
    scope: Scope = WHOLE,
) -> list[Policy]:
    """Each policy at the value whose mean experts per token over the rows comes nearest `experts`.

    A bounded sample says about where the value lies; passes over the log that only count experts,
    at some values of every policy at once, settle it to TOLERANCE. A log that fits the sample needs
    none. A family with steps (top-k, Higher Criticism) or whose count jumps, and one that
    cannot reach the budget, is left at its nearest value: look at the mean.

    Args:
        kde, bounds, scope: see bhlog.analysis.replay.comparison.compare.

    Raises:
        InvalidOption: experts is below 0 or above the number of experts, or there are no rows.
        KdeMismatch: see Decider.
    """
    if not 0 <= experts <= log.n_experts:
        raise InvalidOption(
            f"a budget must be from 0 to the model's {log.n_experts} experts, got {experts:g}"
        )
    bounds = bounds_of(log, bounds)

    def decider(policies: Sequence[Policy]) -> Decider:
        return Decider(log, policies, kde, bounds=bounds, scope=scope)

    first = decider(policies)
    sample = draw_sample(log, first, scope)
    if not len(sample):
        raise InvalidOption(no_rows(log, scope))
    searches = [_Search(policy, experts, sample) for policy in first.policies]
    for _ in range(0 if sample.whole else MOST_PASSES):
        wanted = [search.candidates() for search in searches]
        if not any(wanted):
            break
        counted = fold(
            log,
            partial(Totals, decider([c for part in wanted for c in part])),
            first.columns,
            scope,
            whole_groups=first.whole_groups,
        )
        means = iter(counted.totals / counted.rows)
        for search, part in zip(searches, wanted, strict=True):
            search.known |= {candidate: float(next(means)) for candidate in part}
    return [policy.at(search.best.value) for policy, search in zip(policies, searches, strict=True)]


def no_rows(log: Log, scope: Scope) -> str:
    """What to say of a log without rows, or without any in scope."""
    return f"{log.path}: no rows{scope.words}"


def mean_experts(policy: Policy, sample: Sample) -> float:
    """Mean n_selected of a policy over a sample."""
    total = sum(int(policy.decide(rows).n_selected.sum()) for rows in sample.parts)
    return total / len(sample)


class _Search:
    """One policy's way to the budget.

    Works on positions (see Policy.value_at), along which the mean never falls. The sample says how
    the mean runs between positions, passes over the log where it lies: the sample's curve, moved
    to go through what was counted, crosses the budget near the right place.

    Attributes:
        known: mean experts over all rows, by policy.
    """

    def __init__(self, policy: Policy, experts: float, sample: Sample) -> None:
        self.policy, self.experts, self.sample = policy, experts, sample
        self.n_experts = sample.parts[0].n_experts
        self.known: dict[Policy, float] = {}
        self._positions: dict[Policy, float] = {}
        self._sampled: dict[Policy, float] = {}
        if sample.whole:
            _around(self._mean, experts)
            self.known = self._sampled

    @property
    def best(self) -> Policy:
        """The one nearest to the budget of those whose mean is known."""
        return min(self.known, key=self._gap)

    def candidates(self) -> list[Policy]:
        """Policies to be counted next; none when nothing can be gained."""
        if not self.known:
            slack = 5 * SPREAD / np.sqrt(len(self.sample))
            positions = self._crossings(self.experts + slack * np.array([-1, -0.2, 0.2, 1]))
        elif self._gap(self.best) <= TOLERANCE:
            return []
        else:
            positions = self._nearer()
        wanted: dict[Policy, None] = {}
        for position in positions:
            self._positions.setdefault(self._at(position), position)
            wanted[self._at(position)] = None
        return [candidate for candidate in wanted if candidate not in self.known]

    def _nearer(self) -> list[float]:
        """Positions between the counted ones on either side of the budget, or beyond them all."""
        counted = sorted((self._positions[policy], mean) for policy, mean in self.known.items())
        below = [position for position, mean in counted if mean < self.experts]
        above = [position for position, mean in counted if mean >= self.experts]
        if not below or not above:  # the sample misled: go on by what is missing, and further
            end = above[0] if above else below[-1]
            missing = self.experts - self.known[self._at(end)]
            return self._crossings(self._mean(end) + missing * np.array([0.5, 0.9, 1.1, 2]))
        left, right = below[-1], above[0]
        means = [self.known[self._at(left)], self.known[self._at(right)]]
        sampled = np.array([self._mean(left), self._mean(right)])
        goal = np.interp(self.experts, means, sampled)
        step = 0.02 * (sampled[1] - sampled[0])
        positions = self._crossings(np.array([goal - step, goal + step]))
        # below the steps of the sample a straight line does, and where the mean jumps the middle
        straight = np.interp(self.experts, means, [left, right])
        return [*np.clip(positions, left, right).tolist(), float(straight), (left + right) / 2]

    def _crossings(self, goals: NDArray[np.float64]) -> list[float]:
        """Positions where the sample's mean reaches the goals: before the first, after others."""
        sides = [_around(self._mean, goal) for goal in sorted(goals.tolist())]
        return [sides[0][0], *(right for _, right in sides)]

    def _mean(self, position: float) -> float:
        """Mean experts over the sample."""
        at = self._at(position)
        if at not in self._sampled:
            self._sampled[at] = mean_experts(at, self.sample)
        return self._sampled[at]

    def _gap(self, policy: Policy) -> float:
        return abs(self.known[policy] - self.experts)

    def _at(self, position: float) -> Policy:
        return self.policy.at(self.policy.value_at(position, self.n_experts))


class Totals:
    """Experts that each of several policies selects, summed over rows."""

    def __init__(self, decider: Decider) -> None:
        self.decider = decider
        self.totals = np.zeros(len(decider.policies), dtype=np.int64)
        self.rows = 0

    def update(self, batch: pa.RecordBatch) -> None:
        for rows in self.decider.rows(batch):
            for i, policy in enumerate(self.decider.policies):
                self.totals[i] += int(policy.decide(rows).n_selected.sum())
        self.rows += batch.num_rows

    def merge(self, other: Self) -> None:
        self.totals += other.totals
        self.rows += other.rows


def _around(mean: Callable[[float], float], goal: float) -> tuple[float, float]:
    """Positions on either side of where a mean that never falls reaches the goal."""
    left, right = 0.0, 1.0
    if mean(left) >= goal:
        return left, left
    if mean(right) < goal:
        return right, right
    for _ in range(HALVINGS):
        middle = (left + right) / 2
        found = mean(middle)
        if abs(found - goal) < TOLERANCE / 10:
            return middle, middle
        if found >= goal:
            right = middle
        else:
            left = middle
    return left, right
