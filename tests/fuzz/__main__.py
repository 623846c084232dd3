"""Many mutants of the formats, counted by verdict; exit status 1 if one breaks the invariant."""

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

from tests.fuzz.mutants import mutate
from tests.fuzz.worker import GOOD
from tests.fuzz.world import FORMATS, make_world

CORPUS = Path(__file__).parent / "corpus"

TIME_LIMIT = 60.0  # seconds a mutant, on a machine that others use too
START_LIMIT = 300.0  # of a worker, which may compile kernels
A_WORKER = 2000  # mutants, after which a fresh one goes on


def verdicts(
    format: str,
    seeds: range,
    *,
    bounds_check: bool = False,
    worker_code: Sequence[str] = ("-m", "tests.fuzz.worker"),
    time_limit: float = TIME_LIMIT,
) -> Iterator[dict[str, Any]]:
    """What came of each mutant; a worker that dies or hangs is replaced, and goes on after it."""
    environment = {**os.environ, "BHLOG_MEMORY_LIMIT": ""}
    if bounds_check:
        environment |= {
            "NUMBA_BOUNDSCHECK": "1",
            "NUMBA_CACHE_DIR": f"{tempfile.gettempdir()}/bhlog-fuzz-numba",
        }
    start = seeds.start
    while start < seeds.stop:
        stop = min(start + A_WORKER, seeds.stop)
        command = [sys.executable, *worker_code, format, str(start), str(stop)]
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=said, env=environment
            ) as worker,
        ):
            started = False
            for line in _lines(worker, time_limit):
                started = True
                found = json.loads(line)
                if isinstance(found, int):
                    start = found
                else:
                    yield found
                    start = found["seed"] + 1
            hung = worker.poll() is None
            worker.kill()
            worker.wait()
            said.seek(0)
            last = said.read()[-2000:].decode(errors="replace")
        if not started:
            raise RuntimeError(f"a worker did not start: {last}")
        if start < stop:
            verdict = "hang" if hung else "death"
            yield {"seed": start, "reader": "", "verdict": verdict, "words": "",
                   "detail": f"status {worker.returncode}: {last}"}  # fmt: skip
            start += 1


def _lines(worker: "subprocess.Popen[bytes]", time_limit: float) -> Iterator[bytes]:
    """Lines of its report, until it ends or is silent for too long."""
    assert worker.stdout is not None
    descriptor, held, limit = worker.stdout.fileno(), b"", START_LIMIT
    while select.select([descriptor], [], [], limit)[0]:
        read = os.read(descriptor, 1 << 16)
        if not read:
            worker.wait()
            return
        *lines, held = (held + read).split(b"\n")
        limit = time_limit
        yield from lines


def keep(format: str, seed: int, path: Path) -> None:
    """Keep the files that a format's readers read, as a seed changes them."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_world(root)
        mutate(root, format, seed)
        needed = {pattern.split("/")[0] for pattern in FORMATS[format]}
        with ZipFile(path, "w", ZIP_DEFLATED) as archive:
            for file in sorted(root.rglob("*")):
                if file.is_file() and file.relative_to(root).parts[0] in needed:
                    archive.write(file, file.relative_to(root))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--format", choices=(*FORMATS, "all"), default="all")
    parser.add_argument("--mutants", type=int, default=1000, help="of each format")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this one alone, told in full")
    parser.add_argument("--keep", help="with --seed: keep its files in the corpus by this name")
    parser.add_argument("--bounds-check", action="store_true", help="kernels check their indices")
    asked = parser.parse_args()
    first = asked.start if asked.seed is None else asked.seed
    seeds = range(first, first + (asked.mutants if asked.seed is None else 1))
    if asked.keep is not None:
        keep(asked.format, first, CORPUS / f"{asked.format}-{asked.keep}.zip")
        return
    failed = 0
    for format in FORMATS if asked.format == "all" else (asked.format,):
        counts: Counter[str] = Counter()
        began = time.monotonic()
        for found in verdicts(format, seeds, bounds_check=asked.bounds_check):
            counts[found["verdict"]] += 1
            if found["verdict"] not in GOOD or asked.seed is not None:
                print(format, *(str(value)[:1000] for value in found.values()), flush=True)
        rate = counts.total() / (time.monotonic() - began)
        told = ", ".join(f"{n:,} {verdict}" for verdict, n in counts.most_common())
        print(
            f"{format}: {counts.total():,} mutants from {first} ({rate:.0f}/s): {told}", flush=True
        )
        failed += sum(n for verdict, n in counts.items() if verdict not in GOOD)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
