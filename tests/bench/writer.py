"""Rows per second and bytes per row of the run writer, against JSON lines of the same content.

    python -m tests.bench.writer --cdfs CDFS.npz --rows 4000000

Prints one JSON line. `rows_per_cpu_second` is what one thread does if nothing waits: rows over the
processor time of the whole process, gathering included.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bhlog.analysis.run import open_log
from bhlog.capture.contract.manifest import ModelInfo, Routing
from bhlog.capture.writing.buffer import Texts
from bhlog.capture.writing.stage import Staged
from bhlog.capture.writing.writer import Block, RunWriter, WriterOptions
from tests.synthetic import normal_logits, real_logits

LAYERS, EXPERTS, TOP_K, TOKENS = 16, 64, 8, 2048  # of OLMoE-1B-7B; tokens per forward
VOCABULARY = 50304


def make_block(
    rng: np.random.Generator, number: int, cdfs: dict[str, NDArray[Any]] | None
) -> Block:
    """A forward's rows as the recorder hands them over: bfloat16 logits and weights."""
    if cdfs is None:
        logits = [normal_logits(rng, TOKENS, EXPERTS) for _ in range(LAYERS)]
    else:
        logits = [
            real_logits(
                rng,
                TOKENS,
                EXPERTS,
                x0=float(cdfs["x0"][layer]),
                dx=float(cdfs["dx"][layer]),
                cdf=cdfs["cdf"][layer],
            )
            for layer in range(LAYERS)
        ]
    stacked = torch.from_numpy(np.stack(logits))
    weights, experts = stacked.softmax(dim=-1).topk(TOP_K, dim=-1)
    tensors = {
        "logits": stacked.bfloat16(),
        "experts": experts.to(torch.int16),
        "weights": weights.bfloat16(),
        "position": torch.arange(TOKENS) % 512,
        "keep": torch.ones(TOKENS, dtype=torch.bool),
        # words of a text are Zipfian
        "token_id": torch.from_numpy(rng.zipf(1.3, TOKENS) % VOCABULARY),
        "nll": torch.rand(TOKENS),
    }
    assert torch.equal(tensors["logits"].float(), stacked)
    return Block(
        staged=Staged(tensors, sum(t.numel() * t.element_size() for t in tensors.values())),
        layers=tuple(range(LAYERS)),
        sequence=(number * 4 + np.arange(TOKENS) // 512).astype(np.uint32),
        forward=np.full(TOKENS, number, dtype=np.uint32),
        phase=np.zeros(TOKENS, dtype=np.int8),
        texts={"source": Texts(np.zeros(TOKENS, dtype=np.int32), ("text",))},
    )


def write(blocks: list[Block], folder: Path, options: WriterOptions) -> tuple[float, float]:
    """Wall and processor seconds to log the blocks."""
    info = ModelInfo("bench", "Bench", None, tuple(range(LAYERS)), EXPERTS, TOP_K, False)
    wall, cpu = time.perf_counter(), time.process_time()
    writer = RunWriter(folder, info, Routing(), options=options)
    for block in blocks:
        # the same tensors go in many times; release() would let them go
        staged = Staged(dict(block.staged.tensors), block.staged.n_bytes)
        writer.submit(replace(block, staged=staged))
    writer.close()
    return time.perf_counter() - wall, time.process_time() - cpu


def write_json(block: Block, path: Path) -> tuple[float, int]:
    """Processor seconds and bytes of one block's rows as JSON lines."""
    tensors = block.staged.tensors
    cpu = time.process_time()
    with path.open("w") as file:
        position, token_id = tensors["position"].tolist(), tensors["token_id"].tolist()
        for layer in block.layers:
            logits = tensors["logits"][layer].float().tolist()
            experts, weights = (
                tensors["experts"][layer].tolist(),
                tensors["weights"][layer].tolist(),
            )
            for row in range(TOKENS):
                record = {
                    "layer": layer,
                    "sequence": int(block.sequence[row]),
                    "position": position[row],
                    "token_id": token_id[row],
                    "phase": "prefill",
                    "forward": int(block.forward[row]),
                    "logits": logits[row],
                    "experts": experts[row],
                    "weights": weights[row],
                    "n_selected": TOP_K,
                    "n_rejected": None,
                    "rank": 0,
                }
                file.write(json.dumps(record) + "\n")
    return time.process_time() - cpu, path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--cdfs", type=Path, help="real marginals of a model's logits, by layer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    args = parser.parse_args()
    cdfs = dict(np.load(args.cdfs)) if args.cdfs else None
    rng = np.random.default_rng(0)
    n_blocks = max(1, args.rows // (LAYERS * TOKENS))
    blocks = [make_block(rng, number, cdfs) for number in range(min(8, n_blocks))]
    blocks = [blocks[i % len(blocks)] for i in range(n_blocks)]
    rows = n_blocks * LAYERS * TOKENS
    times, json_times = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run, lines = Path(folder) / "run", Path(folder) / "rows.jsonl"
        for _ in range(args.repeats):
            shutil.rmtree(run, ignore_errors=True)
            times.append(write(blocks, run, WriterOptions(threads=args.threads)))
            json_times.append(write_json(blocks[0], lines)[0])
        log = open_log(run)
        n_bytes = sum(shard.bytes for shard in log.manifest.shards)
        columns: dict[str, float] = {}
        for name in log.shards:
            metadata = log.open_shard("routing", name).metadata
            for group in range(metadata.num_row_groups):
                for i in range(metadata.num_columns):
                    column = metadata.row_group(group).column(i)
                    top = column.path_in_schema.split(".")[0]
                    columns[top] = columns.get(top, 0) + column.total_compressed_size / rows
        json_bytes = lines.stat().st_size
    wall = statistics.median(t[0] for t in times)
    cpu = statistics.median(t[1] for t in times)
    json_rate = LAYERS * TOKENS / statistics.median(json_times)
    print(
        json.dumps(
            {
                "bench": "writer",
                "rows": rows,
                "threads": args.threads,
                "logits": str(args.cdfs.name) if args.cdfs else "normal",
                "rows_per_second": round(rows / wall),
                "rows_per_cpu_second": round(rows / cpu),
                "bytes_per_row": round(n_bytes / rows, 1),
                "bytes_by_column": {k: round(v, 2) for k, v in columns.items()},
                "json_rows_per_cpu_second": round(json_rate),
                "json_bytes_per_row": round(json_bytes / (LAYERS * TOKENS), 1),
                "times_json_speed": round(rows / cpu / json_rate, 1),
                "share_of_json_bytes": round(n_bytes / rows / (json_bytes / (LAYERS * TOKENS)), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
