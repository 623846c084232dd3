"""Efron's empirical null: a normal curve matched to the centre of the logits, and the local fdr.

Most experts of a token are taken to be null, so that the middle half of a layer's logits is. There
log f, f the density of all of them, is fitted by a quadratic: the logarithm of pi0 f0, f0 a normal
density. Nothing is trimmed, and what lies beyond the fit, in f but not in pi0 f0, is signal.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import InvalidOption

MIDDLE = (0.25, 0.75)  # the quantiles between which log f is fitted
REACH = 37.0  # sigma0 that the grid reaches to the right of delta0, where the tail is 6e-300
_STEPS = 285  # grid points a sigma0, as many as a gaussian kernel's


@dataclass(frozen=True)
class Central:
    """A normal null of a share of the logits.

    Attributes:
        delta0, sigma0: its mean and standard deviation, in logits.
        pi0: the share of the logits that are null, at most 1.
    """

    delta0: float
    sigma0: float
    pi0: float


def match_centre(x0: float, dx: float, tail: NDArray[np.float64]) -> Central:
    """The normal curve that the centre of a distribution is part of.

    Least squares of log f on a quadratic over the grid points between the quartiles.

    Args:
        x0, dx, tail: of a kernel density estimate of all logits; see kernel_tail.

    Raises:
        InvalidOption: log f has no maximum there, so that no normal curve is like it.

    Reference:
        Efron (2004), Large-scale simultaneous hypothesis testing: the choice of a null hypothesis,
        J. Am. Stat. Assoc. 99, 96-104, section 4; R's locfdr fits the same middle half.
    """
    x, density = density_of(x0, dx, tail)
    low, high = MIDDLE
    middle = (tail[:-1] < 1 - low) & (tail[1:] > 1 - high) & (density > 0)
    if np.count_nonzero(middle) >= 3:
        about = float(x[middle].mean())
        square, slope, level = np.polyfit(x[middle] - about, np.log(density[middle]), 2)
        if square < 0:
            sigma0 = float(np.sqrt(-0.5 / square))
            log_pi0 = level - slope**2 / (4 * square) + np.log(sigma0 * np.sqrt(2 * np.pi))
            shift = float(-slope / (2 * square))
            return Central(about + shift, sigma0, min(1.0, float(np.exp(log_pi0))))
    raise InvalidOption(
        "the middle half of the logits is not like a normal curve, so there is no central null to "
        "match: fit one from what trimming keeps"
    )


def central_curves(
    x0: float, dx: float, tail: NDArray[np.float64], most_points: int
) -> tuple[Central, float, float, NDArray[np.float64], NDArray[np.float64]]:
    """The central null of a kernel density estimate, and its local fdr, on a grid of their own.

    The local fdr is pi0 f0(x) / f(x), 1 up to delta0, and from there on the least so far: a larger
    logit is no less of a signal, and beyond the data f says nothing.

    Args:
        x0, dx, tail: as for match_centre.
        most_points: the grid has no more points.

    Returns:
        The null, then x0 and dx of the new grid, the normal tail and the local fdr on it.

    Raises:
        InvalidOption: see match_centre.
    """
    from scipy.special import ndtr  # heavy, and only a fit needs it

    central = match_centre(x0, dx, tail)
    delta0, sigma0 = central.delta0, central.sigma0
    low = min(x0, delta0 - 9 * sigma0)
    high = max(x0 + dx * (len(tail) - 1), delta0 + REACH * sigma0)
    step = 2.0 ** np.floor(np.log2(sigma0 / _STEPS))
    while (high - low) / step + 3 > most_points:
        step *= 2
    first = np.floor(low / step)
    grid = step * (first + np.arange(int(np.ceil(high / step) - first) + 1))
    z = (grid - delta0) / sigma0
    null = central.pi0 * np.exp(-z * z / 2) / (sigma0 * np.sqrt(2 * np.pi))
    x, density = density_of(x0, dx, tail)
    all_logits = np.interp(grid, x, density, left=0.0, right=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(all_logits > 0, null / all_logits, 1.0)
    local = np.minimum.accumulate(np.where(grid <= delta0, 1.0, np.minimum(ratio, 1.0)))
    return central, float(grid[0]), float(step), ndtr(-z), local


def density_of(
    x0: float, dx: float, tail: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(G - 1,) places in the middle of a grid's cells, and the density there, per logit."""
    x = (x0 + dx * (np.arange(len(tail) - 1) + 0.5)).astype(np.float64)
    return x, -np.diff(tail) / dx
