"""A model's pace while its run goes to a folder, and to an S3 server on this machine.

    python -m tests.bench.store --rounds 7

Prints one JSON line. The model is a loop of matrix products in one thread; modes take turns: a
folder, a store, and a store that answers each request 50 ms late. `loop` is the time of products
and submits, `submit` of the submits alone, which is what the model waits; `cpu` is the processor
time of this process, close included, without the server's.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bhlog.analysis.run import open_log
from bhlog.capture.contract.manifest import ModelInfo, Routing
from bhlog.capture.writing.stage import Staged
from bhlog.capture.writing.writer import Block, RunWriter, WriterOptions
from tests.bench.writer import EXPERTS, LAYERS, TOKENS, TOP_K, make_block
from tests.object_store import ObjectStore


def serve(pipe: Connection) -> None:
    """The server, in a process of its own; takes the delay of its answers."""
    server = ObjectStore("bench")
    pipe.send(server.environment)
    with suppress(EOFError):  # the bench has ended
        while True:
            server.delay = pipe.recv()
            pipe.send(None)


def run(blocks: list[Block], where: str | Path, staging: str, products: int) -> dict[str, float]:
    """Seconds of the loop, of its submits, to close, and of the processor."""
    info = ModelInfo("bench", "Bench", None, tuple(range(LAYERS)), EXPERTS, TOP_K, False)
    matrix = torch.rand(512, 512)
    options = WriterOptions(staging=staging, shard_rows=1 << 16)  # several uploads in few rows
    cpu = time.process_time()
    writer = RunWriter(where, info, Routing(), options=options)
    began, submitting = time.perf_counter(), 0.0
    for block in blocks:
        for _ in range(products):
            matrix @ matrix
        staged = Staged(dict(block.staged.tensors), block.staged.n_bytes)
        at = time.perf_counter()
        writer.submit(replace(block, staged=staged))
        submitting += time.perf_counter() - at
    looped = time.perf_counter()
    writer.close()
    return {
        "loop": looped - began,
        "submit": submitting,
        "close": time.perf_counter() - looped,
        "cpu": time.process_time() - cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--products", type=int, default=60, help="of matrices, a forward")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe, theirs = multiprocessing.Pipe()
    multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True).start()
    os.environ.update(pipe.recv())
    rng = np.random.default_rng(0)
    n_blocks = max(1, args.rows // (LAYERS * TOKENS))
    few = [make_block(rng, number, None) for number in range(min(8, n_blocks))]
    blocks = [few[i % len(few)] for i in range(n_blocks)]
    times: dict[str, list[dict[str, float]]] = {"folder": [], "store": [], "late": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for mode, found in times.items():
                pipe.send(0.05 if mode == "late" else 0.0)
                pipe.recv()
                where = f"{folder}/{number}" if mode == "folder" else f"s3://bench/{mode}{number}"
                found.append(run(blocks, where, f"{folder}/staging", args.products))
        n_bytes = sum(shard.bytes for shard in open_log(f"{folder}/0").manifest.shards)
    rows = n_blocks * LAYERS * TOKENS
    line: dict[str, Any] = {
        "bench": "store",
        "rows": rows,
        "megabytes": round(n_bytes / 1e6),
        "rows_per_second": round(rows / statistics.median(t["loop"] for t in times["folder"])),
    }
    for mode, found in times.items():
        ratios = [a["loop"] / b["loop"] for a, b in zip(found, times["folder"], strict=True)]
        line[mode] = {
            "loop_beside_folder": [round(r, 3) for r in statistics.quantiles(ratios, n=4)],
            **{k: round(statistics.median(t[k] for t in found), 3) for k in found[0]},
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
