"""Named: what every policy has, and the text that tells it."""

from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import Any, ClassVar, Self

from bhlog.capture.contract.bounds import OPEN, Bounds
from bhlog.capture.contract.errors import InvalidOption

BY_LAYER = "by_layer"  # a field that is part of the value, and no option of its own


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
        return ",".join([f"{self.name}:{self.value_text}", *self._options])

    @property
    def value_text(self) -> str:
        """The parameter's value as its text has it."""
        return short(self.value)

    @property
    def file_name(self) -> str:
        """Its text as a file or folder may be called."""
        return str(self).replace(":", "-").replace(",", "_")

    @classmethod
    def read_value(cls, text: str) -> dict[str, Any] | None:
        """Fields that a value gives that is more than a number; None: it is to be a number."""
        return None

    @property
    def _options(self) -> list[str]:
        """Fields other than the parameter that are not at their default, as texts."""
        return [
            f"{option.name.rstrip('_')}={short(getattr(self, option.name))}"
            for option in fields(self)
            if option.name not in (self.parameter, BY_LAYER)
            and getattr(self, option.name) != option.default
        ]


def require_unit(name: str, value: float) -> None:
    """Raise InvalidOption unless 0 < value < 1."""
    if not 0 < value < 1:
        raise InvalidOption(f"{name} must be between 0 and 1, got {value:g}")


def require_positive(name: str, value: float) -> None:
    """Raise InvalidOption unless 0 < value < infinity."""
    if not 0 < value < inf:
        raise InvalidOption(f"{name} must be above 0, got {value:g}")


def short(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
