"""Cost curves: the probability that each family of policies keeps at every number of experts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.fold import WHOLE, Scope
from bhlog.analysis.log import Log
from bhlog.analysis.replay.decide import Decider
from bhlog.analysis.replay.families.topk import TopK
from bhlog.analysis.replay.match import no_rows
from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.sampling import Sample, draw_sample
from bhlog.analysis.replay.settings import bounds_of
from bhlog.analysis.replay.summary import LayerSummary
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import OPEN, Bounds

MOST_POINTS = 48  # of a curve
ROOM = 1.75  # curves go on to so many times the experts of the dearest policy


@dataclass(frozen=True, eq=False)
class CostCurve:
    """One family of policies over its parameter.

    Attributes:
        label: the family's text; see Policy.family.
        mean_experts: (N,), rising.
        probability_kept: (N,), mean softmax probability of the chosen experts.
    """

    label: str
    mean_experts: NDArray[np.float64]
    probability_kept: NDArray[np.float64]

    def at(self, mean_experts: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Probability kept at other means, interpolated; NaN beyond the ends."""
        kept = np.interp(
            mean_experts, self.mean_experts, self.probability_kept, left=np.nan, right=np.nan
        )
        return np.asarray(kept)


@dataclass(frozen=True)
class Mark:
    """Where one policy lies.

    Attributes:
        text: the policy.
        label: of the curve it is on.
        mean_experts, probability_kept: over the rows of the curves.
    """

    text: str
    label: str
    mean_experts: float
    probability_kept: float


@dataclass(frozen=True, eq=False)
class CostCurves:
    """The curves of a comparison, all from the same rows.

    Attributes:
        native: top-k from 1 to all experts, without bounds.
        curves: of the families asked for, each once; top-k is in `native` alone.
        marks: the policies asked for.
        most_experts: where the curves may end: beyond the dearest policy.
        rows: how many rows they come from.
        whole: whether these are all the rows.
    """

    native: CostCurve
    curves: tuple[CostCurve, ...]
    marks: tuple[Mark, ...]
    most_experts: float
    rows: int
    whole: bool


def cost_curves(
    log: Log,
    policies: Sequence[Policy],
    *,
    kde: KdeModel | None = None,
    bounds: Bounds = OPEN,
    scope: Scope = WHOLE,
) -> CostCurves:
    """Curves of the policies' families, from a bounded sample of the log.

    Args:
        policies: at least one.
        kde, bounds, scope: see bhlog.analysis.replay.comparison.compare.

    Raises:
        InvalidOption: there are no rows.
        KdeMismatch: see Decider.
    """
    E = log.n_experts
    decider = Decider(log, policies, kde, bounds=bounds_of(log, bounds), scope=scope)
    sample = draw_sample(log, decider, scope)
    if not len(sample):
        raise InvalidOption(no_rows(log, scope))
    marks: list[Mark] = []
    families: dict[str, Policy] = {}
    for policy, at in zip(policies, decider.policies, strict=True):
        marks.append(Mark(str(policy), policy.family, *_point(at, sample)))
        if policy.name != TopK.name:
            families.setdefault(policy.family, at)
    most = min(E, max(4.0, ROOM * max(mark.mean_experts for mark in marks)))
    native = [_point(TopK(k, min_k=1, max_k=E), sample) for k in range(1, E + 1)]
    return CostCurves(
        native=_curve(TopK.name, native),
        curves=tuple(_trace(label, policy, sample, most) for label, policy in families.items()),
        marks=tuple(marks),
        most_experts=most,
        rows=len(sample),
        whole=sample.whole,
    )


def _trace(label: str, policy: Policy, sample: Sample, most_experts: float) -> CostCurve:
    """Points of a curve, put where it still has the widest gaps."""
    E = sample.parts[0].n_experts
    seen: dict[Policy, tuple[float, float]] = {}

    def point(position: float) -> tuple[float, float]:
        at = policy.at(policy.value_at(position, E))
        if at not in seen:
            seen[at] = _point(at, sample)
        return seen[at]

    positions = [0.0, 1.0]
    for _ in range(2 * MOST_POINTS):
        means = np.array([point(position)[0] for position in positions])
        gaps = np.diff(np.minimum(means, most_experts))
        gaps[np.diff(positions) < 1e-3] = 0  # a jump, not a gap
        widest = int(np.argmax(gaps))
        if gaps[widest] <= 0 or len(seen) >= MOST_POINTS:
            break
        positions.insert(widest + 1, (positions[widest] + positions[widest + 1]) / 2)
    return _curve(label, list(seen.values()))


def _curve(label: str, points: list[tuple[float, float]]) -> CostCurve:
    mean, kept = np.array(sorted(set(points))).T
    return CostCurve(label, mean, kept)


def _point(policy: Policy, sample: Sample) -> tuple[float, float]:
    """Mean experts and mean probability kept over a sample."""
    summary = LayerSummary(sample.parts[0].n_experts)
    for rows in sample.parts:
        summary.add(policy.decide(rows), top_k=1)
    return summary.mean_experts, summary.probability_kept
