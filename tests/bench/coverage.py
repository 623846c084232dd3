"""How often a 95 % interval of clustered standard errors covers the true mean.

    python -m tests.bench.coverage [--logs N] [--length TOKENS]

Logs of G sequences whose tokens are alike: the scale of a sequence's logits is its own, uniform
between 0.5 and 2. The truth is the mean over 20,000 sequences, replayed by the same rule. Beside
the normal interval (1.96 X_se) that of Student's t with G - 1 degrees of freedom, and the one that
takes tokens for independent (1.96 sd / sqrt(rows)). Prints one JSON line.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import t as student

from bhlog.analysis.run import open_log
from tests.synthetic import normal_kde, write_run

E, ALPHA, TRUTH, SIZES = 16, 0.3, 20_000, (10, 30, 100)
MEANS = ("mean_experts", "sd_experts", "probability_kept", "at_min_k")


def replayed(folder: Path, rng: np.random.Generator, n: int, length: int) -> dict[str, float]:
    """The summary of a log of n sequences."""
    scale = np.repeat(rng.uniform(0.5, 2.0, n), length)
    logits: NDArray[np.float32] = (rng.normal(size=(n * length, E)) * scale[:, None]).astype("f4")
    with tempfile.TemporaryDirectory(dir=folder) as run:
        write_run(
            Path(run), layers=[0], n_experts=E, n_sequences=n, length=length, n_shards=1,
            logits=logits[None, None], kde=normal_kde([0]),
        )  # fmt: skip
        frame: pl.DataFrame = open_log(run).replay(ALPHA, threads=1)
    return frame.row(0, named=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logs", type=int, default=1000)
    parser.add_argument("--length", type=int, default=40)
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        truth = replayed(Path(folder), rng, TRUTH, asked.length)
        for G in SIZES:
            logs = [replayed(Path(folder), rng, G, asked.length) for _ in range(asked.logs)]
            for name in MEANS:
                error = np.array([abs(log[name] - truth[name]) for log in logs])
                se = np.array([log[f"{name}_se"] for log in logs])
                found[f"{name}, G = {G}"] = {
                    "normal": float((error <= 1.96 * se).mean()),
                    "t": float((error <= student.ppf(0.975, G - 1) * se).mean()),
                    "se over sd": float(se.mean() / np.std([log[name] for log in logs])),
                }
            naive = np.array([log["sd_experts"] / log["rows"] ** 0.5 for log in logs])
            error = np.array([abs(log["mean_experts"] - truth["mean_experts"]) for log in logs])
            found[f"mean_experts, G = {G}"]["independent"] = float((error <= 1.96 * naive).mean())
    print(json.dumps({"logs": asked.logs, "length": asked.length, "coverage": found}))


if __name__ == "__main__":
    main()
