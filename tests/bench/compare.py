"""What comparing policies costs, against reading the logits they decide on.

    python -m tests.bench.compare [--rows N] [--folder DIR] [--cdfs PATH]

A log of 16 layers of 64 experts under native top-8 routing, a null model fitted from it, and a
policy of each family at its value for 8 experts. The floor is a fold that reads the logits column
and does nothing. All policies at once, each alone, and matching them to a budget; medians, modes
taking turns. Peak memory is that of a process of its own that compares and matches. Prints one JSON
line.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bhlog.analysis.fold import Scope, fold
from bhlog.analysis.log import Log
from bhlog.analysis.null.estimate import fit_kde
from bhlog.analysis.replay.comparison import compare
from bhlog.analysis.replay.match import match_experts
from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.registry import families, parse_policy
from bhlog.analysis.run import open_log
from bhlog.capture.contract.null.model import KdeModel
from tests.synthetic import write_run

LAYERS = 16
E = 64
LENGTH = 2048
EXPERTS = 8


class Reading:
    """Reads columns and does nothing with them."""

    def update(self, batch: pa.RecordBatch) -> None:
        pass

    def merge(self, other: "Reading") -> None:
        pass


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def log_of(folder: Path, rows: int, cdfs: Any) -> tuple[Log, KdeModel]:
    """The run and its null model, written once."""
    sequences = max(1, rows // (LAYERS * LENGTH))
    run, null = folder / f"compare-{sequences}", folder / f"compare-{sequences}.parquet"
    if not null.exists():
        write_run(
            run,
            layers=range(LAYERS),
            n_experts=E,
            n_sequences=sequences,
            length=LENGTH,
            n_shards=max(1, sequences // 16),
            cdfs=cdfs,
        )
        fit_kde([open_log(run)]).save(null)
    return open_log(run), KdeModel.load(null)


def peak_mib(run: str, null: str, policies: list[Policy], threads: int) -> float:
    """Peak RSS in MiB of this process, after a comparison and a match."""
    log, kde = open_log(run), KdeModel.load(null)
    compare(log, policies, kde=kde, scope=Scope(threads=threads))
    match_experts(log, policies, EXPERTS + 0.5, kde=kde)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: Path, rows: int, cdfs: Any, threads: int, repeats: int) -> dict[str, Any]:
    log, kde = log_of(folder, rows, cdfs)
    open_policies = [parse_policy(name, open_value=True) for name in families()]
    policies = match_experts(log, open_policies, EXPERTS, kde=kde)
    works: dict[str, Callable[[], Any]] = {
        "read logits": lambda: fold(log, Reading, ["logits"], Scope(threads=threads)),
        "match": lambda: match_experts(log, open_policies, EXPERTS, kde=kde),
        "all": lambda: compare(log, policies, kde=kde, scope=Scope(threads=threads)),
    }
    for policy in policies:
        works[policy.name] = lambda p=policy: compare(  # type: ignore[misc]
            log, [p], kde=kde, scope=Scope(threads=threads)
        )
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(seconds(work))
    median = {name: statistics.median(times) for name, times in taken.items()}
    floor = median["read logits"]
    null = str(folder / f"{log.name}.parquet")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(peak_mib, (log.path, null, policies, threads))
    return {
        "rows": log.manifest.totals.rows,
        "threads": threads,
        "policies": [str(policy) for policy in policies],
        "seconds": {name: round(spent, 2) for name, spent in median.items()},
        "over_reading": {name: round(spent / floor, 2) for name, spent in median.items()},
        "a_policy_of_all_over_reading": round((median["all"] / floor - 1) / len(policies), 2),
        "peak_mib": round(peak),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4_194_304)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where the run is kept")
    parser.add_argument("--cdfs", type=Path, help="marginals of real layers (x0, dx, cdf)")
    options = parser.parse_args()
    cdfs = None if options.cdfs is None else dict(np.load(options.cdfs))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, options.rows, cdfs, options.threads, options.repeats)
    print(json.dumps({"bench": "compare", **found}))


if __name__ == "__main__":
    main()
