"""Policy: a rule that says how many experts each row gets, with the bounds that all rules share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.named import Named
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
class Policy(Named, ABC):
    """A rule that chooses the first `count` experts of each row, between min_k and max_k.

    A family is a frozen dataclass that sets `name`, `parameter` and `example` and has `count` and
    `value_at`; the first line of its docstring says what it chooses. It is a file of the folder
    families, or stands anywhere else: texts name it as soon as it is defined, see registry.
    """

    pools: ClassVar[bool] = False  # whether it ranks rows of a pool together, see Rows

    @abstractmethod
    def count(self, rows: Rows) -> NDArray[np.integer]:
        """(T,) experts of each row before the bounds, 0..E; undecided rows do not matter."""

    def unsure(self, rows: Rows) -> NDArray[np.bool_]:
        """(T,): rows so near a boundary that another machine may count otherwise; none but where
        probabilities are compared."""
        return np.zeros(len(rows), dtype=np.bool_)

    @staticmethod
    @abstractmethod
    def value_at(position: float, n_experts: int) -> float:
        """The parameter at a position from 0 (fewest experts) to 1 (most); never fewer further on.

        This is all that matching a cost asks of a family.
        """

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


BOUNDARY = 1e-12  # relative; a float64 softmax of 256 logits is within 1e-13 on every machine


def unit_value(position: float) -> float:
    """A value inside (0, 1) of few digits, rising in the position from 1e-17 to 1 - 1e-9."""
    value = float(1 / (1 + np.exp(39 - 60 * position)))
    return float(f"{value:.6g}") if value < 0.999 else round(value, 12)
