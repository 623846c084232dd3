"""The tail of a kernel density estimate, from a histogram, by FFT.

The tail is S(x) = sum_i c_i Q((x - x_i) / h) / n over the histogram's nodes, with Q the kernel's
upper-tail integral. Summed as it stands by FFT it would lose small values to rounding, so the step
function is taken out of Q: suffix sums of the counts are exact, and the convolution adds only the
difference, which is 0 a few bandwidths away.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bhlog.capture.contract.null.histogram import BIN_WIDTH, ONE_SPREAD, ONE_VALUE, Histogram

Upper = Callable[[NDArray[np.float64]], NDArray[np.float64]]

REACH = 8.0  # bandwidths of margin on both sides of the data
SMALLEST_TAIL = 1e-8  # down to here interpolation between grid points is held to TOLERANCE
TOLERANCE = 5e-5  # relative error of S by linear interpolation
MOST_GRID_POINTS = 1 << 20
KEPT_BITS = 32  # of the tail's significand, 1e-10 of S: the rest is noise that no file can compress
_FINEST = 64  # grid points per histogram node, at most
_COARSEST = 64  # histogram nodes per grid point, at most
_SMOOTH_FROM = 4  # bandwidth in nodes from which second differences stand for derivatives
_MOST_STEPS = {  # grid points a bandwidth
    "gaussian": 285,  # enough for TOLERANCE down to SMALLEST_TAIL whatever the data
    "tophat": 128,  # corners fall between grid points of any step
}


def gaussian(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper tail of the standard normal distribution."""
    from scipy.special import ndtr  # heavy, and only a fit needs it

    upper: NDArray[np.float64] = ndtr(-z)
    return upper


def epanechnikov(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper tail of the parabola on [-1, 1], scaled to standard deviation 1."""
    t = np.clip(z / np.sqrt(5.0), -1.0, 1.0)
    upper: NDArray[np.float64] = (1.0 - t) ** 2 * (2.0 + t) / 4.0
    return upper


def tophat(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper tail of the uniform distribution, scaled to standard deviation 1."""
    upper: NDArray[np.float64] = (1.0 - np.clip(z / np.sqrt(3.0), -1.0, 1.0)) / 2.0
    return upper


def triangular(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Upper tail of the triangle on [-1, 1], scaled to standard deviation 1."""
    t = np.clip(z / np.sqrt(6.0), -1.0, 1.0)
    nearer_end = (1.0 - np.abs(t)) ** 2 / 2.0
    upper: NDArray[np.float64] = np.where(t >= 0, nearer_end, 1.0 - nearer_end)
    return upper


UPPER: dict[str, Upper] = {
    "gaussian": gaussian,
    "epanechnikov": epanechnikov,
    "tophat": tophat,
    "triangular": triangular,
}
_SMOOTH = ("gaussian", "epanechnikov", "triangular")  # whose tail has no corner


def empirical_tail(histogram: Histogram) -> tuple[float, float, NDArray[np.float64]]:
    """The tail without a kernel: the share of logits above each node.

    Returns:
        (x0, dx, tail), see kernel_tail.
    """
    counts = np.concatenate([[0], histogram.counts])
    above = counts.sum() - np.cumsum(counts)
    return histogram.lo - BIN_WIDTH, BIN_WIDTH, above / above[0]


def conformal_tail(histogram: Histogram) -> tuple[float, float, NDArray[np.float64]]:
    """Conformal p-values of a sample: (1 + #{values >= x}) / (n + 1), never below 1 / (n + 1).

    A value between two nodes counts as if it were at the upper one, and x as if it were at the
    lower: to the safe side by less than two BIN_WIDTH. Values on nodes, as most of bfloat16, and x
    on one are exact unless the node just below x is taken too.

    Returns:
        (x0, dx, tail), see kernel_tail; its last value is that of any x beyond the sample.

    Reference:
        Vovk, Gammerman and Shafer (2005), Algorithmic learning in a random world, section 2.2.
    """
    counts = np.concatenate([[0], histogram.counts])
    at_least = counts.sum() - np.concatenate([[0, 0], np.cumsum(counts)])
    n = histogram.n
    tail = (1 + at_least / ONE_VALUE) / (n + 1)
    return histogram.lo - BIN_WIDTH, BIN_WIDTH, np.minimum(tail, 1.0)


def kernel_tail(
    histogram: Histogram, kernel: str, bandwidth: float, most_points: int = MOST_GRID_POINTS
) -> tuple[float, float, NDArray[np.float64]]:
    """The tail of the kernel density estimate of a histogram, on an even grid.

    Whatever the values, the kernel and the bandwidth, the tail interpolated linearly lies between
    the direct sum over values moved by 1.1 * BIN_WIDTH to either side, give or take 1e-3 of it and
    1e-8: a value's place is known to a node. Where many different values lie under a kernel their
    errors cancel: the tail is within 1e-4 of S down to S = 1e-8, with the gaussian kernel for
    bandwidths from about 15 * BIN_WIDTH on (1e-3 if the values are all one), with epanechnikov and
    triangular for 1,000 values or more, up to where the last kernel ends. The tail of a tophat has
    a corner where each value's kernel ends, which no grid meets: with values off the nodes it is
    within about 1e-2 of S until a BIN_WIDTH before the last of them. The grid is the coarsest whose
    step is a power of two and keeps to that; it reaches REACH bandwidths beyond the data.

    Args:
        histogram: at least one value.
        kernel: a name of UPPER.
        bandwidth: standard deviation of the kernel, in logits, above 0.
        most_points: the grid has no more points, whatever the accuracy, but for one in _COARSEST
            nodes.

    Returns:
        (x0, dx, tail): tail is (G,) float64, P(logit > x0 + g * dx), falling from 1 to 0.
    """
    resolved = bandwidth >= _SMOOTH_FROM * BIN_WIDTH
    smooth = kernel in _SMOOTH and resolved
    counts = _without_spread(histogram) if smooth else np.pad(histogram.counts, 1)
    weights = counts / histogram.counts.sum()
    margin = int(np.ceil(REACH * bandwidth / BIN_WIDTH)) + 1
    upper = UPPER[kernel]
    tail = _convolve(weights, upper, bandwidth, margin, 1)
    step = bandwidth / BIN_WIDTH / _MOST_STEPS[kernel] if kernel in _MOST_STEPS else 0.0
    if resolved:
        step = max(step, _widest_step(tail))
    finest = min(_FINEST, max(1 / _COARSEST, most_points / len(tail)))
    per_node = 2.0 ** np.ceil(-np.log2(max(step, 1 / _FINEST)))
    per_node = float(np.clip(per_node, 1 / _COARSEST, 2.0 ** np.floor(np.log2(finest))))
    if per_node > 1:
        tail = _convolve(weights, upper, bandwidth, margin, int(per_node))
    elif per_node < 1:
        stride = round(1 / per_node)
        tail = np.pad(tail, (0, -(len(tail) - 1) % stride))[::stride]
    x0 = (histogram.first - 1 - margin) * BIN_WIDTH
    falling = np.maximum.accumulate(np.clip(tail, 0.0, 1.0)[::-1])[::-1]
    return x0, BIN_WIDTH / per_node, _rounded(falling)


def _rounded(tail: NDArray[np.float64]) -> NDArray[np.float64]:
    """The tail with its significands rounded to KEPT_BITS, which keeps its order."""
    dropped = np.uint64(52 - KEPT_BITS)
    bits = np.ascontiguousarray(tail).view(np.uint64)
    half = np.uint64(1) << (dropped - np.uint64(1))
    rounded: NDArray[np.float64] = ((bits + half) >> dropped << dropped).view(np.float64)
    return rounded


def _without_spread(histogram: Histogram) -> NDArray[np.float64]:
    """Counts with the variance that linear binning added taken back out of every value.

    Moves mass by second differences of the spread, which makes sums of a smooth function over the
    nodes exact to third order in BIN_WIDTH; a lone value gets the weights of cubic interpolation.

    Returns:
        (N + 2,) float64 from one node before the first to one after the last; some may be negative.
    """
    if not histogram.spread.any():
        return np.pad(histogram.counts.astype(np.float64), 1)
    excess = np.pad(histogram.spread, (3, 2)) * (ONE_VALUE / ONE_SPREAD)
    at_node = (excess[1:] + excess[:-1]) / 2  # half of a cell's spread to either node
    correction = np.diff(at_node, 2) / 2
    return np.pad(histogram.counts, 1) - correction


def _convolve(
    weights: NDArray[np.float64], upper: Upper, bandwidth: float, margin: int, per_node: int
) -> NDArray[np.float64]:
    """The tail at per_node points a node, from margin nodes before the first to after the last.

    Returns:
        ((len(weights) + 2 * margin) * per_node,) float64.
    """
    above = np.pad(weights, (margin, margin + 1))[::-1].cumsum()[::-1][1:]
    apart = np.arange(-margin, margin + 1)  # nodes between a grid point and a value
    z = (apart + np.arange(per_node)[:, None] / per_node) * (BIN_WIDTH / bandwidth)
    beyond_step = np.copysign(upper(np.abs(z)), np.where(apart < 0, -1.0, 1.0))
    from scipy.fft import irfft, next_fast_len, rfft

    size = next_fast_len(len(above), real=True)
    spectrum = rfft(weights, size) * rfft(beyond_step, size)
    smoothing = irfft(spectrum, size)[:, : len(above)]
    tail: NDArray[np.float64] = (above + smoothing).T.reshape(-1)
    return tail


def _widest_step(tail: NDArray[np.float64]) -> float:
    """Widest grid step, in nodes, whose linear interpolation keeps to TOLERANCE."""
    middle = tail[1:-1]
    bend = np.abs(tail[:-2] - 2 * middle + tail[2:])  # about S'' times a node squared
    counted = middle >= SMALLEST_TAIL / 2
    curvature = float((bend[counted] / middle[counted]).max(initial=0.0))
    return float(np.sqrt(8 * TOLERANCE / max(curvature, 1e-12)))
