"""Benchmark scores, as figures take them."""

from dataclasses import dataclass

import polars as pl


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of settings.

    Attributes:
        table: policy, task, metric, score, score_se, mean_experts.
        about: the model.
    """

    table: pl.DataFrame
    about: tuple[str, ...]
