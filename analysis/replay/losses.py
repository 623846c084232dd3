"""Losses of runs of one text: their means and differences, with errors clustered by sequence.

Tokens of a sequence are not independent, sequences are taken to be: the mean over N tokens of C
sequences, with sums S_c over n_c tokens each, is a ratio with the standard error
sqrt(C / (C - 1) * sum_c (S_c - mean * n_c)^2) / N.
"""

from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bhlog.analysis.log import Log
from bhlog.analysis.texts import TOKEN
from bhlog.capture.contract.errors import InvalidOption


class Mean(NamedTuple):
    """A mean over tokens and its standard error: NaN for one sequence alone."""

    mean: float
    se: float


def clustered_mean(values: NDArray[np.float64], clusters: NDArray[np.int64]) -> Mean:
    """The mean of values, with a standard error for values that are alike within clusters.

    Args:
        values: (N,), N at least 1.
        clusters: (N,), whose value each is.
    """
    _, cluster = np.unique(clusters, return_inverse=True)
    sums, sizes = np.bincount(cluster, values), np.bincount(cluster)
    mean, C = float(values.mean()), len(sizes)
    if C < 2:
        return Mean(mean, float("nan"))
    spread = ((sums - mean * sizes) ** 2).sum() * C / (C - 1)
    return Mean(mean, float(np.sqrt(spread)) / len(values))


def loss_of(log: Log) -> Mean:
    """Mean loss of a run's tokens, in nats.

    Raises:
        InvalidOption: it holds no losses.
    """
    return _mean(_losses(log), "nll")


def loss_difference(log: Log, baseline: Log) -> Mean:
    """How much larger the loss of a run is than that of another, token by token.

    Raises:
        InvalidOption: they have no token in common, or none with a loss.
    """
    both = _losses(log).join(_losses(baseline), on=[*TOKEN], suffix="_baseline")
    if both.is_empty():
        raise InvalidOption(f"{log.path} and {baseline.path} have no token with a loss in common")
    gap = both.with_columns(gap=pl.col("nll") - pl.col("nll_baseline"))
    return _mean(gap, "gap")


def _losses(log: Log) -> pl.DataFrame:
    table = log.tokens([*TOKEN, "nll"])
    frame = pl.DataFrame(pl.from_arrow(table)).with_columns(pl.col("nll").cast(pl.Float64))
    frame = frame.filter(pl.col("nll").is_not_null() & pl.col("nll").is_not_nan())
    if frame.is_empty():
        raise InvalidOption(f"{log.path}: holds no losses")
    return frame


def _mean(frame: pl.DataFrame, column: str) -> Mean:
    rank, sequence = (frame[name].cast(pl.Int64).to_numpy() for name in ("rank", "sequence"))
    return clustered_mean(frame[column].to_numpy(), (rank << 32) + sequence)
