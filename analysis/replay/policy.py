"""Policy: a rule that says how many experts each row gets, with the bounds that all rules share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.rule import OPEN, Bounds, Decisions


@dataclass(frozen=True, eq=False)
class Selection:
    """What a policy selected for T rows.

    Attributes:
        rows: what it was selected for.
        n_selected: (T,) int64, after the bounds.
        n_rejected: (T,) int64, before the bounds; None if the policy is no test.
    """

    rows: Rows
    n_selected: NDArray[np.int64]
    n_rejected: NDArray[np.int64] | None

    @property
    def by_p(self) -> bool:
        """Whether experts are chosen by rising p-value, in another order than by falling logit."""
        return self.n_rejected is not None and not self.rows.p_follows_logits

    @cached_property
    def chosen(self) -> NDArray[np.bool_]:
        """(T, E): whether each expert is chosen."""
        return self.rows.chosen(self.n_selected, by_p=self.by_p)

    @property
    def out_of_order(self) -> NDArray[np.bool_] | None:
        """The same; None where they are the first n_selected by falling logit."""
        return self.chosen if self.by_p else None

    @property
    def decisions(self) -> Decisions:
        """The same with the experts in order; n_rejected is 0 if nothing was tested."""
        n = np.zeros(len(self.rows)) if self.n_rejected is None else self.n_rejected
        return Decisions(
            self.rows.order(by_p=self.by_p),
            self.n_selected.astype(np.uint16),
            n.astype(np.uint16),
        )


@dataclass(frozen=True)
class Policy(ABC):
    """A rule that chooses the first `count` experts of each row, between min_k and max_k.

    A family is a frozen dataclass that sets `name`, `parameter` and `example` and has `count` and
    `value_at`; the first line of its docstring says what it chooses. It is a file of the folder
    families, or stands anywhere else: texts name it as soon as it is defined, see registry.

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

    @abstractmethod
    def count(self, rows: Rows) -> NDArray[np.integer]:
        """(T,) experts of each row before the bounds, 0..E; undecided rows do not matter."""

    @staticmethod
    @abstractmethod
    def value_at(position: float, n_experts: int) -> float:
        """The parameter at a position from 0 (fewest experts) to 1 (most); never fewer further on.

        This is all that matching a cost asks of a family.
        """

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

    def decide(self, rows: Rows, given: Bounds = OPEN) -> Selection:
        """Choose the experts of each row; see bounds.

        A row without a finite logit keeps the experts that were logged.
        """
        low, high = self.bounds(rows.n_experts, given)
        count = self.count(rows).astype(np.int64, copy=False)
        if len(rows.undecided):
            count = count.copy()
            count[rows.undecided] = 0
        n_selected = rows.n_selected(count, low, high)
        return Selection(rows, n_selected, count if self.tests else None)

    @property
    def family(self) -> str:
        """Its text without the parameter: hc, or storey,lambda=0.8."""
        return ",".join([self.name, *self._options])

    def __str__(self) -> str:
        return ",".join([f"{self.name}:{_number(self.value)}", *self._options])

    @property
    def _options(self) -> list[str]:
        """Fields other than the parameter that are not at their default, as texts."""
        return [
            f"{option.name.rstrip('_')}={_number(getattr(self, option.name))}"
            for option in fields(self)
            if option.name != self.parameter and getattr(self, option.name) != option.default
        ]


def require_unit(name: str, value: float) -> None:
    """Raise InvalidOption unless 0 < value < 1."""
    if not 0 < value < 1:
        raise InvalidOption(f"{name} must be between 0 and 1, got {value:g}")


def unit_value(position: float) -> float:
    """A value inside (0, 1) of few digits, rising in the position from 1e-17 to 1 - 1e-9."""
    value = float(1 / (1 + np.exp(39 - 60 * position)))
    return float(f"{value:.6g}") if value < 0.999 else round(value, 12)


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
