"""Null models in memory: the tail p-values come from, and the thresholds the decision rule uses."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import CorruptKde, InvalidOption, KdeMismatch
from bhlog.capture.contract.null.central import Central
from bhlog.capture.contract.null.histogram import Histogram
from bhlog.capture.contract.null.trim import Trim
from bhlog.capture.contract.rule import CENTRED, critical_values

KERNELS = ("gaussian", "epanechnikov", "tophat", "triangular", "none", "conformal")
BANDWIDTH_RULES = ("scott", "silverman", "nrd0", "isj")
INSTEAD = "isj, silverman"  # asked for isj, which found no root, and fitted with silverman

_FARTHEST = 2.0**20  # logits; a grid beyond it, or finer than its inverse, is damaged


@dataclass(frozen=True, eq=False)
class NullCurve:
    """One distribution of logits: of a layer, or of one expert of a layer.

    Stores the tail rather than the CDF: 1 - CDF rounds away the small p-values that BH needs.

    Attributes:
        expert: the expert it belongs to; None when pooled over the layer's experts.
        n: logits it was fitted from; 0 when unknown (imported).
        x0, dx: first grid point and grid step, in logits; a fit's dx is a power of two.
        tail: (G,) float64, P(logit > x0 + g * dx), falling from at most 1 to at least 0.
        histogram: what it was fitted from; None when imported.
        trim_low, trim_high: logits left out of each row, at its lower and upper end.
        kernel: one of KERNELS, or "imported".
        bandwidth: standard deviation of the kernel in logits; None when there is none.
        rule: how the bandwidth was chosen: one of BANDWIDTH_RULES, INSTEAD, "fixed", "none" or
            "imported".
        source: ids of the runs it was fitted from, or the name of the imported file.
        kept: histograms of the same logits at other trimming levels, for refits.
        central: the normal null that was matched to the centre; None where the tail is that of the
            logits themselves.
        lfdr: (G,) float64, the local fdr on the grid, falling from 1; None without `central`.
        centre: "median" if it is a distribution of logits less their row's median; "none" if of
            logits as they are.
    """

    expert: int | None
    n: int
    x0: float
    dx: float
    tail: NDArray[np.float64]
    histogram: Histogram | None = None
    trim_low: int = 0
    trim_high: int = 0
    kernel: str = "imported"
    bandwidth: float | None = None
    rule: str = "imported"
    source: tuple[str, ...] = field(default=())
    kept: Mapping[Trim, Histogram] = field(default_factory=dict)
    central: Central | None = None
    lfdr: NDArray[np.float64] | None = None
    centre: Literal["none", "median"] = "none"

    def __post_init__(self) -> None:
        if self.tail.ndim != 1 or len(self.tail) < 2:
            raise CorruptKde(f"tail must have at least 2 grid points, got shape {self.tail.shape}")
        ends = np.abs([self.x0, self.x0 + self.dx * len(self.tail)])
        if not (self.dx >= 1 / _FARTHEST and ends.max() <= _FARTHEST):  # NaN fails too
            raise CorruptKde(f"grid x0={self.x0}, dx={self.dx} is not a rising grid of logits")
        if not (self.tail[0] <= 1 and self.tail[-1] >= 0 and np.all(np.diff(self.tail) <= 0)):
            raise CorruptKde("tail must fall from at most 1 to at least 0")
        if self.kernel not in (*KERNELS, "imported"):
            raise CorruptKde(f"unknown kernel {self.kernel!r}; kernels: {', '.join(KERNELS)}")
        if self.rule not in (*BANDWIDTH_RULES, INSTEAD, "fixed", "none", "imported"):
            raise CorruptKde(f"unknown bandwidth rule {self.rule!r}")
        if self.bandwidth is not None and not 0 < self.bandwidth < _FARTHEST:
            raise CorruptKde(f"bandwidth must be above 0 logits, got {self.bandwidth}")
        if self.centre not in CENTRED:
            raise CorruptKde(f"unknown centre {self.centre!r}; expected none or median")
        if self.lfdr is not None and not (
            len(self.lfdr) == len(self.tail)
            and self.lfdr[0] <= 1
            and self.lfdr[-1] >= 0
            and np.all(np.diff(self.lfdr) <= 0)
        ):
            raise CorruptKde("lfdr must fall from at most 1 to at least 0, a value a grid point")
        if (self.central is None) != (self.lfdr is None) or (
            self.central is not None
            and not (
                abs(self.central.delta0) <= _FARTHEST
                and 0 < self.central.sigma0 <= _FARTHEST
                and 0 < self.central.pi0 <= 1
            )
        ):
            raise CorruptKde(
                f"a central null needs its lfdr, delta0, sigma0 and pi0: {self.central}"
            )

    @property
    def grid(self) -> NDArray[np.float64]:
        """(G,) float64: the grid points, in logits."""
        return self.x0 + self.dx * np.arange(len(self.tail), dtype=np.float64)

    @property
    def trim(self) -> Trim:
        """The trimming level it was fitted at."""
        return Trim(self.trim_low, self.trim_high)

    @property
    def histograms(self) -> dict[Trim, Histogram]:
        """Histograms by trimming level: the one in force first; empty when imported."""
        if self.histogram is None:
            return {}
        return {self.trim: self.histogram, **self.kept}

    @property
    def beyond(self) -> float:
        """The p-value of logits above the grid: 0, but 1 / (n + 1) of a conformal null."""
        return float(self.tail[-1]) if self.kernel == "conformal" else 0.0

    def p_value(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """P(logit > x) of each value, float64: 1 below the grid, `beyond` above it, NaN for NaN."""
        # The operations and their order are those of capture.routers.routing, which must agree.
        u = (np.asarray(logits, dtype=np.float64) - self.x0) / self.dx
        last = len(self.tail) - 1
        cell = np.clip(np.nan_to_num(np.floor(u), nan=0.0), 0, last - 1).astype(np.int64)
        left = self.tail[cell]
        with np.errstate(invalid="ignore"):  # an infinite u in a flat cell; settled below
            p = left + (u - cell) * (self.tail[cell + 1] - left)
        p = np.where(u < 0, 1.0, np.where(u > last, self.beyond, p))
        return np.where(np.isnan(u), np.nan, p)

    def thresholds(self, alpha: float, n_experts: int) -> NDArray[np.float32]:
        """(E,) float32 t_1..t_E: the smallest logits with p-value at most k * alpha / E.

        Smallest among float32 values, under p_value as computed: p_value(t_k) is at most the
        critical value, and that of the next smaller float32 is above it; infinite where no logit
        has so small a p-value. Falls with k.
        """
        return self._reaching(critical_values(alpha, n_experts))

    def lfdr_threshold(self, level: float) -> np.float32:
        """The smallest float32 from which on the local fdr is at most a level, 0 < level < 1.

        Raises:
            KdeMismatch: the null is not a central one.
        """
        if self.lfdr is None:
            raise KdeMismatch(
                "a local fdr needs a null model that was matched to the centre of the logits: "
                "bhlog kde fit RUN --null-from central --out FILE"
            )
        curve = replace(self, tail=self.lfdr, central=None, lfdr=None)
        return np.float32(curve._reaching(np.array([level]))[0])

    def _reaching(self, critical: NDArray[np.float64]) -> NDArray[np.float32]:
        """The smallest logits with p-values at most these, which rise along the last axis."""
        if not (critical > 0).all() or not (critical < 1).all():
            raise InvalidOption(
                f"critical values must be between 0 and 1, got {critical.min():g} to "
                f"{critical.max():g}; alpha must be"
            )
        last = len(self.tail) - 1
        right = np.searchsorted(-self.tail, -critical, side="left")  # first node with S <= c
        inside = np.clip(right, 1, last)
        above, below = self.tail[inside - 1], self.tail[inside]
        drop = np.where(above > below, above - below, 1.0)
        with np.errstate(over="ignore"):  # the smallest drops; clipped at once
            cells = (inside - 1) + np.clip((above - critical) / drop, 0.0, 1.0)
        cells = np.where(right == 0, 0.0, np.where(right > last, float(last), cells))
        t = round_up_to_float32(np.float64(self.x0) + self.dx * cells)
        reached = critical >= self.beyond
        t[reached] = self._settle(t[reached], critical[reached])
        t[~reached] = np.inf
        return np.minimum.accumulate(t, axis=-1)  # equal in exact arithmetic; guards rounding

    def _settle(self, t: NDArray[np.float32], critical: NDArray[np.float64]) -> NDArray[np.float32]:
        """Move each t, right but for rounding, to the float32 where p_value first is <= critical.

        Usually that is t itself or its neighbour; around 0 float32 values lie closer together than
        the rounding of p_value. So it brackets the place in growing steps, then halves them.
        """
        settled, where = t.ravel().copy(), np.arange(t.size)
        critical = critical.ravel()

        def passes(place: NDArray[np.int64]) -> NDArray[np.bool_]:
            passed: NDArray[np.bool_] = self.p_value(_float32_at(place)) <= critical[where]
            return passed

        above = float32_places(settled).astype(np.int64)  # may go beyond infinity's
        below = above - 1
        early, late = passes(below), ~passes(above)
        where = np.flatnonzero(early | late)  # few
        above, below, early, late = above[where], below[where], early[where], late[where]
        reach = np.int64(1)
        while early.any() or late.any():
            below = np.where(early, below - reach, below)
            above = np.where(late, above + reach, above)
            reach *= 2
            early, late = passes(below), ~passes(above)
        while np.any(above - below > 1):
            middle = (above + below) >> 1
            passed = passes(middle)
            above = np.where(passed, middle, above)
            below = np.where(passed, below, middle)
        settled[where] = _float32_at(above)
        return settled.reshape(t.shape)


def round_up_to_float32(x: NDArray[np.float64]) -> NDArray[np.float32]:
    """The smallest float32 that is at least x, element by element."""
    nearest = x.astype(np.float32)
    above = np.nextafter(nearest, np.float32(np.inf), dtype=np.float32)
    return np.where(nearest.astype(np.float64) < x, above, nearest)


_LARGEST = int(np.float32(np.inf).view(np.int32))  # infinity's place


def float32_places(x: NDArray[np.float32]) -> NDArray[np.int32]:
    """Place of each float32 in the order of all of them; 0 for 0, +-1 for the next to it."""
    bits = x.view(np.int32)
    return np.where(bits >= 0, bits, -(bits & np.int32(0x7FFFFFFF)))


def _float32_at(place: NDArray[np.int64]) -> NDArray[np.float32]:
    """The float32 at a place of that order, infinite beyond its ends."""
    size = np.minimum(np.abs(place), _LARGEST).astype(np.int32).view(np.float32)
    return np.where(place < 0, -size, size)
