"""Bounds: the fewest and most experts of a token."""

from dataclasses import dataclass

from bhlog.capture.contract.errors import InvalidOption


@dataclass(frozen=True)
class Bounds:
    """Fewest and most experts of a token, as asked for.

    Attributes:
        min_k: at least 0; None leaves it open.
        max_k: at least 1 and at least min_k; None leaves it open.

    What is open is as in the run, where there is one, and else 1 and all experts.
    """

    min_k: int | None = None
    max_k: int | None = None

    def __post_init__(self) -> None:
        low = 1 if self.min_k is None else self.min_k
        if low < 0:
            raise InvalidOption(f"min_k must be at least 0, got {low}")
        if self.max_k is not None and self.max_k < max(1, low):
            raise InvalidOption(
                f"max_k must be at least 1 and at least min_k ({low}), got {self.max_k}"
            )

    def resolve(self, n_experts: int) -> tuple[int, int]:
        """(min_k, max_k) for routers of n_experts experts; what is open is 1 and all of them.

        Raises:
            InvalidOption: a bound is above n_experts.
        """
        low = 1 if self.min_k is None else self.min_k
        high = n_experts if self.max_k is None else self.max_k
        for name, bound in (("min_k", low), ("max_k", high)):
            if bound > n_experts:
                raise InvalidOption(f"{name} is {bound}, but the model has {n_experts} experts")
        return low, high

    def filled(self, other: "Bounds") -> "Bounds":
        """The same, with another's where they are open.

        Raises:
            InvalidOption: together they leave no number of experts.
        """
        return Bounds(
            other.min_k if self.min_k is None else self.min_k,
            other.max_k if self.max_k is None else self.max_k,
        )


OPEN = Bounds()
