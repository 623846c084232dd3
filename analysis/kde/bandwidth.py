"""Bandwidths of null models, chosen from a histogram.

Router logits of bfloat16 models repeat on few values: between 2 and 4 they lie 2^-6 apart. A
bandwidth well below that spacing would turn the density into a comb of the number format, so no
rule chooses less than the spacing that 95 % of the logits have around them. Scott's and
Silverman's rules see only the standard deviation and n, which the repeats do not change; improved
Sheather-Jones reads the shape, so it sees such values spread over their spacing.
"""

import numpy as np
import scipy.fft
import scipy.optimize
from numpy.typing import NDArray

from capture.contract.errors import InvalidOption
from capture.contract.histogram import BIN_WIDTH, ONE_SPREAD, ONE_VALUE, Histogram

RULES = ("scott", "silverman", "isj")

_REPEATS = 4  # values per occupied node from which spacing means a lattice, not thin data
_LATTICE_SHARE = 0.95  # share of logits whose spacing a bandwidth must not undercut
_STAGES = 7  # of the plug-in: derivatives 7 to 2, as Botev et al. use
_MOST_BINS = 1 << 12


def choose_bandwidth(histogram: Histogram, rule: str | float) -> float:
    """Standard deviation of the kernel, in logits.

    Args:
        histogram: what is fitted, at least one value.
        rule: "scott", "silverman", "isj", or the bandwidth itself.

    Returns:
        A number above 0; rules give at least BIN_WIDTH and at least the spacing of the lattice.

    Raises:
        InvalidOption: no such rule, or a bandwidth that is not above 0.
    """
    if not isinstance(rule, str):
        if not (np.isfinite(rule) and rule > 0):
            raise InvalidOption(f"bandwidth must be above 0 logits, got {rule}")
        return float(rule)
    if rule == "isj":
        chosen = improved_sheather_jones(histogram)
        if chosen is None:
            chosen = silverman(histogram)
    elif rule == "scott":
        chosen = scott(histogram)
    elif rule == "silverman":
        chosen = silverman(histogram)
    else:
        raise InvalidOption(f"bandwidth must be {', '.join(RULES)} or a number, got {rule!r}")
    return max(chosen, lattice_spacing(histogram), BIN_WIDTH)


def scott(histogram: Histogram) -> float:
    """sd * n^(-1/5), as scipy.stats.gaussian_kde has it. Scott (1992)."""
    return float(standard_deviation(histogram) * histogram.n ** (-1 / 5))


def silverman(histogram: Histogram) -> float:
    """sd * (3 n / 4)^(-1/5), as scipy.stats.gaussian_kde has it. Silverman (1986), eq. (3.28)."""
    return float(standard_deviation(histogram) * (histogram.n * 3 / 4) ** (-1 / 5))


def standard_deviation(histogram: Histogram) -> float:
    """Sample standard deviation of the values, free of what linear binning adds; 0 for n < 2."""
    n = histogram.n
    if n < 2:
        return 0.0
    weights = histogram.counts / ONE_VALUE
    node = np.arange(len(weights), dtype=np.float64)
    mean = (weights @ node) / n
    squares = weights @ (node - mean) ** 2 - histogram.spread.sum() / ONE_SPREAD
    return float(BIN_WIDTH * np.sqrt(max(squares, 0.0) / (n - 1)))


def lattice_spacing(histogram: Histogram) -> float:
    """Spacing of the values in logits where they repeat on few; 0 where they do not.

    The gap from each occupied node to its nearer neighbour, at the quantile that covers 95 % of
    the logits.
    """
    occupied = np.flatnonzero(histogram.counts)
    if len(occupied) < 3 or histogram.n < _REPEATS * len(occupied):
        return 0.0
    gaps = np.diff(occupied)
    nearer = np.minimum(np.append(gaps, gaps[-1]), np.insert(gaps, 0, gaps[0]))
    if nearer.max() == 1:
        return 0.0
    by_gap = np.bincount(nearer, histogram.counts[occupied])
    covered = np.cumsum(by_gap) >= _LATTICE_SHARE * by_gap.sum()
    spacing = int(np.argmax(covered))
    return spacing * BIN_WIDTH if spacing > 1 else 0.0


def improved_sheather_jones(histogram: Histogram) -> float | None:
    """Plug-in bandwidth without a normal reference; None where its equation has no root.

    Works on the histogram's nodes, added up to at most 4096 bins, with n the number of values.

    Reference:
        Botev, Grotowski and Kroese (2010), Annals of Statistics 38(5), section 5: the fixed point
        t = xi * gamma^[7](t), bandwidth sqrt(t) times the range.
    """
    density, bin_width = _bins(histogram)
    if np.count_nonzero(density) < 3:
        return None
    coefficients = scipy.fft.dct(density)[1:]  # a_k, k = 1, 2, ...
    k_squared = np.arange(1, len(density), dtype=np.float64) ** 2
    a_squared = (coefficients / 2) ** 2
    n = histogram.n

    def excess(t: float) -> float:
        return t - _plug_in(t, n, k_squared, a_squared)

    times = np.geomspace(1e-10, 0.1, 46)
    signs = np.array([excess(t) for t in times]) > 0
    rises = np.flatnonzero(~signs[:-1] & signs[1:])
    if not len(rises):
        return None
    first = int(rises[0])
    t = scipy.optimize.brentq(excess, times[first], times[first + 1], xtol=1e-16)
    variance = t * (len(density) * bin_width) ** 2
    return float(np.sqrt(variance))


def _plug_in(
    t: float, n: int, k_squared: NDArray[np.float64], a_squared: NDArray[np.float64]
) -> float:
    """xi * gamma^[7](t): the squared bandwidth that t implies, both in units of the range."""

    def roughness(s: int, time: float) -> float:
        """Estimated integral of the squared s-th derivative."""
        terms = k_squared**s * a_squared * np.exp(-k_squared * np.pi**2 * time)
        return float(2 * np.pi ** (2 * s) * terms.sum())

    norm = roughness(_STAGES, t)
    for s in range(_STAGES - 1, 1, -1):
        if norm <= 0:
            return np.inf
        odd_product = float(np.prod(np.arange(1, 2 * s, 2)))
        factor = (1 + 0.5 ** (s + 0.5)) / 3 * odd_product / np.sqrt(np.pi / 2)
        norm = roughness(s, (factor / (n * norm)) ** (2 / (3 + 2 * s)))
    return float((2 * n * np.sqrt(np.pi) * norm) ** (-2 / 5)) if norm > 0 else np.inf


def _bins(histogram: Histogram) -> tuple[NDArray[np.float64], float]:
    """Probabilities in even bins with a tenth of the range empty on both sides, and their width.

    Values that repeat on a lattice are spread evenly up to halfway to their neighbours: its
    spacing doubles with every power of two, so bins of one width would show it as a comb.
    """
    counts = histogram.counts
    margin = len(counts) // 10 + 1
    width = -(-(len(counts) + 2 * margin) // _MOST_BINS)
    edges = np.arange(-margin, len(counts) + margin + width, width) - 0.5  # in nodes
    if lattice_spacing(histogram):
        occupied = np.flatnonzero(counts)
        halfway = (occupied[1:] + occupied[:-1]) / 2
        cells = np.concatenate(
            [[2 * occupied[0] - halfway[0]], halfway, [2 * occupied[-1] - halfway[-1]]]
        )
        below = np.concatenate([[0.0], np.cumsum(counts[occupied])])
    else:
        cells = np.arange(len(counts) + 1) - 0.5
        below = np.concatenate([[0.0], np.cumsum(counts)])
    return np.diff(np.interp(edges, cells, below)) / below[-1], width * BIN_WIDTH
