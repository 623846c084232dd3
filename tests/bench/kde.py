"""What fitting null models costs, and how right the tail is, beside three other libraries.

    python -m tests.bench.kde [--rows N] [--cdfs PATH]

Needs KDEpy and scikit-learn beside the development extra. Rows of 64 bfloat16 logits, one layer in
memory and 16 layers in a log, which is the longer one. Peers get the same logits:
KDEpy.FFTKDE all of them; scipy and scikit-learn, whose cost is n times grid points, as many as they
can do in seconds, extrapolated. Errors are of S(x) against a direct float64 sum wherever it is at
least 1e-8, on 320,000 logits in float32; a peer's density is summed from the right, which is the
best it can do. Modes take turns; times are the least of each, which other work on the machine moves
least. Prints one JSON line.
"""

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import gaussian_kde

from bhlog.analysis.fold import Scope, fold
from bhlog.analysis.kernels.patterns import count_patterns
from bhlog.analysis.log import Log
from bhlog.analysis.null.estimate import FitOptions, count_logits, fit_kde
from bhlog.analysis.run import open_log
from bhlog.capture.contract.null.bandwidth import choose_bandwidth
from bhlog.capture.contract.null.histogram import Histogram, HistogramAccumulator
from bhlog.capture.contract.null.kernel import kernel_tail
from bhlog.capture.contract.null.model import NullCurve
from tests.synthetic import normal_logits, real_logits, write_run

E = 64
LAYERS = 16
PEER_GRID = 1 << 14
SLOW_GRID = 512


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def least(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Shortest time of each, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(seconds(work))
    return {name: min(times) for name, times in taken.items()}


def fit(values: NDArray[np.float32], threads: int = 1) -> NullCurve:
    parts = np.array_split(values, threads)
    with ThreadPoolExecutor(threads) as pool:
        counted = pool.map(lambda part: Histogram.of(part, count=count_patterns), parts)
        histogram = reduce(Histogram.merge, counted)
    bandwidth = choose_bandwidth(histogram, "scott").width
    x0, dx, tail = kernel_tail(histogram, "gaussian", bandwidth)
    return NullCurve(expert=None, n=len(values), x0=x0, dx=dx, tail=tail, bandwidth=bandwidth)


def direct_tail(values: NDArray[np.float32], h: float, x: NDArray[np.float64]) -> NDArray:
    """S by a direct float64 sum; values 40 bandwidths away are 0 or 1 to the last bit."""
    ordered = np.sort(values.astype(np.float64))
    result = np.empty(len(x))
    for i, at in enumerate(x):
        low, high = np.searchsorted(ordered, (at - 40 * h, at + 40 * h))
        result[i] = ndtr((ordered[low:high] - at) / h).sum() + len(ordered) - high
    return result / len(ordered)


def right_sum(x: NDArray[np.float64], density: NDArray[np.float64]) -> NDArray[np.float64]:
    """S at x from a density on an even grid, by the trapezoid rule from the right."""
    panels = (density[1:] + density[:-1]) / 2 * np.diff(x)
    return np.append(panels[::-1].cumsum()[::-1], 0.0)


def errors(values: NDArray[np.float32]) -> dict[str, float]:
    """Largest relative error of S down to 1e-8, of ours between nodes and of peers at theirs."""
    from KDEpy import FFTKDE
    from sklearn.neighbors import KernelDensity

    ours = fit(values)
    h = float(ours.bandwidth or 0)
    ends = float(values.min()) - 8 * h, float(values.max()) + 8 * h
    rng = np.random.default_rng(0)
    found = {}

    def worst(x: NDArray[np.float64], tail: NDArray[np.float64]) -> float:
        direct = direct_tail(values, h, x)
        counted = direct >= 1e-8
        return float(np.abs(tail[counted] / direct[counted] - 1).max())

    x = np.concatenate([rng.uniform(*ends, 300), values.max() + rng.uniform(-4, 6, 300) * h])
    found["bhlog"] = worst(x, ours.p_value(x))
    x = np.linspace(*ends, PEER_GRID)
    density = FFTKDE(bw=h).fit(values.astype(np.float64)).evaluate(x)
    some = np.linspace(0, PEER_GRID - 1, 600).astype(int)
    found["KDEpy.FFTKDE"] = worst(x[some], right_sum(x, density)[some])
    x = np.linspace(*ends, SLOW_GRID)
    density = gaussian_kde(values, h / values.std(ddof=1))(x)
    found["scipy.gaussian_kde"] = worst(x, right_sum(x, density))
    tree = KernelDensity(bandwidth=h).fit(values.astype(np.float64)[:, None])
    found["sklearn.KernelDensity"] = worst(x, right_sum(x, np.exp(tree.score_samples(x[:, None]))))
    return found


def in_memory(
    values: NDArray[np.float32], plain: NDArray[np.float32], threads: int
) -> dict[str, Any]:
    from KDEpy import FFTKDE
    from sklearn.neighbors import KernelDensity

    curve = fit(values)
    h, grid = float(curve.bandwidth or 0), len(curve.tail)
    x = np.linspace(float(values.min()) - 8 * h, float(values.max()) + 8 * h, grid)
    works = {
        "bhlog": lambda: fit(values, threads),
        "bhlog_one_thread": lambda: fit(values),
        "bhlog_float32": lambda: fit(plain, threads),
        "KDEpy.FFTKDE": lambda: FFTKDE(bw=h).fit(values).evaluate(x),
    }
    times = least(works, 7)
    n_slow, points = 20_000, np.linspace(x[0], x[-1], 200)
    few = values[:: len(values) // n_slow][:n_slow].astype(np.float64)
    scale = len(values) / n_slow * grid / len(points)
    slow = gaussian_kde(few, h / few.std(ddof=1))
    tree = KernelDensity(bandwidth=h).fit(few[:, None])
    peers = {
        "scipy.gaussian_kde": lambda: slow(points),
        "sklearn.KernelDensity": lambda: tree.score_samples(points[:, None]),
    }
    times |= {name: t * scale for name, t in least(peers, 3).items()}
    return {
        "logits": len(values),
        "grid_points": grid,
        "seconds": {name: float(f"{t:.3g}") for name, t in times.items()},
        "times_slower": {
            name: float(f"{t / times['bhlog']:.3g}") for name, t in times.items() if "." in name
        },
    }


class Reading:
    """Reads the logits column and does nothing with it."""

    def update(self, batch: Any) -> None:
        pass

    def merge(self, other: "Reading") -> None:
        pass


def from_log(log: Log, threads: int) -> dict[str, Any]:
    scope, trimmed = Scope(threads=threads), FitOptions(trim_high=8)
    model = fit_kde(log, scope=scope)
    times = least(
        {
            "read": lambda: fold(log, Reading, ["logits"], scope),
            "count": lambda: count_logits([log], FitOptions(), scope=scope),
            "fit": lambda: fit_kde(log, scope=scope),
            "fit_trimmed": lambda: fit_kde(log, trimmed, scope=scope),
            "refit": lambda: model.refit(bandwidth="silverman"),
            "refit_isj": lambda: model.refit(bandwidth="isj"),
        },
        9,
    )
    return {
        "rows": sum(group.rows for group in log.row_groups()),
        "threads": threads,
        "read_s": round(times["read"], 3),
        "fit_s": round(times["fit"], 3),
        "count_over_read": round(times["count"] / times["read"], 2),
        "fit_over_read": round(times["fit"] / times["read"], 2),
        "trimmed_over_read": round(times["fit_trimmed"] / times["read"], 2),
        "refit_16_layers_ms": round(1e3 * times["refit"], 1),
        "refit_isj_16_layers_ms": round(1e3 * times["refit_isj"], 1),
        "file_bytes": len(model.to_bytes()),
    }


def peak_bytes(rng: np.random.Generator, batches: int) -> int:
    """Largest memory that counting so many batches of 4096 rows holds, their own aside."""
    batch = normal_logits(rng, 4096, E)
    tracemalloc.start()
    counting = HistogramAccumulator()
    for _ in range(batches):
        counting.update(0, batch)
    counting.histograms()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000, help="rows of 64 logits")
    parser.add_argument("--log-rows", type=int, default=4_194_304, help="rows of the log")
    parser.add_argument("--cdfs", type=Path, help="arrays x0, dx, cdf of real layers")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    cdfs = dict(np.load(options.cdfs)) if options.cdfs else None
    if cdfs is None:
        values = normal_logits(rng, options.rows, E).ravel()
    else:
        one = {"x0": float(cdfs["x0"][7]), "dx": float(cdfs["dx"][7]), "cdf": cdfs["cdf"][7]}
        values = real_logits(rng, options.rows, E, **one).ravel()
    plain = rng.normal(-1, 1, len(values)).astype(np.float32)
    result = {
        "memory": in_memory(values, plain, options.threads),
        "max_relative_error": errors(plain[:320_000]),
    }
    with tempfile.TemporaryDirectory() as folder:
        tokens = max(8, options.log_rows // LAYERS)
        run = write_run(
            Path(folder) / "run",
            layers=range(LAYERS),
            n_experts=E,
            n_sequences=8,
            length=tokens // 8,
            n_shards=4,
            cdfs=cdfs,
        )
        result["log"] = from_log(open_log(run), options.threads)
    result["peak_bytes"] = {str(n * 4096 * E): peak_bytes(rng, n) for n in (4, 64)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
