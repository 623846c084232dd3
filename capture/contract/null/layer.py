"""The null model of one layer: a curve for all its experts, or one for each."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import CorruptKde, KdeMismatch
from bhlog.capture.contract.named import Bh, By, Lfdr, Named
from bhlog.capture.contract.null.centre import centred
from bhlog.capture.contract.null.curve import NullCurve
from bhlog.capture.contract.rule import Decisions, decide, decide_by_expert


@dataclass(frozen=True, eq=False)
class LayerNull(Mapping[str, NDArray[np.float64]]):
    """Null model of one layer: one pooled curve, or one curve per expert.

    It answers as the dict that older notebooks kept a layer in, with the items "x" and "cdf"; one
    with a curve per expert has no items.
    """

    layer: int
    curves: tuple[NullCurve, ...]

    def __post_init__(self) -> None:
        experts = [curve.expert for curve in self.curves]
        if experts != [None] and experts != list(range(len(experts))):
            raise CorruptKde(
                f"layer {self.layer}: expected one pooled curve or one per expert from 0, "
                f"got experts {experts}"
            )

    @property
    def pooled(self) -> bool:
        """Whether one curve serves all experts."""
        return self.curves[0].expert is None

    @property
    def centre(self) -> Literal["none", "median"]:
        """What its logits are less of: "median" or "none"."""
        return self.curves[0].centre

    def tested(self, logits: NDArray[Any]) -> NDArray[Any]:
        """What of (T, E) logits is held against thresholds: themselves, or centred.

        Raises:
            KdeMismatch: they are no rows, whose median could be taken.
        """
        if self.centre == "none":
            return logits
        if logits.ndim != 2:
            raise KdeMismatch(
                f"the null model of layer {self.layer} is of logits less their row's median: give "
                "whole rows of logits"
            )
        return centred(logits.astype(np.float32, copy=False))

    def require(self, n_experts: int) -> None:
        """Raise KdeMismatch if it has curves for another number of experts."""
        if not self.pooled and len(self.curves) != n_experts:
            raise KdeMismatch(
                f"the null model of layer {self.layer} has curves for {len(self.curves)} experts, "
                f"but the model has {n_experts}"
            )

    def p_value(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """(T, E) float64 p-values of (T, E) logits; a pooled null takes any shape, unless it is of
        centred logits: these are whole rows.

        Raises:
            KdeMismatch: it has curves for another number of experts, or no whole rows are given.
        """
        logits = self.tested(logits)
        if self.pooled:
            return self.curves[0].p_value(logits)
        self.require(logits.shape[-1] if logits.ndim else 0)
        columns = [c.p_value(logits[..., i]) for i, c in enumerate(self.curves)]
        return np.stack(columns, axis=-1)

    def decide(
        self,
        logits: NDArray[np.float32],
        thresholds: NDArray[np.float32],
        *,
        min_k: int,
        max_k: int,
    ) -> Decisions:
        """Choose each row's experts by `thresholds` of this null; see bhlog.capture.contract.rule.

        Args:
            logits: (T, E) float32.
            min_k, max_k: bounds on experts per row.
        """
        x = self.tested(logits)
        if self.pooled:
            return decide(logits, thresholds, min_k=min_k, max_k=max_k, tested=x)
        p = self.p_value(logits)
        return decide_by_expert(logits, thresholds, p, min_k=min_k, max_k=max_k, tested=x)

    def thresholds(self, alpha: float, n_experts: int) -> NDArray[np.float32]:
        """float32 thresholds: (E,) t_k when pooled, (E, E) t_{k,i} with a curve per expert.

        Raises:
            KdeMismatch: it has curves for another number of experts.
        """
        if self.pooled:
            return self.curves[0].thresholds(alpha, n_experts)
        self.require(n_experts)
        return np.stack([c.thresholds(alpha, n_experts) for c in self.curves], axis=1)

    def thresholds_of(self, policy: Named, n_experts: int) -> NDArray[np.float32]:
        """Thresholds of a policy that tests by a null model: see `thresholds`; of a local fdr one
        for all ranks, (E,).

        Raises:
            KdeMismatch: see `thresholds`; or for a local fdr, it is not a null matched to the
                centre of the layer, pooled over experts.
        """
        if isinstance(policy, Lfdr):
            if not self.pooled:
                raise KdeMismatch(
                    f"a local fdr needs one curve for all experts, layer {self.layer} has one each:"
                    " bhlog kde fit RUN --null-from central --out FILE"
                )
            return np.full(n_experts, self.curves[0].lfdr_threshold(policy.x), np.float32)
        if isinstance(policy, Bh):
            return self.thresholds(policy.alpha_of(self.layer), n_experts)
        assert isinstance(policy, By)
        return self.thresholds(policy.level(n_experts), n_experts)

    @property
    def central(self) -> bool:
        """Whether it has a local fdr."""
        return self.pooled and self.curves[0].central is not None

    def __getitem__(self, key: str) -> NDArray[np.float64]:
        if not self.pooled:
            raise KeyError(f"layer {self.layer} has a curve per expert: read .curves[i]")
        if key == "x":
            return self.curves[0].grid
        if key == "cdf":
            return 1.0 - self.curves[0].tail  # for old notebooks; p-values come from the tail
        raise KeyError(f"{key!r}: expected 'x' or 'cdf'")

    def __iter__(self) -> Iterator[str]:
        return iter(("x", "cdf") if self.pooled else ())

    def __len__(self) -> int:
        return 2 if self.pooled else 0

    def __bool__(self) -> bool:
        return True
