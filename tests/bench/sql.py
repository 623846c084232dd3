"""What each question of sql/ costs, beside the same questions over nested JSON with pandas.

    python -m tests.bench.sql [--rows N] [--json-rows N] [--folder DIR] [--cdfs PATH]

The log: 16 layers of 64 experts under native top-8 routing, and a BH run over the same tokens'
numbers for questions that compare two. JSON is what older loggers wrote: one list of records with
layer, token, experts, weights and logits, read by pandas.read_json, which is part of each of its
questions; it gets a part of the log that it can hold, and costs compare per row. --folder keeps the
runs for the next time. Prints one JSON line. cpu_seconds are of all cores together: where other
programs share them, seconds rather than these suffer.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bhlog.analysis.database.connection import Database, connect
from bhlog.analysis.database.question import Question, questions
from bhlog.analysis.database.run_files import _Reader
from bhlog.analysis.log import Log
from bhlog.analysis.run import open_log
from tests.synthetic import with_many_shards, write_run

LAYERS = 16
E = 64
LENGTH = 2048


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def runs(folder: Path, rows: int, cdfs: Any) -> list[Log]:
    """Two runs over the same positions, the second a tenth as long; written once."""
    logs = []
    for name, part, seed in (("demo", 1, 0), ("other", 10, 1)):
        sequences = max(1, rows // (LAYERS * LENGTH) // part)
        path = folder / f"{name}-{sequences}"
        if not path.exists():
            write_run(
                path,
                layers=range(LAYERS),
                n_experts=E,
                n_sequences=sequences,
                length=LENGTH,
                n_shards=max(1, sequences // 16),
                decode_from=LENGTH // 2,
                cdfs=cdfs,
                seed=seed,
            )
        logs.append(open_log(path))
    return logs


def ask(database: Database, question: Question) -> None:
    for _ in database.batches(question.text, question.values({}))[1]:
        pass


def nested_json(log: Log, rows: int, path: Path) -> int:
    """Write the first rows of a run as a JSON list of records; return how many."""
    records: list[dict[str, Any]] = []
    columns = ["layer", "sequence", "position", "experts", "weights", "logits"]
    for batch in log.batches(columns):
        for row in batch.slice(0, max(1, rows // LAYERS)).to_pylist():
            row["token"] = row.pop("sequence") * LENGTH + row.pop("position")
            records.append(row)
        if len(records) >= rows:
            break
    path.write_text(json.dumps(records))
    return len(records)


def pandas_experts_per_token(rows: pd.DataFrame) -> Any:
    return rows.assign(n=rows["experts"].map(len)).groupby("layer")["n"].describe()


def pandas_expert_load(rows: pd.DataFrame) -> Any:
    return rows[["layer", "experts"]].explode("experts").value_counts()


def pandas_router_entropy(rows: pd.DataFrame) -> Any:
    def entropy(logits: list[float]) -> float:
        p = np.exp(np.array(logits) - max(logits))
        p /= p.sum()
        return float(-(p * np.log(p)).sum())

    return rows.assign(entropy=rows["logits"].map(entropy)).groupby("layer")["entropy"].mean()


def pandas_coactivation(rows: pd.DataFrame) -> Any:
    chosen = rows[["layer", "token", "experts"]].explode("experts")
    both = chosen.merge(chosen, on=["layer", "token"])
    return (
        both[both["experts_x"] < both["experts_y"]]
        .groupby(["layer", "experts_x", "experts_y"])
        .size()
    )


PANDAS: dict[str, Callable[[pd.DataFrame], Any]] = {
    "experts_per_token": pandas_experts_per_token,
    "expert_load": pandas_expert_load,
    "router_entropy": pandas_router_entropy,
    "coactivation": pandas_coactivation,
}


def opening(folder: Path) -> float:
    """Seconds to open a run of 1,000 shards."""
    run = with_many_shards(write_run(folder / "many", n_sequences=1, length=4, n_shards=1))
    return statistics.median(seconds(lambda: connect(open_log(run))) for _ in range(3))


# The question that reads least of a row, and the one that reads all of it.
WIDTHS = {
    "narrowest": "SELECT layer, avg(n_selected) FROM routing GROUP BY layer",
    "widest": "SELECT avg(list_max(logits)), max(list_sum(weights)), max(list_sum(experts)), "
    "max(position + sequence + rank + forward + token_id + n_selected), max(phase) FROM routing",
}


def price_of_checks(database: Database, repeats: int) -> dict[str, dict[str, float]]:
    """What checking pages costs: median seconds with it over those without, in turns."""
    checked = _Reader._checked

    def unchecked(reader: _Reader, start: int, end: int) -> bytes:
        return reader._read_at(start, end)

    price = {}
    for name, query in WIDTHS.items():
        taken: dict[Any, list[tuple[float, float]]] = {checked: [], unchecked: []}
        try:
            for _ in range(repeats):
                for reading in taken:
                    _Reader._checked = reading  # type: ignore[method-assign]
                    before = time.process_time()
                    spent = seconds(lambda: list(database.batches(query)[1]))  # noqa: B023
                    taken[reading].append((spent, time.process_time() - before))
        finally:
            _Reader._checked = checked  # type: ignore[method-assign]
        wall, cpu = (
            statistics.median(t[i] for t in taken[checked])
            / statistics.median(t[i] for t in taken[unchecked])
            for i in (0, 1)
        )
        price[name] = {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}
    return price


def measure(folder: Path, rows: int, json_rows: int, cdfs: Any, repeats: int) -> dict[str, Any]:
    log, other = runs(folder, rows, cdfs)
    n = sum(shard.rows for shard in log.manifest.shards)
    taken: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    pandas: dict[str, list[float]] = {name: [] for name in PANDAS}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "routing.json"
        n_json = nested_json(log, json_rows, path)
        one, two = connect(log), connect([log, other])
        for _ in range(repeats):
            for question in questions():
                database = two if "two runs" in question.needs else one
                before = time.process_time()
                spent = seconds(lambda d=database, q=question: ask(d, q))  # type: ignore[misc]
                cpu.setdefault(question.name, []).append(time.process_time() - before)
                taken.setdefault(question.name, []).append(spent)
                if question.name in PANDAS:
                    slow = PANDAS[question.name]
                    pandas[question.name].append(seconds(lambda s=slow: s(pd.read_json(path))))  # type: ignore[misc]
        price = price_of_checks(one, max(5, repeats))
        opened = opening(Path(scratch))
    median = {name: statistics.median(times) for name, times in taken.items()}
    reads_logits = {q.name for q in questions() if "logits" in q.text.split("WITH")[-1]}
    return {
        "rows": n,
        "json_rows": n_json,
        "seconds": {name: round(spent, 3) for name, spent in median.items()},
        "cpu_seconds": {name: round(min(times), 3) for name, times in cpu.items()},
        "over_5_s": [name for name, spent in median.items() if spent >= 5],
        "over_1_s_without_logits": [
            name for name, spent in median.items() if spent >= 1 and name not in reads_logits
        ],
        "times_faster_per_row_than_pandas": {
            name: round(statistics.median(times) / n_json / (median[name] / n), 1)
            for name, times in pandas.items()
        },
        "times_as_long_checked": price,
        "seconds_to_open_1000_shards": round(opened, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=4_194_304)
    parser.add_argument("--json-rows", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the runs are kept")
    parser.add_argument("--cdfs", type=Path, help="marginals of real layers (x0, dx, cdf)")
    options = parser.parse_args()
    cdfs = None if options.cdfs is None else dict(np.load(options.cdfs))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, options.rows, options.json_rows, cdfs, options.repeats)
    print(json.dumps({"bench": "sql", **found}))


if __name__ == "__main__":
    main()
