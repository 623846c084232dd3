"""Peak memory of a capture against its length: ten times the tokens, the same memory.

    python -m tests.bench.capture_memory [--tokens N]

Each length runs in a process of its own, which reports its peak resident size. Prints one JSON
line.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

LENGTHS = (1, 10)  # times --tokens


def capture(folder: Path, tokens: int) -> None:
    """Log a random small model reading and writing; print the peak resident size in MiB."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from bhlog.capture.observe import observe
    from bhlog.capture.writing.writer import WriterOptions

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = OlmoeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = OlmoeForCausalLM(config).eval()
    options = WriterOptions(shard_rows=1 << 15, queue_bytes=1 << 24)
    with torch.no_grad(), observe(model, folder / "run", options=options):
        done, step = 0, 0
        while done < tokens:
            step += 1
            ids = torch.randint(1, 512, (4, 256))
            mask = torch.ones_like(ids)
            mask[1, :100] = 0
            model(ids, attention_mask=mask)
            done += int(mask.sum())
            if step % 8 == 0:
                output = model.generate(ids[:, :16], max_new_tokens=32, do_sample=False)
                done += output.numel() - 4
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=20_000, help="of the short capture")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        capture(args.child, args.tokens)
        return
    peak = {}
    for times in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-m", "tests.bench.capture_memory", "--child", folder,
                 "--tokens", str(times * args.tokens)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            peak[times] = float(done.stdout.split()[-1])
    short, long = peak[LENGTHS[0]], peak[LENGTHS[1]]
    print(
        json.dumps(
            {
                "bench": "capture_memory",
                "tokens": args.tokens,
                "peak_mib": round(short),
                "peak_mib_10_times": round(long),
                "ratio": round(long / short, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
