"""What a Dask cluster of this machine takes to fold a log, beside threads in one process.

    python -m tests.bench.cluster [--rows N] [--repeats R] [--tasks N] [--shards N] [--folder DIR]

The log: 16 layers of 64 experts, native top-8. Two workers of a thread each replay it, sweep it,
and so on, two threads here do the same, taking turns, and both must give the same; CPU seconds are
of this process and of the workers, which other work on the machine disturbs less than wall time.
Then a worker is killed as soon as the first stretch is here. Tiny tasks say what the scheduler
costs; a `bhlog replay --scheduler` of its own over logs of 100 and of --shards small shards what
the client holds. Times are medians. --folder keeps the runs for the next time. Prints one JSON
line.
"""

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster

from bhlog.analysis.fold import Scope
from bhlog.analysis.log import Log
from bhlog.analysis.null.calibration import check, check_frame
from bhlog.analysis.null.estimate import fit_kde
from bhlog.analysis.replay.comparison import compare, replay
from bhlog.analysis.replay.settings import settings_of
from bhlog.analysis.sweep.profiling import profile_log
from bhlog.analysis.workers import elsewhere
from bhlog.capture.contract.manifest import Manifest
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.schema import shard_name
from tests.bench.replay import LAYERS, LENGTH, made, null_model, peak_mib
from tests.synthetic import normal_kde, write_run

WORKERS = 2
SHARDS = 32
ALPHA = 0.3
POLICIES = (f"bh:{ALPHA}", "topk:4", "topp:0.5")


def identity(item: int) -> int:
    """A task that does nothing."""
    return item


def cpu_seconds(client: Client) -> tuple[float, float]:
    """Of this process, and of the workers."""
    return time.process_time(), sum(client.run(time.process_time).values())


def taken(client: Client, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What work gives, and the seconds that it took."""
    here, there = cpu_seconds(client)
    started = time.perf_counter()
    found = work()
    wall = time.perf_counter() - started
    after = cpu_seconds(client)
    return found, {"wall": wall, "cpu_here": after[0] - here, "cpu_workers": after[1] - there}


def beside_threads(client: Client, verb: Callable[[Scope], Any], repeats: int) -> dict[str, Any]:
    """A verb on threads and on the cluster, taking turns, after a first time of each."""
    scopes = {
        "threads": Scope(threads=WORKERS),
        "dask": Scope(executor=client.get_executor(pure=False)),
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in scopes}
    for turn in range(repeats + 1):
        answers = []
        for name, scope in scopes.items():
            answer, seconds = taken(client, lambda scope=scope: verb(scope))
            answers.append(answer)
            if turn:
                times[name].append(seconds)
        assert answers[0] == answers[1]

    def ratio(of: Callable[[dict[str, float]], float]) -> list[float]:
        pairs = zip(times["dask"], times["threads"], strict=True)
        return sorted(round(of(there) / of(here), 3) for there, here in pairs)

    walls = ratio(lambda t: t["wall"])
    return {
        **{
            name: {what: round(statistics.median(t[what] for t in all_), 2) for what in all_[0]}
            for name, all_ in times.items()
        },
        "wall_ratios": walls,
        "wall_ratio": statistics.median(walls),
        "cpu_ratio": statistics.median(ratio(lambda t: t["cpu_here"] + t["cpu_workers"])),
    }


def killed(cluster: LocalCluster, client: Client, verb: Callable[[Scope], Any]) -> dict[str, Any]:
    """A worker ends by -9 in the middle."""
    client.wait_for_workers(WORKERS)
    victims = [worker.pid for worker in cluster.workers.values()][:1]

    def kill(rows: int) -> None:
        if victims:
            os.kill(victims.pop(), signal.SIGKILL)

    executor = client.get_executor(pure=False)
    started = time.perf_counter()
    answer = verb(Scope(executor=executor, progress=kill))
    wall = time.perf_counter() - started
    assert not victims
    return {"wall": round(wall, 2), "same": answer == verb(Scope())}


def overhead(client: Client, tasks: int) -> dict[str, float]:
    """Milliseconds of a task that does nothing, of as many."""
    client.wait_for_workers(WORKERS)
    executor = client.get_executor(pure=False)
    found, seconds = taken(client, lambda: list(elsewhere(executor, identity, range(tasks))))
    assert found == list(range(tasks))
    return {name: round(spent / tasks * 1e3, 3) for name, spent in seconds.items()}


def client_memory(folder: Path, client: Client, shards: int) -> dict[str, int]:
    """Peak RSS in MiB of a command over logs of few and of many small shards."""
    kde = folder / "cluster-null.parquet"
    normal_kde(range(LAYERS)).save(kde)
    found = {}
    few = folder / "cluster-100-shards"
    for n in (100, shards):
        path = folder / f"cluster-{n}-shards"
        if n > 100 and not path.exists():
            linked(few, path, n)
        if not path.exists():
            write_run(
                path, layers=range(LAYERS), n_experts=16, n_sequences=n, length=8, n_shards=n,
                sealed=True,
            )  # fmt: skip
        arguments = [str(path), "--kde", str(kde), "--alpha", str(ALPHA), "--layers", "0"]
        address = client.scheduler.address
        found[f"{n}_shards"] = peak_mib("replay", *arguments, "--scheduler", address)
        found[f"{n}_shards_threads"] = peak_mib("replay", *arguments)
    return found


def linked(few: Path, path: Path, n: int) -> None:
    """A run of n shards, which are those of another one again and again, under other names."""
    manifest = Manifest.from_json((few / "run.json").read_bytes(), "run.json")
    shards = []
    for inside in ("routing", "tokens"):
        (path / inside).mkdir(parents=True)
    for number in range(n):
        entry = manifest.shards[number % len(manifest.shards)]
        shards.append(replace(entry, name=shard_name(0, number)))
        for inside in ("routing", "tokens"):
            (path / inside / shards[-1].name).hardlink_to(few / inside / entry.name)
    rows, tokens = sum(one.rows for one in shards), sum(one.tokens for one in shards)
    totals = replace(manifest.totals, rows=rows, tokens=tokens, shards=n)
    replace(manifest, shards=tuple(shards), totals=totals).write(path)


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    sequences = max(SHARDS, options.rows // (LAYERS * LENGTH))
    path = folder / f"cluster-{sequences}"
    log: Log = made(path, layers=range(LAYERS), n_sequences=sequences, n_shards=SHARDS, seed=0)
    kde: KdeModel = null_model(folder / f"cluster-{sequences}.parquet", log)
    settings = settings_of(log, [ALPHA])
    verbs: dict[str, Callable[[Scope], Any]] = {
        "replay": lambda scope: replay(log, settings, kde=kde, scope=scope).rows(),
        "sweep": lambda scope: profile_log(log, kde, scope=scope).frame([ALPHA]).rows(),
        "fit": lambda scope: fit_kde([log], scope=scope).sha256,
        "check": lambda scope: check_frame(check(kde, log, scope=scope)).rows(),
        "compare": lambda scope: compare(log, POLICIES, kde=kde, scope=scope).rows(),
    }

    with (
        LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
        ) as cluster,
        Client(cluster) as client,
    ):
        return {
            "rows": log.manifest.totals.rows,
            "bytes": sum(entry.bytes for entry in log.manifest.shards),
            **{name: beside_threads(client, verb, options.repeats) for name, verb in verbs.items()},
            "killed": killed(cluster, client, verbs["replay"]),
            "ms_a_task": overhead(client, options.tasks),
            "peak_rss_mib": client_memory(folder, client, options.shards),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4_194_304)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where the runs are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, options)
    print(json.dumps({"bench": "cluster", **found}))


if __name__ == "__main__":
    main()
