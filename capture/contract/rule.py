"""The decision rule: Benjamini-Hochberg step-up by float32 thresholds, in numpy.

For a row of E logits and a null model with tail S, rank k passes if and only if its logit, the
k-th largest, is at least t_k: the smallest logit with S(t_k) <= k * alpha / E, computed in float64
and rounded up to float32. The thresholds are the definition; capture.routers.routing (torch) and
analysis.replay compare the same numbers, so every backend agrees bit for bit.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.alphas import expanded
from bhlog.capture.contract.bounds import OPEN as OPEN
from bhlog.capture.contract.bounds import Bounds as Bounds
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.named import ROUTED, Bh, By, Lfdr, Named, parse

Renormalize = bool | Literal["model"]
CENTRED = {"none": "as they are", "median": "less their row's median"}
RENORMALIZE: dict[str, Renormalize] = {"model": "model", "yes": True, "no": False}  # as options


@dataclass(frozen=True)
class BhOptions:
    """Settings of routing by BH, or by another policy.

    Attributes:
        alpha: BH level, 0 < alpha < 1; where `policy` is given, unused.
        min_k: fewest experts a token gets, at least 0.
        max_k: most experts a token gets; None means all of them.
        temperature: divides the logits before the softmax of the weights, above 0; decisions do
            not depend on it.
        renormalize: "model" follows the model's norm_topk_prob, True makes the weights sum to 1,
            False keeps the softmax over all experts.
        p_values: "kde" takes them from a null model, "empirical" from the forward at hand.
        policy: the rule in place of BH at alpha, such as "minp:0.2"; see `named`.
        centre: "median" tests logits less their row's median, under a null model of such logits.
    """

    alpha: float = 0.05
    min_k: int = 1
    max_k: int | None = None
    temperature: float = 1.0
    renormalize: Renormalize = "model"
    p_values: Literal["kde", "empirical"] = "kde"
    policy: str | None = None
    centre: Literal["none", "median"] = "none"

    @classmethod
    def of(cls, policy: str | Named, **options: Any) -> "BhOptions":
        """Options of routing by a policy: that of BH is the alpha, and its bounds are theirs.

        In a text, bh:@FILE has an alpha for each layer, as bhlog.capture.contract.alphas reads it.

        Raises:
            InvalidOption: a model cannot be routed by it, or an option is out of range.
        """
        rule = parse(expanded(policy), ROUTED) if isinstance(policy, str) else policy
        given = {n: b for n in ("min_k", "max_k") if (b := getattr(rule, n)) is not None}
        rule = replace(rule, min_k=None, max_k=None)
        one = isinstance(rule, Bh) and not rule.by_layer
        named = {"alpha": rule.value} if one else {"policy": str(rule)}
        return cls(**{**options, **given, **named})

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise InvalidOption(f"alpha must be between 0 and 1, got {self.alpha}")
        Bounds(self.min_k, self.max_k)  # checks them
        if not (np.isfinite(self.temperature) and self.temperature > 0):
            raise InvalidOption(f"temperature must be above 0, got {self.temperature}")
        if self.renormalize not in (True, False, "model"):
            raise InvalidOption(
                f"renormalize must be True, False or 'model', got {self.renormalize!r}"
            )
        if self.p_values not in ("kde", "empirical"):
            raise InvalidOption(f"p_values must be 'kde' or 'empirical', got {self.p_values!r}")
        if self.centre not in CENTRED:
            raise InvalidOption(f"centre must be 'none' or 'median', got {self.centre!r}")
        if self.centre != "none" and (not self.named.tests or self.p_values == "empirical"):
            raise InvalidOption("only logits that a null model tests are centred: leave centre out")
        if not self.named.tests and self.p_values == "empirical":
            raise InvalidOption(f"{self.policy} tests no p-values: leave empirical p-values out")
        if isinstance(self.named, Bh) and self.named.by_layer and self.p_values == "empirical":
            raise InvalidOption("alphas by layer need a null model: leave empirical p-values out")
        if isinstance(self.named, Lfdr) and self.p_values == "empirical":
            raise InvalidOption(f"{self.policy} needs a null model: leave empirical p-values out")

    @property
    def named(self) -> Named:
        """The policy: BH at alpha, or the one that takes its place."""
        return Bh(self.alpha) if self.policy is None else parse(self.policy, ROUTED)

    @property
    def tested_alpha(self) -> float | None:
        """The level of p-values, None where the policy tests none or layers have their own."""
        named = self.named
        by_layer = isinstance(named, Bh) and named.by_layer
        return float(named.value) if isinstance(named, Bh | By) and not by_layer else None

    def level(self, n_experts: int) -> float:
        """The alpha of BH that decides as the policy does, alpha itself where it tests none."""
        policy = self.named
        return policy.level(n_experts) if isinstance(policy, Bh | By) else self.alpha

    def bounds(self, n_experts: int) -> tuple[int, int]:
        """(min_k, max_k) for routers of n_experts experts.

        Raises:
            InvalidOption: a bound is above n_experts.
        """
        self.named.bounds(n_experts)
        return Bounds(self.min_k, self.max_k).resolve(n_experts)

    def check_null(self, kde: object | None) -> None:
        """Check that there is a null model where p-values come from one, and only there.

        Raises:
            InvalidOption: there is one, and nothing uses it.
            KdeMismatch: there is none.
        """
        if not self.named.tests:
            if kde is not None:
                raise InvalidOption(f"{self.policy} uses no null model: leave kde out")
            return
        if self.p_values == "empirical" and kde is not None:
            raise InvalidOption("empirical p-values use no null model: leave kde out")
        if self.p_values == "kde" and kde is None:
            raise KdeMismatch(
                "BH routing needs a null model: name its file (--kde, or kde= in Python), fit one "
                "with bhlog kde fit RUN --out FILE, or ask for empirical p-values"
            )
        centre = getattr(kde, "centre", None)  # a path has none yet
        if centre is not None:
            require_centre(self.centre, centre)

    def renormalizes(self, norm_topk_prob: bool) -> bool:
        """Whether weights are made to sum to 1, for a model with that norm_topk_prob."""
        return norm_topk_prob if self.renormalize == "model" else bool(self.renormalize)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as run.json keeps them."""
        return asdict(self)


def require_centre(asked: str, centre: str) -> None:
    """Raise KdeMismatch if a null model is of another kind of logits than asked for."""
    if asked != centre:
        raise KdeMismatch(
            f"the null model is of logits {CENTRED[centre]}, asked for are logits "
            f"{CENTRED[asked]}: say --centre {centre}, or fit one with bhlog kde fit RUN "
            f"--centre {asked} --out FILE"
        )


@dataclass(frozen=True, eq=False)
class Decisions:
    """What the rule chose for T rows.

    Attributes:
        order: (T, K) uint16, experts from the first choice on; K is at least max(n_selected), and
            only the first n_selected of a row are chosen.
        n_selected: (T,) uint16, experts used.
        n_rejected: (T,) uint16, raw BH count before the bounds.
    """

    order: NDArray[np.uint16]
    n_selected: NDArray[np.uint16]
    n_rejected: NDArray[np.uint16]


def critical_values(alpha: float, n_experts: int) -> NDArray[np.float64]:
    """(E,) float64: k * alpha / E for k = 1..E, what p_(k) is held against."""
    return np.arange(1, n_experts + 1, dtype=np.float64) * alpha / n_experts


def finite_keys(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits with NaN and infinities replaced by -inf, so that they rank last."""
    finite = np.isfinite(logits)
    if finite.all():
        return logits
    return np.where(finite, logits, np.float32(-np.inf))


def last_passing(passes: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(T,): the largest rank k from 1 whose column k - 1 is true, 0 if none is: a step-up rule."""
    E = passes.shape[1]
    last = E - np.argmax(passes[:, ::-1], axis=1)
    return np.where(passes.any(axis=1), last, 0)


def count_rejected(
    sorted_keys: NDArray[np.float32], thresholds: NDArray[np.float32]
) -> NDArray[np.uint16]:
    """n_rejected of each row: the largest k whose k-th largest logit reaches t_k.

    Args:
        sorted_keys: (T, E) float32, each row falling, non-finite logits as -inf.
        thresholds: (E,) float32, t_1..t_E.
    """
    return last_passing(sorted_keys >= thresholds).astype(np.uint16)


def count_rejected_by_expert(
    keys: NDArray[np.float32], thresholds: NDArray[np.float32]
) -> NDArray[np.uint16]:
    """n_rejected of each row: the largest k such that k experts reach their own t_{k,i}.

    Args:
        keys: (T, E) float32, non-finite logits as -inf.
        thresholds: (E, E) float32, t_{k,i}: rank k along the first axis, expert i along the second.
    """
    T, E = keys.shape
    reached = np.empty((T, E), dtype=np.int64)  # smallest rank whose threshold is reached
    for expert in range(E):
        falling = thresholds[:, expert]
        reached[:, expert] = np.searchsorted(-falling, -keys[:, expert], side="left")
    reached += (E + 1) * np.arange(T)[:, None]
    n_reached = np.bincount(reached.ravel(), minlength=T * (E + 1)).reshape(T, E + 1)
    passes = np.cumsum(n_reached[:, :E], axis=1) >= np.arange(1, E + 1)
    return last_passing(passes).astype(np.uint16)


def decide(
    logits: NDArray[np.float32],
    thresholds: NDArray[np.float32],
    *,
    min_k: int,
    max_k: int,
    tested: NDArray[np.float32] | None = None,
) -> Decisions:
    """Choose each row's experts under a null model pooled over experts.

    Rows without a finite logit get n_selected = n_rejected = 0: the caller falls back to the
    model's own choice (see `no_finite_logit`).

    Args:
        logits: (T, E) float32, router logits.
        thresholds: (E,) float32, t_1..t_E of the row's layer; see KdeModel.thresholds.
        min_k, max_k: bounds on experts per row, applied after the rule.
        tested: what is held against the thresholds; None: the logits. Centred ones fall as they do.

    Reference:
        Benjamini and Hochberg (1995), J. R. Stat. Soc. B 57(1), eq. (1).
    """
    keys = finite_keys(logits)
    order = np.argsort(-keys, axis=1, kind="stable")  # ties: the lower expert first
    held = keys if tested is None else finite_keys(tested)
    n_rejected = count_rejected(np.take_along_axis(held, order, axis=1), thresholds)
    return _bounded(order, n_rejected, keys, min_k, max_k)


def decide_by_expert(
    logits: NDArray[np.float32],
    thresholds: NDArray[np.float32],
    p: NDArray[np.float64],
    *,
    min_k: int,
    max_k: int,
    tested: NDArray[np.float32] | None = None,
) -> Decisions:
    """Choose each row's experts when every expert has a null of its own.

    Rank k passes if at least k experts reach their own threshold t_{k,i}; experts are ordered by
    p-value, ties by the larger logit, then by the lower index.

    Args:
        logits: (T, E) float32.
        thresholds: (E, E) float32, t_{k,i}: rank k along the first axis, expert i along the second.
        p: (T, E) float64, p-values of the logits, each under its expert's null.
        min_k, max_k: bounds on experts per row.
        tested: as in `decide`.
    """
    keys = finite_keys(logits)
    held = keys if tested is None else finite_keys(tested)
    n_rejected = count_rejected_by_expert(held, thresholds)
    return _bounded(p_value_order(keys, p), n_rejected, keys, min_k, max_k)


def empirical_p_values(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """P-values of a batch by its own ranks: the share of logits at least as large.

    Each expert's logits are ranked across the batch's rows; a single row is ranked across its
    experts. Non-finite logits are left out of the ranks and get p = 1.

    Args:
        logits: (T, E) float32, all rows of one layer in one forward.

    Returns:
        (T, E) float64 in (0, 1].
    """
    keys = finite_keys(logits)
    pool = keys.T if len(keys) == 1 else keys  # ranked along the first axis
    p = np.ones(pool.shape, dtype=np.float64)
    for column in range(pool.shape[1]):
        values = np.sort(pool[np.isfinite(pool[:, column]), column])
        if len(values):
            below = np.searchsorted(values, pool[:, column], side="left")
            p[:, column] = (len(values) - below) / len(values)
    p[~np.isfinite(pool)] = 1.0
    return p.T if len(keys) == 1 else p


def decide_by_p_value(
    logits: NDArray[np.float32],
    p: NDArray[np.float64],
    *,
    alpha: float,
    min_k: int,
    max_k: int,
) -> Decisions:
    """Choose each row's experts from p-values that no null model gave (empirical mode).

    Args:
        logits: (T, E) float32, which break ties between equal p-values.
        p: (T, E) float64.
        alpha: BH level.
        min_k, max_k: bounds on experts per row.
    """
    keys = finite_keys(logits)
    E = keys.shape[1]
    order = p_value_order(keys, p)
    finite_p = np.where(np.isfinite(keys), p, np.inf)
    passes = np.take_along_axis(finite_p, order, axis=1) <= critical_values(alpha, E)
    n_rejected = last_passing(passes).astype(np.uint16)
    return _bounded(order, n_rejected, keys, min_k, max_k)


def p_value_order(keys: NDArray[np.float32], p: NDArray[np.float64]) -> NDArray[np.int64]:
    """Experts by rising p-value, ties by larger logit, then lower index; non-finite last."""
    by_logit = np.argsort(-keys, axis=1, kind="stable")
    finite_p = np.where(np.isfinite(keys), p, np.inf)
    by_p = np.argsort(np.take_along_axis(finite_p, by_logit, axis=1), axis=1, kind="stable")
    return np.take_along_axis(by_logit, by_p, axis=1)


def no_finite_logit(logits: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(T,) bool: rows on which the rule cannot decide and the model's own choice stands."""
    return np.logical_not(np.isfinite(logits).any(axis=1))


def softmax_weights(
    logits: NDArray[np.float32],
    decisions: Decisions,
    *,
    temperature: float = 1.0,
    renormalize: bool = False,
) -> NDArray[np.float32]:
    """Weights of the chosen experts, in the order of decisions.order; 0 beyond n_selected.

    softmax(logits / temperature) over all experts in float32; with renormalize the chosen ones are
    divided by their sum. Non-finite logits weigh 0.

    Returns:
        (T, K) float32.
    """
    scaled = finite_keys(logits) / np.float32(temperature)
    top = scaled.max(axis=1, keepdims=True)
    unnormalized = np.exp(scaled - np.where(np.isfinite(top), top, np.float32(0)))
    total = unnormalized.sum(axis=1, keepdims=True, dtype=np.float32)
    probability = unnormalized / np.where(total > 0, total, np.float32(1))
    weights: NDArray[np.float32] = np.take_along_axis(
        probability, decisions.order.astype(np.int64), axis=1
    )
    weights[np.arange(weights.shape[1]) >= decisions.n_selected[:, None]] = 0
    if renormalize:
        kept = weights.sum(axis=1, keepdims=True, dtype=np.float32)
        weights /= np.where(kept > 0, kept, np.float32(1))
    return weights


def _bounded(
    order: NDArray[np.int64],
    n_rejected: NDArray[np.uint16],
    keys: NDArray[np.float32],
    min_k: int,
    max_k: int,
) -> Decisions:
    decidable = np.isfinite(keys).any(axis=1)
    n_selected = np.where(decidable, np.clip(n_rejected, min_k, max_k), 0).astype(np.uint16)
    return Decisions(
        order=order[:, :max_k].astype(np.uint16), n_selected=n_selected, n_rejected=n_rejected
    )
