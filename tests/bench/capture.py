"""What capturing costs on a GPU: full logging to disk against no logging, in prefill and decode.

    python -m tests.bench.capture [--out DIR]
    python -m tests.bench.capture --experts
    python -m tests.bench.capture --decoding

An OLMoE of the real shape (16 layers, 64 experts, hidden 2048, 6.9 B parameters, bfloat16) with
random weights, built on the device. Beside it the baseline of older tools: hooks that copy logits,
ids and weights with a synchronous .cpu(). Modes take turns, the order
turned each round; a ratio is the median over rounds of the time beside that of "off" in the same
round. `sustained` is one long run with the default queue, the time to close it included. Prints one
JSON line.

With --experts it times prefills by how many experts tokens have: native top-k with transformers'
own experts and with bhlog's, and BH at several alphas. A BH forward stands beside native top-k of
both, and beside bhlog's native at its own mean, interpolated between whole k in the same round.

With --decoding it times one decoded token a step, eager and as CUDA graphs (torch.compile with
mode="reduce-overhead" and a static cache, and generate with one), and what the first step costs.
"""

import argparse
import inspect
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
from transformers import OlmoeConfig, OlmoeForCausalLM, StaticCache

from bhlog.capture.changes import Changes
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.observe import observe, route
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.routers.expert_code import take
from bhlog.capture.routers.search import find_routers
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


@contextmanager
def native(model: Any, top_k: int, *, ours: bool) -> Iterator[None]:
    """A model that takes top_k experts, computed by transformers' code or by bhlog's."""
    routers = find_routers(model)
    before = routers[0].module.top_k
    changes = Changes()
    for router in routers:
        if ours:
            take(router, changes)
        router.module.top_k = top_k
    try:
        yield
    finally:
        for router in routers:
            router.module.top_k = before
        changes.undo()


def mean_experts(model: Any, kde: Any, alpha: float, max_k: int, ids: torch.Tensor) -> float:
    """Experts a token, over all layers."""
    patcher = RouterPatcher(model)
    options = BhOptions(alpha, max_k=max_k)
    patcher.attach(Routing("bh", options), kde, collect_stats=True)
    try:
        model(ids, use_cache=False, logits_to_keep=1)
        return statistics.fmean(stats.mean_experts for stats in patcher.stats.values())
    finally:
        patcher.unpatch()


def alpha_for(model: Any, kde: Any, mean: float, max_k: int, ids: torch.Tensor) -> float:
    """The alpha whose mean is closest, by bisection."""
    low, high = 1e-5, 0.999
    for _ in range(12):
        middle = (low * high) ** 0.5
        if mean_experts(model, kde, middle, max_k, ids) < mean:
            low = middle
        else:
            high = middle
    return high


def experts_table(model: Any, kde: Any, ids: torch.Tensor, *, rounds: int) -> dict[str, Any]:
    """Milliseconds of a prefill by experts a token, in modes that take turns."""
    counts = (1, 2, 4, 8, 16, 32, 40)
    modes: dict[str, Callable[[], Any]] = {
        f"transformers top-{k}": lambda k=k: native(model, k, ours=False) for k in (8, 4, 2, 1)
    }
    modes |= {f"bhlog top-{k}": lambda k=k: native(model, k, ours=True) for k in counts}
    means = {}
    for target, max_k in ((1.1, 8), (2.3, 8), (7.5, 8), (13.0, 16), (33.0, 64)):
        alpha = alpha_for(model, kde, target, max_k, ids)
        name = f"BH {target} of {max_k}"
        means[name] = mean_experts(model, kde, alpha, max_k, ids)
        modes[name] = lambda a=alpha, m=max_k: route(model, alpha=a, kde=kde, max_k=m)
    times: dict[str, list[float]] = {name: [] for name in modes}
    peaks: dict[str, float] = {}
    for number in range(-1, rounds):
        for name in list(modes) if number % 2 else list(reversed(modes)):
            with modes[name]():
                torch.cuda.reset_peak_memory_stats()
                took = seconds(lambda: model(ids, use_cache=False), 3)
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
            if number >= 0:
                times[name].append(took)
    rows = {}
    for name, taken in times.items():
        row: dict[str, Any] = {
            "ms": round(1000 * statistics.median(taken), 2),
            "quartiles": (1000 * np.quantile(taken, [0.25, 0.75])).round(2).tolist(),
            "of_transformers_top_8": _ratio(taken, times["transformers top-8"]),
            "peak_gib": round(peaks[name], 2),
        }
        if name in means:
            row["mean"] = round(means[name], 3)
            beside = [
                float(np.interp(means[name], counts, [times[f"bhlog top-{k}"][i] for k in counts]))
                for i in range(rounds)
            ]
            row["of_bhlog_top_mean"] = _ratio(taken, beside)
        rows[name] = row
    return rows


class Decoding:
    """A batch that decodes one token a step into a static cache, eager or as CUDA graphs."""

    def __init__(self, model: Any, prompt: torch.Tensor, steps: int) -> None:
        self.model, self.prompt, self.steps = model, prompt, steps
        length = prompt.shape[1]
        self.cache = StaticCache(model.config, max_cache_len=length + steps + 8)
        self.takes = (
            "cache"
            if "cache" in inspect.signature(model.forward).parameters
            else ("past_key_values")
        )

    def __call__(self, step: Callable[..., Any]) -> float:
        """Seconds of `steps` tokens after a prompt, by a callable of the model's arguments."""
        self.cache.reset()
        given = {self.takes: self.cache, "use_cache": True}
        token = self.model(self.prompt, logits_to_keep=1, **given).logits[:, -1:].argmax(-1)

        def work() -> None:
            nonlocal token
            for _ in range(self.steps):
                token = step(token, **given).logits[:, -1:].argmax(-1).clone()

        return seconds(work, 1)

    def generate(self) -> float:
        """The same by `generate`, prompt included, which compiles what it decodes by itself."""
        options = {"max_new_tokens": self.steps, "min_new_tokens": self.steps, "do_sample": False}
        return seconds(
            lambda: self.model.generate(self.prompt, cache_implementation="static", **options), 1
        )


def decoding_table(
    model: Any,
    modes: dict[str, Callable[[], Any]],
    prompt: torch.Tensor,
    *,
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    """Milliseconds a step; modes take turns, off first or last.

    Entering a block makes graphs anew, which takes most of a round: eager code has eight times as
    many rounds, and a round of compiled code times more.
    """
    decoding = Decoding(model, prompt, steps)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    works: dict[str, tuple[Callable[[], float], int, int]] = {
        "eager": (lambda: decoding(model), 8 * rounds, 1),
        "compiled": (lambda: decoding(compiled), rounds, 9),
        "generate": (decoding.generate, rounds, 9),
    }
    rows: dict[str, Any] = {}
    for name, (work, turns, times) in works.items():
        taken: dict[str, list[float]] = {mode: [] for mode in modes}
        first: dict[str, list[float]] = {mode: [] for mode in modes}
        for turn in range(turns):
            for mode in list(modes) if turn % 2 else list(reversed(modes)):
                torch._dynamo.reset()
                with modes[mode]():
                    first[mode].append(work())
                    if times > 1:
                        work()
                    taken[mode].append(statistics.median(work() for _ in range(times)) / steps)
        rows[name] = {
            "ms_a_step": {m: round(1000 * statistics.median(t), 3) for m, t in taken.items()},
            "ratio": {m: _ratio(t, taken["off"]) for m, t in taken.items()},
            "ratio_of_minima": {m: round(min(t) / min(taken["off"]), 4) for m, t in taken.items()},
            "first_seconds": {m: round(statistics.median(t), 2) for m, t in first.items()},
        }
        print(json.dumps({name: rows[name]}), flush=True)
    return rows


def _ratio(taken: list[float], beside: list[float]) -> list[float]:
    """Median and quartiles of the ratio in each round."""
    return np.quantile(np.divide(taken, beside), [0.5, 0.25, 0.75]).round(4).tolist()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, help="folder for runs (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=5, help="of prefills; decoding has 5 times")
    parser.add_argument("--forwards", type=int, default=4, help="prefills a round and mode")
    parser.add_argument("--sustained", type=int, default=160, help="prefills in one run to its end")
    parser.add_argument("--steps", type=int, default=32, help="decoded tokens a round and mode")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", action="store_true", help="time prefills by experts a token")
    parser.add_argument("--decoding", action="store_true", help="time eager and compiled steps")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp())
    model = build("cuda", args.layers)
    ids = torch.randint(0, 50000, (8, 2048), device="cuda")
    prompt = ids[:, :128]
    kde = normal_kde(range(args.layers))
    if args.experts:
        table = experts_table(model, kde, ids, rounds=args.rounds)
        print(json.dumps({"device": torch.cuda.get_device_name(), "experts": table}))
        return
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
    if args.decoding:
        del modes["synchronous"]  # no graph holds it
        table = decoding_table(model, modes, ids[:, :8], steps=args.steps, rounds=args.rounds)
        print(json.dumps({"device": torch.cuda.get_device_name(), "decoding": table}))
        return
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
