"""What capturing costs on a GPU: full logging to disk against no logging, in prefill and decode.

    python -m tests.bench.capture [--out DIR]

An OLMoE of the real shape (16 layers, 64 experts, hidden 2048, 6.9 B parameters, bfloat16) with
random weights, built on the device. Beside it the baseline of older tools: hooks that copy logits,
ids and weights with a synchronous .cpu(). Modes take turns, the order
turned each round; a ratio is the median over rounds of the time beside that of "off" in the same
round. `sustained` is one long run with the default queue, the time to close it included. Prints one
JSON line.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from bhlog.capture.observe import observe, route
from bhlog.capture.routers.family import find_routers
from bhlog.capture.writing.writer import WriterOptions
from tests.synthetic import normal_kde


def build(device: str, layers: int) -> Any:
    config = OlmoeConfig(intermediate_size=1024, num_hidden_layers=layers)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = OlmoeForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    for router in find_routers(model):
        # logits of the spread that trained routers have
        torch.nn.init.normal_(router.module.weight, std=0.03)
    return model


@contextmanager
def synchronous(model: Any) -> Iterator[None]:
    """Hooks as older tools put them: copy to the host and wait, in every layer."""
    kept: list[Any] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        if len(kept) > 64:
            kept.clear()
        kept.append([tensor.float().cpu().numpy() for tensor in output])

    handles = [r.module.register_forward_hook(hook) for r in find_routers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def seconds(work: Callable[[], None], repeats: int) -> float:
    """Wall time a run when `repeats` of them follow one another, the device idle at both ends."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="folder for runs (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=5, help="of prefills; decoding has 5 times")
    parser.add_argument("--forwards", type=int, default=4, help="prefills a round and mode")
    parser.add_argument("--sustained", type=int, default=160, help="prefills in one run to its end")
    parser.add_argument("--steps", type=int, default=32, help="decoded tokens a round and mode")
    parser.add_argument("--layers", type=int, default=16)
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    model = build("cuda", args.layers)
    ids = torch.randint(0, 50000, (8, 2048), device="cuda")
    prompt = ids[:, :128]
    kde = normal_kde(range(args.layers))
    options = WriterOptions(queue_bytes=1 << 31)
    number = iter(range(10_000))

    def prefill() -> None:
        model(ids, use_cache=False)

    def decode() -> None:
        model.generate(
            prompt, max_new_tokens=args.steps, min_new_tokens=args.steps, do_sample=False
        )

    modes: dict[str, Callable[[], Any]] = {
        "off": nullcontext,
        "observe": lambda: observe(model, out / f"run{next(number)}", options=options),
        "route": lambda: route(
            model, out / f"run{next(number)}", alpha=0.3, kde=kde, max_k=8, options=options
        ),
        "route_unlogged": lambda: route(model, alpha=0.3, kde=kde, max_k=8),
        "synchronous": lambda: synchronous(model),
    }
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    for name, work, repeats, rounds in (
        ("prefill", prefill, args.forwards, args.rounds),
        ("decode", decode, 1, 5 * args.rounds),
    ):
        taken: dict[str, list[float]] = {mode: [] for mode in modes}
        closing: list[float] = []
        for number_of_round in range(-1, rounds):  # the first warms up
            for mode in list(modes) if number_of_round % 2 else list(reversed(modes)):
                context = modes[mode]()
                context.__enter__()
                took = seconds(work, repeats)
                start = time.perf_counter()
                context.__exit__(None, None, None)
                if number_of_round >= 0:
                    taken[mode].append(took)
                    if mode == "observe":
                        closing.append(time.perf_counter() - start)
        pairs = {mode: np.divide(times, taken["off"]) for mode, times in taken.items()}
        result[name] = {
            "ms": {mode: round(1000 * statistics.median(t), 2) for mode, t in taken.items()},
            "ratio": {mode: round(float(np.median(pair)), 4) for mode, pair in pairs.items()},
            "quartiles": {
                mode: np.quantile(pair, [0.25, 0.75]).round(4).tolist()
                for mode, pair in pairs.items()
            },
            "ratio_of_minima": {
                mode: round(min(times) / min(taken["off"]), 4) for mode, times in taken.items()
            },
            "close_seconds": round(statistics.median(closing), 2),
        }
    start = time.perf_counter()
    with observe(model, out / "sustained"):
        for _ in range(args.sustained):
            prefill()
    whole = (time.perf_counter() - start) / args.sustained
    result["sustained"] = {
        "forwards": args.sustained,
        "ratio": round(whole / seconds(prefill, args.sustained), 4),
        "rows_per_second": round(ids.numel() * args.layers / whole),
    }
    shutil.rmtree(out, ignore_errors=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
