"""What each command takes on the shapes of real models: time, and peak memory, which is bounded.

    python -m tests.bench.shapes [--tokens N] [--shapes 64x16,512x128]

A shape is experts x layers: OLMoE 64x16, Qwen3-30B 128x48, Qwen3-235B 128x94, DeepSeek-V3 256x58,
and a large one, 512x128. Logs hold N tokens, so that rows grow with layers. Each command runs in a
process of its own, which reports its peak resident size; times hold its start, beside that of a
command that reads next to nothing. Prints one JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.replay import PEAK
from tests.synthetic import normal_kde, write_run

SHAPES = "64x16,128x48,128x94,256x58,512x128"
COMMANDS = {
    "start": ("info", "RUN"),
    "replay": ("replay", "RUN", "--alpha", "0.3"),
    "sweep": ("sweep", "RUN"),
    "kept": ("sweep", "RUN", "--kept"),
    "fit": ("kde", "fit", "RUN", "--trim-high", "8", "--out", "null.parquet"),
    "fit by expert": ("kde", "fit", "RUN", "--null", "expert", "--out", "expert.parquet"),
    "verify": ("verify", "RUN", "--replay"),
}


def measured(command: tuple[str, ...], folder: Path) -> dict[str, float]:
    """Seconds and peak MiB of a command, run in a folder."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *command], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    seconds = round(time.perf_counter() - began, 2)
    return {"seconds": seconds, "peak_mib": round(int(done.stderr.split()[-1]) / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.shapes", description=__doc__)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--shapes", default=SHAPES)
    asked = parser.parse_args()
    found: dict[str, object] = {"tokens": asked.tokens}
    for shape in asked.shapes.split(","):
        n_experts, n_layers = map(int, shape.split("x"))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_run(
                folder / "RUN", layers=range(n_layers), n_experts=n_experts, top_k=8,
                n_sequences=max(1, asked.tokens // 100), length=min(100, asked.tokens), n_shards=1,
                kde=normal_kde(range(n_layers)),
            )  # fmt: skip
            measured(COMMANDS["start"], folder)  # compiled functions and files are warm
            found[shape] = {name: measured(one, folder) for name, one in COMMANDS.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
