"""Policies by name: the text bh:0.3,max_k=16, and the families that a model can be routed by.

A family says here what it is and what its values mean; bhlog.analysis.replay counts its experts in
numpy, bhlog.capture.routers.counts in torch.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from math import ceil
from typing import Any, ClassVar, Self, TypeVar, get_type_hints

import numpy as np

from bhlog.capture.contract.alphas import ByLayer, by_layer, read_text, text_of
from bhlog.capture.contract.bounds import OPEN, Bounds
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.policy_text import BY_LAYER
from bhlog.capture.contract.policy_text import Named as Named
from bhlog.capture.contract.policy_text import require_positive as require_positive
from bhlog.capture.contract.policy_text import require_unit as require_unit


@dataclass(frozen=True)
class Bh(Named):
    """Benjamini-Hochberg: n = max {k : p_(k) <= k * alpha / E}, 0 if there is none.

    Decided by the float32 thresholds of bhlog.capture.contract.rule.

    Attributes:
        alpha: BH level, 0 < alpha < 1; with alphas by layer, their mean.
        by_layer: the alpha of each layer; empty where all have `alpha`. As text, bh:0=0.1+2=0.3.

    Reference:
        Benjamini and Hochberg (1995), J. R. Stat. Soc. B 57(1), eq. (1).
    """

    alpha: float
    by_layer: ByLayer = field(default=(), kw_only=True)
    name: ClassVar[str] = "bh"
    parameter: ClassVar[str] = "alpha"
    example: ClassVar[float] = 0.3
    tests: ClassVar[bool] = True

    @classmethod
    def of_layers(cls, alphas: Mapping[int, float] | ByLayer) -> Self:
        """BH at an alpha for each layer.

        Raises:
            InvalidOption: see bhlog.capture.contract.alphas.by_layer.
        """
        pairs = by_layer(alphas)
        return cls(float(np.mean([alpha for _, alpha in pairs])), by_layer=pairs)

    def at(self, value: float) -> Self:
        return replace(self, alpha=value, by_layer=())

    def alpha_of(self, layer: int) -> float:
        """The alpha of a layer.

        Raises:
            InvalidOption: it has none.
        """
        if not self.by_layer:
            return self.alpha
        alphas = dict(self.by_layer)
        if layer not in alphas:
            raise InvalidOption(
                f"layer {layer} has no alpha: the alphas are of the layers "
                f"{', '.join(map(str, alphas))}; make them from a run of this model, bhlog sweep "
                "RUN --experts K --per-layer --out FILE"
            )
        return alphas[layer]

    @property
    def value_text(self) -> str:
        return text_of(self.by_layer) if self.by_layer else super().value_text

    @property
    def file_name(self) -> str:
        if not self.by_layer:
            return super().file_name
        digest = hashlib.sha256(self.value_text.encode()).hexdigest()[:8]
        return "_".join([f"{self.name}-by-layer-{digest}", *self._options])

    @classmethod
    def read_value(cls, text: str) -> dict[str, Any] | None:
        if "=" not in text:
            return None
        whole = cls.of_layers(read_text(text))
        return {"alpha": whole.alpha, BY_LAYER: whole.by_layer}

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


@dataclass(frozen=True)
class Entropy(Named):
    """More experts, up to K, the less sure the router is: K times its relative entropy.

    n = max(1, ceil(K * H / ln E)), H = -sum q_i ln q_i of the softmax over all E experts in
    float64: 1 where one expert holds all probability, K where all hold the same. Logits that are
    not finite have no probability.

    Attributes:
        k: K > 0; beyond E no row gets more than E.

    Reference:
        Li et al. (2025), DynMoLE, arXiv:2504.00661, give tokens of a high router entropy more
        experts, above a threshold all of them; this is the same in proportion.
    """

    k: float
    name: ClassVar[str] = "entropy"
    parameter: ClassVar[str] = "k"
    example: ClassVar[float] = 16

    def check(self) -> None:
        require_positive(self.parameter, self.k)

    def most(self, n_experts: int) -> int:
        """The most experts that a row gets, whatever rounding does."""
        return min(ceil(self.k), n_experts)


_ROUTED = (Bh, By, Lfdr, TopK, Threshold, TopP, MinP, Entropy)
ROUTED: dict[str, type[Named]] = {kind.name: kind for kind in _ROUTED}
_UNROUTED = {
    "seqtopk": "ranks the tokens of a whole sequence, which a model that decodes has not read; "
    "replay it: bhlog compare RUN --policy seqtopk:8"
}
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
        hint = _UNROUTED.get(name) or f"no policy '{name}'; {_hint(name, known, 'policies')}"
        raise InvalidOption(f"policy '{text}': {hint}")
    kind = known[name]
    options = {f.name.rstrip("_"): f.name for f in fields(kind) if f.name != BY_LAYER}
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
    values: dict[str, Any] = {}
    for key, option in given:
        if options[key] in values:
            raise InvalidOption(f"policy '{text}': {key} is given twice")
        more = kind.read_value(option) if options[key] == kind.parameter else None
        if more is not None:
            values |= more
            continue
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
        return kind(**values)
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
