"""Cost curves: the probability that each family of policies keeps at every number of experts."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from analysis.compare.blocks import Blocks, Sample, draw
from analysis.compare.budget import bounded, default_bounds
from analysis.log import Log
from analysis.policy import Policy
from analysis.policy.topk import TopK
from capture.contract.errors import InvalidOption
from capture.contract.kde import KdeModel

MOST_POINTS = 48  # of a curve


@dataclass(frozen=True, eq=False)
class CostCurve:
    """One family of policies over its parameter.

    Attributes:
        label: name of the family, with its options.
        mean_experts: (N,), rising.
        probability_kept: (N,), mean softmax probability of the chosen experts.
    """

    label: str
    mean_experts: NDArray[np.float64]
    probability_kept: NDArray[np.float64]

    def at(self, mean_experts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability kept at other means, interpolated; NaN beyond the ends."""
        return np.interp(
            mean_experts, self.mean_experts, self.probability_kept, left=np.nan, right=np.nan
        )


@dataclass(frozen=True, eq=False)
class CostCurves:
    """The curves of a comparison.

    Attributes:
        native: top-k from 1 to all experts, without bounds.
        curves: of the families asked for, each once; top-k is in `native` alone.
        rows: how many rows they come from.
        whole: whether these are all the rows.
    """

    native: CostCurve
    curves: tuple[CostCurve, ...]
    rows: int
    whole: bool


def cost_curves(
    log: Log,
    policies: Sequence[Policy],
    *,
    kde: KdeModel | None = None,
    most_experts: float | None = None,
    min_k: int | None = None,
    max_k: int | None = None,
    layers: Sequence[int] | None = None,
    where: str | None = None,
) -> CostCurves:
    """Curves of the policies' families, from a bounded sample of the log.

    Args:
        most_experts: curves need not go on beyond it; None is all experts.
        min_k, max_k, layers, where: see analysis.compare.compare.compare.

    Raises:
        InvalidOption: there are no rows.
        KdeMismatch: see Blocks.
    """
    min_k, max_k = default_bounds(log, min_k, max_k)
    E = log.n_experts
    sample = draw(log, Blocks(log, policies, kde), layers=layers, where=where)
    if not len(sample):
        raise InvalidOption(f"{log.path}: no rows to draw")
    kinds: dict[str, Policy] = {}
    for policy in policies:
        if policy.name != TopK.name:
            kinds.setdefault(curve_label(policy), bounded(policy, E, min_k, max_k))
    most = E if most_experts is None else most_experts
    counts = [_point(TopK(k, min_k=1, max_k=E), sample) for k in range(1, E + 1)]
    return CostCurves(
        native=_curve("top-k", counts),
        curves=tuple(_trace(label, policy, sample, most) for label, policy in kinds.items()),
        rows=len(sample),
        whole=sample.whole,
    )


def curve_label(policy: Policy) -> str:
    """The policy's text without its parameter: policies of one label lie on one curve."""
    options = [
        f"{option.name.rstrip('_')}={getattr(policy, option.name):g}"
        for option in fields(policy)
        if option.name != policy.parameter and getattr(policy, option.name) != option.default
    ]
    return ", ".join([policy.name, *options])


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
    experts, kept = 0, 0.0
    for rows in sample.parts:
        choice = policy.decide(rows)
        n = choice.n_selected
        experts += int(n.sum())
        kept += float(choice.ranking.cumulative[np.arange(len(n)), n].sum())
    return experts / len(sample), kept / len(sample)
