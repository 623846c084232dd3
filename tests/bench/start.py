"""What it costs to start, beside bare Python.

    python -m tests.bench.start [--repeats N] [--run RUN]

Each command is a process of its own, on a run as small as the demo's (65,536 rows of 64 experts,
with a null model), all in turns. Its CPU seconds, of all cores together, and its wall seconds are
each divided by those of `python -c pass`; medians. `loads` names the heavy libraries that a command
imported. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.synthetic import normal_kde, write_run

LIBRARIES = (
    "duckdb", "matplotlib", "numba", "numpy", "pandas", "polars", "pyarrow", "rich", "scipy",
    "torch", "transformers",
)  # fmt: skip
COMMAND = "from bhlog.analysis.cli import main; main()"
LOADS = (
    "import sys\nfrom bhlog.analysis.cli import main\n"
    "try:\n    main()\nexcept SystemExit:\n    pass\n"
    f"print(*[m for m in {LIBRARIES} if m in sys.modules], file=sys.stderr)"
)


def spent(program: str, *arguments: str) -> tuple[float, float]:
    """CPU and wall seconds of one process of Python."""
    before, started = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, capture_output=True)
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system
    return cpu - before.children_user - before.children_system, wall


def loads(arguments: list[str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADS, *arguments], check=True, capture_output=True, text=True
    )
    return done.stderr.splitlines()[-1].split()


def small_run(folder: Path) -> Path:
    layers = range(4)
    kde = normal_kde(list(layers))
    return write_run(
        folder / "run", layers=layers, n_experts=64, n_sequences=8, length=2048, kde=kde
    )


def measure(run: str, repeats: int) -> dict[str, object]:
    commands = {
        "help": ["--help"],
        "replay_help": ["replay", "--help"],
        "info": ["info", run],
        "replay": ["replay", run, "--alpha", "0.3"],
        "sweep": ["sweep", run],
        "sql": ["sql", run, "SELECT count(*) FROM routing"],
    }
    works = {"bare": ("pass",), "import": ("import bhlog",)}
    works |= {name: (COMMAND, *arguments) for name, arguments in commands.items()}
    for work in works.values():
        spent(*work)  # compiled functions and byte code are there afterwards
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(spent(*work))
    cpu = {name: statistics.median(c for c, _ in times) for name, times in taken.items()}
    wall = {name: statistics.median(w for _, w in times) for name, times in taken.items()}
    return {
        "repeats": repeats,
        "cpu_seconds": {name: round(value, 3) for name, value in cpu.items()},
        "cpu_ratio": {name: round(value / cpu["bare"], 1) for name, value in cpu.items()},
        "wall_ratio": {name: round(value / wall["bare"], 1) for name, value in wall.items()},
        "loads": {name: loads(arguments) for name, arguments in commands.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--run", help="a run with a null model (default: one made here)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or str(small_run(Path(scratch)))
        found = measure(run, options.repeats)
    print(json.dumps({"bench": "start", **found}))


if __name__ == "__main__":
    main()
