"""What replay, sweeps and answers cost, beside reading the log and beside plain BH in torch.

    python -m tests.bench.replay [--rows N] [--folder DIR] [--cdfs PATH] [--memory]

The log: 16 layers of 64 experts, native top-8. The floor is the time that pyarrow takes to read the
logits column alone, a thread a core, as replay has. The peer computes p-values from the null
model's grid, sorts and compares for each alpha anew, vectorised over rows in memory; replay gets
the same rows, on the same threads. With --memory, the peak RSS of each command in a process of its
own: over this log, a BH run of the same rows, and a log of one layer in one row group. Modes take
turns; times are medians, and the least of each, which other work on the machine disturbs less.
--folder keeps the runs for the next time. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.analysis.null.estimate import fit_kde
from bhlog.analysis.replay.comparison import replay
from bhlog.analysis.replay.decide import Decider, decider_of
from bhlog.analysis.replay.settings import settings_of
from bhlog.analysis.run import open_log
from bhlog.analysis.sweep.critical import CriticalAlphas
from bhlog.analysis.sweep.grid import GRID
from bhlog.analysis.sweep.profile import Profile
from bhlog.analysis.sweep.profiling import profile_log
from bhlog.capture.contract.null.model import KdeModel, NullCurve
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import write_run

LAYERS = 16
E = 64
LENGTH = 2048
SHARDS = 8
ALPHA = 0.3
ALPHAS = tuple(i / 101 for i in range(1, 101))
PEER_ALPHAS = 5  # timed of the hundred
THREADS = os.cpu_count() or 1
# ru_maxrss would count what this process held when it started the other
PEAK = """
import sys
from pathlib import Path
from bhlog.analysis.cli import main
try:
    main(sys.argv[1:])
finally:
    status = Path("/proc/self/status").read_text()
    print(status.split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def timed(works: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times of each, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(seconds(work))
    return taken


def ratios(taken: dict[str, list[float]], of: Callable[[list[float]], float]) -> dict[str, float]:
    """How often the floor fits into each."""
    floor = of(taken["floor"])
    return {name: round(of(times) / floor, 2) for name, times in taken.items() if name != "floor"}


def made(path: Path, **options: Any) -> Log:
    """A run, written unless it is there."""
    if not path.exists():
        write_run(path, n_experts=E, length=LENGTH, **options)
    return open_log(path)


def null_model(path: Path, log: Log) -> KdeModel:
    if not path.exists():
        fit_kde(log).save(path)
    return KdeModel.load(path)


def read_logits(log: Log) -> None:
    """The floor."""

    def read(name: str) -> None:
        shard = pq.ParquetFile(f"{log.path}/routing/{name}")
        for index in range(shard.num_row_groups):
            shard.read_row_group(index, columns=["logits"], use_threads=False)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, log.shards))


def torch_bh(logits: Tensor, x0: float, dx: float, tail: Tensor, alphas: Sequence[float]) -> Tensor:
    """(T,) experts of each row at the last alpha: p-values, sort and compare for each one."""
    ranks = torch.arange(1, E + 1)
    count = torch.zeros(len(logits))
    for alpha in alphas:
        cell = ((logits - x0) / dx).clamp(0, len(tail) - 1.001)
        left = cell.floor().long()
        p = torch.lerp(tail[left], tail[left + 1], cell - left)
        rising, order = p.sort(dim=1)
        count = ((rising <= ranks * alpha / E) * ranks).amax(dim=1).clamp(min=1)
        torch.zeros_like(p, dtype=torch.bool).scatter_(1, order, ranks <= count[:, None])
    return count


def ours_one(decider: Decider, batches: list[pa.RecordBatch]) -> NDArray[np.integer]:
    """(T,) experts of each row, and which they are."""

    def decide(batch: pa.RecordBatch) -> NDArray[np.integer]:
        (policy,) = decider.policies
        return np.concatenate([policy.decide(rows).n_selected for rows in decider.rows(batch)])

    with ThreadPoolExecutor(THREADS) as pool:
        return np.concatenate(list(pool.map(decide, batches)))


def ours_all(critical: CriticalAlphas, batches: list[pa.RecordBatch]) -> NDArray[np.int64]:
    with ThreadPoolExecutor(THREADS) as pool:
        parts = pool.map(lambda batch: critical.count(logits_of(batch)).rows, batches)
        return np.sum(list(parts), axis=0)


def against_torch(log: Log, kde: KdeModel, repeats: int) -> dict[str, Any]:
    """Times of one alpha and of a hundred on the rows of one row group."""
    torch.set_num_threads(THREADS)
    batch = log.read(next(log.row_groups()), ("layer", "logits", "experts"))
    curve: NullCurve = kde[layer_of(batch)].curves[0]
    logits = torch.from_numpy(logits_of(batch).copy())
    null = curve.x0, curve.dx, torch.tensor(curve.tail, dtype=torch.float32)
    half = -(-batch.num_rows // THREADS)
    batches = [batch.slice(start, half) for start in range(0, batch.num_rows, half)]
    decider = decider_of(log, settings_of(log, [ALPHA]), kde)
    critical = CriticalAlphas.under(curve, np.array(ALPHAS), E)
    # float32 p-values of the peer are near, not equal
    near = torch_bh(logits, *null, [ALPHA]).numpy() == ours_one(decider, batches)
    times = timed(
        {
            "torch": lambda: torch_bh(logits, *null, ALPHAS[:PEER_ALPHAS]),
            "one": lambda: ours_one(decider, batches),
            "hundred": lambda: ours_all(critical, batches),
        },
        repeats,
    )
    taken = {name: statistics.median(spent) for name, spent in times.items()}
    one = taken["torch"] / PEER_ALPHAS
    return {
        "rows": batch.num_rows,
        "same_counts": round(float(near.mean()), 5),
        "torch_us_a_row": round(one / batch.num_rows * 1e6, 3),
        "times_faster_one_alpha": round(one / taken["one"], 1),
        "times_faster_100_alphas": round(100 * one / taken["hundred"], 1),
    }


def answers(profile: Profile, path: Path) -> dict[str, float]:
    """Milliseconds to load a profile and to answer from it."""
    profile.save(path)
    found = {"load_ms": seconds(lambda: Profile.load(path)) * 1e3}
    loaded = Profile.load(path)
    for name in ("first_answer_ms", "answer_ms"):
        found[name] = seconds(lambda: loaded.mean_experts(ALPHA, max_k=16)) * 1e3
    found["alpha_for_ms"] = seconds(lambda: loaded.alpha_for(4, max_k=16)) * 1e3
    return {name: round(ms, 3) for name, ms in found.items()}


def peak_mib(*arguments: str) -> int:
    """Peak RSS of a bhlog command, in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(done.stderr.splitlines()[-1]) // 1024


def memory(folder: Path, log: Log, kde: Path, sequences: int, cdfs: Any) -> dict[str, int]:
    layers = range(LAYERS)
    bh = made(
        folder / f"replay-bh-{sequences}", layers=layers, n_sequences=sequences, n_shards=SHARDS,
        cdfs=cdfs, options=BhOptions(ALPHA), kde=KdeModel.load(kde), seed=0,
    )  # fmt: skip
    whole = made(
        folder / f"replay-one-{4 * sequences}",
        layers=[0],
        n_sequences=4 * sequences,
        n_shards=1,
        cdfs=cdfs,
        seed=2,
    )
    found = {}
    for name, run in (("log", log), ("one_row_group", whole)):
        with tempfile.TemporaryDirectory() as out:
            common = [run.path, "--kde", str(kde)]
            found[f"{name}_replay"] = peak_mib("replay", *common, "--alpha", str(ALPHA))
            found[f"{name}_sweep"] = peak_mib("sweep", *common)
            found[f"{name}_sweep_kept"] = peak_mib("sweep", *common, "--kept")
            found[f"{name}_replay_out"] = peak_mib(
                "replay", *common, "--alpha", str(ALPHA), "--alpha", "0.1", "--out", out
            )
    found["log_fidelity"] = peak_mib("fidelity", log.path, bh.path)
    return found


def measure(folder: Path, rows: int, cdfs: Any, repeats: int, with_memory: bool) -> dict[str, Any]:
    sequences = max(SHARDS, rows // (LAYERS * LENGTH))
    log = made(
        folder / f"replay-{sequences}",
        layers=range(LAYERS),
        n_sequences=sequences,
        n_shards=SHARDS,
        cdfs=cdfs,
        seed=0,
    )
    model = folder / f"replay-{sequences}.parquet"
    kde = null_model(model, log)
    grid = sorted({*GRID, *ALPHAS})
    profiles: list[Profile] = []
    taken = timed(
        {
            "floor": lambda: read_logits(log),
            "replay": lambda: replay(log, settings_of(log, [ALPHA]), kde=kde),
            "sweep": lambda: profiles.append(profile_log(log, kde, alphas=grid)),
            "sweep_kept": lambda: profile_log(log, kde, alphas=grid, kept=True),
        },
        repeats,
    )
    with tempfile.TemporaryDirectory() as scratch:
        answered = answers(profiles[-1], Path(scratch) / "profile")
    found = {
        "rows": log.manifest.totals.rows,
        "threads": THREADS,
        "seconds": {name: round(statistics.median(spent), 3) for name, spent in taken.items()},
        "times_the_floor": ratios(taken, statistics.median),
        "times_the_floor_at_best": ratios(taken, min),
        "in_memory_beside_torch": against_torch(log, kde, repeats),
        "saved_profile": answered,
    }
    if with_memory:
        found["peak_rss_mib"] = memory(folder, log, model, sequences, cdfs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4_194_304)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the runs are kept")
    parser.add_argument("--cdfs", type=Path, help="marginals of real layers (x0, dx, cdf)")
    parser.add_argument("--memory", action="store_true", help="measure peak RSS too")
    options = parser.parse_args()
    cdfs = None if options.cdfs is None else dict(np.load(options.cdfs))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, options.rows, cdfs, options.repeats, options.memory)
    print(json.dumps({"bench": "replay", **found}))


if __name__ == "__main__":
    main()
