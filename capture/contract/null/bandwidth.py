"""Bandwidths of null models, chosen from a histogram.

Router logits of bfloat16 models repeat on few values: between 2 and 4 they lie 2^-6 apart. A
bandwidth well below that spacing would turn the density into a comb of the number format, so no
rule chooses less than the spacing that 95 % of the logits have around them. Scott's and
Silverman's rules see only the standard deviation and n, which the repeats do not change; improved
Sheather-Jones reads the shape, so it sees such values spread over their spacing.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.curve import BANDWIDTH_RULES, INSTEAD
from bhlog.capture.contract.null.histogram import BIN_WIDTH, ONE_SPREAD, ONE_VALUE, Histogram

WIDEST = 64.0  # logits; a kernel that wide hides whatever it is laid over
_REPEATS = 4  # values per occupied node from which spacing means a lattice, not thin data
_LATTICE_SHARE = 0.95  # share of logits whose spacing a bandwidth must not undercut
_STAGES = 7  # of the plug-in: derivatives 7 to 2, as Botev et al. use
_MOST_BINS = 1 << 12
_UNDERFLOW = 700.0  # exp(-700) is next to nothing beside what it is added to


def check_bandwidth(bandwidth: str | float) -> None:
    """Raise InvalidOption unless it is the name of a rule or a bandwidth that can be fitted."""
    if isinstance(bandwidth, str):
        if bandwidth not in BANDWIDTH_RULES:
            raise InvalidOption(
                f"bandwidth must be {', '.join(BANDWIDTH_RULES)} or a number of logits, "
                f"got {bandwidth!r}"
            )
    elif not BIN_WIDTH <= bandwidth <= WIDEST:  # NaN fails too
        raise InvalidOption(
            f"bandwidth must be between 0.001 and {WIDEST:g} logits, got {bandwidth}"
        )


class Bandwidth(NamedTuple):
    """A bandwidth and what it came from.

    Attributes:
        width: standard deviation of the kernel in logits, above 0.
        rule: one of BANDWIDTH_RULES, INSTEAD, or "fixed".
    """

    width: float
    rule: str


def choose_bandwidth(histogram: Histogram, bandwidth: str | float) -> Bandwidth:
    """The bandwidth by a rule, or as given.

    Args:
        histogram: what is fitted, at least one value.
        bandwidth: a name of BANDWIDTH_RULES, or the bandwidth itself; see check_bandwidth.

    Returns:
        Rules give at least BIN_WIDTH and at least the spacing of the lattice.
    """
    if not isinstance(bandwidth, str):
        return Bandwidth(float(bandwidth), "fixed")
    rule, chosen = bandwidth, _RULES[bandwidth](histogram)
    if chosen is None:  # no root to find
        rule, chosen = INSTEAD, silverman(histogram)
    return Bandwidth(max(chosen, lattice_spacing(histogram), BIN_WIDTH), rule)


def scott(histogram: Histogram) -> float:
    """sd * n^(-1/5), as scipy.stats.gaussian_kde has it. Scott (1992)."""
    return float(standard_deviation(histogram) * histogram.n ** (-1 / 5))


def silverman(histogram: Histogram) -> float:
    """sd * (3 n / 4)^(-1/5), as scipy.stats.gaussian_kde has it. Silverman (1986), eq. (3.28)."""
    return float(standard_deviation(histogram) * (histogram.n * 3 / 4) ** (-1 / 5))


def nrd0(histogram: Histogram) -> float:
    """0.9 * min(sd, IQR / 1.34) * n^(-1/5), as R's bw.nrd0 has it. Silverman (1986), eq. (3.31).

    Quartiles are those of the nodes (R's type 7), exact to BIN_WIDTH. The standard deviation
    stands alone where the quartiles are one value.
    """
    sd, n = standard_deviation(histogram), histogram.n
    at = (n - 1) * np.array([0.25, 0.75])
    below = np.cumsum(histogram.counts / ONE_VALUE)  # values up to a node, in order
    first = np.searchsorted(below, np.floor(at), side="right")
    second = np.searchsorted(below, np.floor(at) + 1, side="right")
    second = np.minimum(second, len(below) - 1)
    low, high = first + (at - np.floor(at)) * (second - first)
    spread = (high - low) * BIN_WIDTH / 1.34
    return float(0.9 * (min(sd, spread) or sd) * n ** (-1 / 5))


def standard_deviation(histogram: Histogram) -> float:
    """Sample standard deviation of the values, free of what linear binning adds; 0 for n < 2."""
    n = histogram.n
    if n < 2:
        return 0.0
    weights = histogram.counts / ONE_VALUE
    node = np.arange(len(weights), dtype=np.float64)
    # sums, not @: BLAS would start threads for it, which the threads that fit layers wait on
    mean = (weights * node).sum() / n
    squares = (weights * (node - mean) ** 2).sum() - histogram.spread.sum() / ONE_SPREAD
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
    from scipy.fft import dct  # heavy, and only a fit needs it
    from scipy.optimize import brentq

    coefficients = dct(density)[1:]  # a_k, k = 1, 2, ...
    k_squared = np.arange(1, len(density), dtype=np.float64) ** 2
    squares = _Squares(k_squared, (coefficients / 2) ** 2)
    n = histogram.n

    def excess(t: float) -> float:
        return t - squares.plug_in(t, n)

    below = 1e-10
    for t in np.geomspace(1e-10, 0.1, 46)[1:]:
        if excess(below) <= 0 < excess(t):
            root = brentq(excess, below, t, xtol=1e-16)
            return float(np.sqrt(root) * len(density) * bin_width)
        below = t
    return None


_RULES = {"scott": scott, "silverman": silverman, "nrd0": nrd0, "isj": improved_sheather_jones}


class _Squares:
    """Squared cosine coefficients of a density, which estimate how rough its derivatives are."""

    def __init__(self, k_squared: NDArray[np.float64], a_squared: NDArray[np.float64]) -> None:
        self._decay = -k_squared * np.pi**2
        self._terms = {s: k_squared**s * a_squared for s in range(2, _STAGES + 1)}

    def roughness(self, s: int, t: float) -> float:
        """Estimated integral of the squared s-th derivative of the density smoothed by sqrt(t)."""
        last = min(len(self._decay), int(np.sqrt(_UNDERFLOW / t) / np.pi) + 1)  # others vanish
        terms = self._terms[s][:last] * np.exp(self._decay[:last] * t)
        return float(2 * np.pi ** (2 * s) * terms.sum())

    def plug_in(self, t: float, n: int) -> float:
        """xi * gamma^[7](t): the squared bandwidth that t implies, both in units of the range."""
        norm = self.roughness(_STAGES, t)
        for s in range(_STAGES - 1, 1, -1):
            if norm <= 0:
                return np.inf
            odd_product = math.prod(range(1, 2 * s, 2))
            factor = (1 + 0.5 ** (s + 0.5)) / 3 * odd_product / np.sqrt(np.pi / 2)
            norm = self.roughness(s, (factor / (n * norm)) ** (2 / (3 + 2 * s)))
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
