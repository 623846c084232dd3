"""Policies by name: the text bh:0.3,max_k=16, and the families that a model can be routed by.

A family says here what it is and what its values mean; bhlog.analysis.replay counts its experts in
numpy, bhlog.capture.routers.counts in torch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from typing import ClassVar, Self, TypeVar, get_type_hints

import numpy as np

from bhlog.capture.contract.bounds import OPEN, Bounds
from bhlog.capture.contract.errors import InvalidOption


@dataclass(frozen=True)
class Named:
    """A rule that chooses the first experts of each row, as far as its text tells.

    Attributes:
        name: of the family, as in bh:0.3.
        parameter: the field that decides how many experts it takes.
        example: a usual value of it.
        tests: whether it tests p-values: then it ranks experts by p-value, and its count is
            n_rejected. Other policies rank by logit.
        min_k, max_k: bounds of this policy alone; None takes those of the comparison.
    """

    name: ClassVar[str]
    parameter: ClassVar[str]
    example: ClassVar[float]
    tests: ClassVar[bool] = False
    min_k: int | None = field(default=None, kw_only=True)
    max_k: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.check()
        Bounds(self.min_k or 0, self.max_k)

    def check(self) -> None:
        """Raise InvalidOption if a field is out of range."""
        require_unit(self.parameter, self.value)

    @property
    def value(self) -> float:
        """The parameter's value."""
        value: float = getattr(self, self.parameter)
        return value

    def at(self, value: float) -> Self:
        """The same policy at another value of its parameter."""
        return replace(self, **{self.parameter: value})  # type: ignore[arg-type]

    def bounds(self, n_experts: int, given: Bounds = OPEN) -> tuple[int, int]:
        """(min_k, max_k) in force for routers of n_experts experts.

        Args:
            given: where the policy has none of its own.

        Raises:
            InvalidOption: a bound is above n_experts, or min_k above max_k.
        """
        return Bounds(self.min_k, self.max_k).filled(given).resolve(n_experts)

    def bounded(self, n_experts: int, given: Bounds = OPEN) -> Self:
        """The policy with the bounds in force as its own."""
        low, high = self.bounds(n_experts, given)
        return replace(self, min_k=low, max_k=high)

    @property
    def family(self) -> str:
        """Its text without the parameter: hc, or storey,lambda=0.8."""
        return ",".join([self.name, *self._options])

    def __str__(self) -> str:
        return ",".join([f"{self.name}:{_short(self.value)}", *self._options])

    @property
    def _options(self) -> list[str]:
        """Fields other than the parameter that are not at their default, as texts."""
        return [
            f"{option.name.rstrip('_')}={_short(getattr(self, option.name))}"
            for option in fields(self)
            if option.name != self.parameter and getattr(self, option.name) != option.default
        ]


def require_unit(name: str, value: float) -> None:
    """Raise InvalidOption unless 0 < value < 1."""
    if not 0 < value < 1:
        raise InvalidOption(f"{name} must be between 0 and 1, got {value:g}")


def _short(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


@dataclass(frozen=True)
class Bh(Named):
    """Benjamini-Hochberg: n = max {k : p_(k) <= k * alpha / E}, 0 if there is none.

    Decided by the float32 thresholds of bhlog.capture.contract.rule.

    Attributes:
        alpha: BH level, 0 < alpha < 1.

    Reference:
        Benjamini and Hochberg (1995), J. R. Stat. Soc. B 57(1), eq. (1).
    """

    alpha: float
    name: ClassVar[str] = "bh"
    parameter: ClassVar[str] = "alpha"
    example: ClassVar[float] = 0.3
    tests: ClassVar[bool] = True

    def level(self, n_experts: int) -> float:
        """The alpha of BH that decides alike."""
        return self.alpha


@dataclass(frozen=True)
class By(Named):
    """Benjamini-Yekutieli: BH at alpha / c(E), c(E) = 1 + 1/2 + ... + 1/E.

    n = max {k : p_(k) <= k * alpha / (E * c(E))}, 0 if there is none. At E = 64, c is 4.74. It
    chooses what BH at that level chooses, so on a curve of costs the two are one.

    Attributes:
        alpha: level, 0 < alpha < 1.

    Reference:
        Benjamini and Yekutieli (2001), Ann. Statist. 29(4), theorem 1.3.
    """

    alpha: float
    name: ClassVar[str] = "by"
    parameter: ClassVar[str] = "alpha"
    example: ClassVar[float] = 0.3
    tests: ClassVar[bool] = True

    def level(self, n_experts: int) -> float:
        """The alpha of BH that decides alike."""
        return self.alpha / float((1 / np.arange(1, n_experts + 1)).sum())


@dataclass(frozen=True)
class Lfdr(Named):
    """Every expert whose local false discovery rate is at most X.

    n = #{i : pi0 f0(l_i) / f(l_i) <= X} right of the null's centre: of logits like this one, about
    a share X or less is null. It needs a null model of `kde fit --null-from central`, one curve a
    layer, and compares logits with one float32 threshold a layer: the smallest logit from which on
    the local fdr, made to fall, is at most X.

    Attributes:
        x: X, 0 < X < 1.

    Reference:
        Efron, Tibshirani, Storey and Tusher (2001), J. Am. Stat. Assoc. 96, 1151-1160; Efron
        (2004), J. Am. Stat. Assoc. 99, 96-104.
    """

    x: float
    name: ClassVar[str] = "lfdr"
    parameter: ClassVar[str] = "x"
    example: ClassVar[float] = 0.2
    tests: ClassVar[bool] = True


@dataclass(frozen=True)
class TopK(Named):
    """The k experts with the largest logits, for every row alike.

    Attributes:
        k: experts per row, from 1 to all of them.

    Reference:
        Shazeer et al. (2017), Outrageously large neural networks, section 2.1.
    """

    k: int
    name: ClassVar[str] = "topk"
    parameter: ClassVar[str] = "k"
    example: ClassVar[float] = 8

    def check(self) -> None:
        if self.k < 1:
            raise InvalidOption(f"k must be at least 1, got {self.k}")

    def bounds(self, n_experts: int, given: Bounds = OPEN) -> tuple[int, int]:
        if self.k > n_experts:
            raise InvalidOption(f"k is {self.k}, but the model has {n_experts} experts")
        return super().bounds(n_experts, given)


@dataclass(frozen=True)
class Threshold(Named):
    """Every expert whose softmax probability is at least q.

    n = #{i : q_i >= q}, the softmax over all experts in float64. Of all rules with the same mean
    number of experts and the same bounds, this one keeps the most probability: any other leaves
    out an expert above q for one below it.

    Attributes:
        q: least probability, 0 < q < 1.
    """

    q: float
    name: ClassVar[str] = "threshold"
    parameter: ClassVar[str] = "q"
    example: ClassVar[float] = 0.02


@dataclass(frozen=True)
class TopP(Named):
    """The smallest set of experts whose softmax probability reaches p.

    n = min {k : q_(1) + ... + q_(k) >= p}, with q_(1) >= q_(2) >= ... the softmax over all experts
    in float64. Logits that are not finite have no probability and never help to reach p.

    Attributes:
        p: probability to reach, 0 < p <= 1.

    Reference:
        Huang et al. (2024), Harder tasks need more experts: dynamic routing in MoE models;
        the nucleus of Holtzman et al. (2020), applied to experts.
    """

    p: float
    name: ClassVar[str] = "topp"
    parameter: ClassVar[str] = "p"
    example: ClassVar[float] = 0.5

    def check(self) -> None:
        if not 0 < self.p <= 1:
            raise InvalidOption(f"p must be above 0 and at most 1, got {self.p:g}")


@dataclass(frozen=True)
class MinP(Named):
    """Every expert whose softmax probability is at least T times the largest.

    n = #{i : l_i >= l_max + ln T}, since q_i / q_max = exp(l_i - l_max): logits are compared, and
    no softmax is computed. All in float32, so that any backend decides alike: ln T is computed in
    float64 and rounded to the nearest float32, the sum l_max + ln T is rounded once to the nearest
    float32, and each logit is compared with it. l_max is the row's largest finite logit; logits
    that are not finite are never counted. T = 1 leaves the experts that tie with the best one.

    Attributes:
        t: T, least share of the largest probability, 0 < T <= 1.

    Reference:
        Nguyen et al. (2024), Turning up the heat: min-p sampling for creative and coherent LLM
        outputs, arXiv:2407.01082; applied to experts.
    """

    t: float
    name: ClassVar[str] = "minp"
    parameter: ClassVar[str] = "t"
    example: ClassVar[float] = 0.2

    def check(self) -> None:
        if not 0 < self.t <= 1:
            raise InvalidOption(f"t must be above 0 and at most 1, got {self.t:g}")

    @property
    def step(self) -> np.float32:
        """ln T in float32."""
        return np.float32(np.log(self.t))


_ROUTED = (Bh, By, Lfdr, TopK, Threshold, TopP, MinP)
ROUTED: dict[str, type[Named]] = {kind.name: kind for kind in _ROUTED}
Kind = TypeVar("Kind", bound=Named)


def parse(text: str, known: Mapping[str, type[Kind]], *, open_value: bool = False) -> Kind:
    """A policy from NAME:VALUE[,KEY=VALUE...], such as topk:4 or storey:0.3,lambda=0.5.

    Args:
        known: families by name.
        open_value: whether the value may be left out, because it is to be solved for; the policy
            then has the family's example.

    Raises:
        InvalidOption: no such policy or option, or a value that is missing or out of range.

    >>> str(parse("minp:0.2,max_k=16", ROUTED))
    'minp:0.2,max_k=16'
    """
    head, *rest = (part.strip() for part in text.split(","))
    name, colon, value = (part.strip() for part in head.partition(":"))
    if not name:
        raise InvalidOption(f"policy '{text}': expected NAME:VALUE, such as bh:0.3")
    if name not in known:
        raise InvalidOption(
            f"policy '{text}': no policy '{name}'; {_hint(name, known, 'policies')}"
        )
    kind = known[name]
    options = {field.name.rstrip("_"): field.name for field in fields(kind)}
    given = [(kind.parameter, value)] if colon else []
    for part in rest:
        key, equals, option = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise InvalidOption(f"policy '{text}': expected KEY=VALUE, got '{part}'")
        if key not in options:
            hint = _hint(key, options, "options")
            raise InvalidOption(f"policy '{text}': no option '{key}'; {hint}")
        given.append((key, option))
    types = get_type_hints(kind)
    values: dict[str, float] = {}
    for key, option in given:
        if options[key] in values:
            raise InvalidOption(f"policy '{text}': {key} is given twice")
        values[options[key]] = _number(text, key, option, types[options[key]])
    (parameter,) = (field for field in fields(kind) if field.name == options[kind.parameter])
    if parameter.name not in values and parameter.default is MISSING:
        if not open_value:
            raise InvalidOption(
                f"policy '{text}': {kind.parameter} is missing, as in {name}:{kind.example:g}; or "
                "give a budget of experts per token to solve it for"
            )
        values[parameter.name] = kind.example
    try:
        return kind(**values)  # type: ignore[arg-type]
    except InvalidOption as error:
        raise InvalidOption(f"policy '{text}': {error}") from error


def _number(text: str, key: str, value: str, kind: object) -> float:
    """The value of an option of a policy, whole where its field is."""
    whole = kind in (int, int | None)
    try:
        return int(value) if whole else float(value)
    except ValueError:
        expected = "a whole number" if whole else "a number"
        raise InvalidOption(f"policy '{text}': {key} must be {expected}, got '{value}'") from None


def _hint(name: str, known: Iterable[str], what: str) -> str:
    """What a wrong name may have meant, or what there is."""
    near = get_close_matches(name.lower(), known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"{what}: {', '.join(known)}"
