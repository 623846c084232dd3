"""Traces of other engines: small ones, importing them, and a plain reading of each."""

import base64
import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bhlog.analysis.engines.formats import read_trace
from bhlog.analysis.engines.trace import Told
from bhlog.analysis.engines.writing import write_trace
from bhlog.analysis.run import open_log

E, K, LAYERS = 8, 2, (1, 3)
PATHS = {
    "route-trace": "traces/route.csv",
    "megatron": "traces/megatron",
    "numpy": "traces/numpy",
    "vllm": "traces/vllm.jsonl",
    "sglang": "traces/sglang.jsonl",
}
TOLD = {
    "route-trace": Told(),
    "megatron": Told(),
    "numpy": Told(top_k=K),
    "vllm": Told(LAYERS, E),
    "sglang": Told(LAYERS, E, K),
}
COLUMNS = ("layer", "sequence", "position", "experts")

Row = tuple[Any, ...]


def make_traces(root: Path) -> None:
    """A trace of each format."""
    rng = np.random.default_rng(0)
    for folder in ("megatron", "numpy"):
        (root / "traces" / folder).mkdir(parents=True)
    _make_route_trace(rng, root / PATHS["route-trace"])
    _make_megatron(rng, root / PATHS["megatron"])
    for layer, dtype in zip(LAYERS, ("<f2", "<f8"), strict=True):
        path = root / PATHS["numpy"] / f"router_logits_L{layer}.npy"
        np.save(path, rng.normal(size=(6, E)).astype(dtype))
    vllm, sglang = [], []
    for prompt, answer in ((3, 2), (1, 4), (2, 1)):
        experts = _ids(rng, prompt + answer - 1, len(LAYERS))
        saved = io.BytesIO()
        marked = experts.astype(np.int16)
        marked[0] = -1 if prompt > 1 else marked[0]
        np.save(saved, marked)
        text = base64.b64encode(saved.getvalue()).decode()
        usage = {"prompt_tokens": prompt, "completion_tokens": answer}
        vllm.append({"model": "m", "prompt_token_ids": [*range(prompt)], "usage": usage,
                     "choices": [{"token_ids": [7] * answer, "routed_experts": text}]})  # fmt: skip
        raw = base64.b64encode(experts.astype("<i4").tobytes()).decode()
        sglang.append({"text": "x", "meta_info": usage | {"routed_experts": raw}})
    for name, answers in (("vllm", vllm), ("sglang", sglang)):
        (root / PATHS[name]).write_text("".join(json.dumps(one) + "\n" for one in answers))


def _ids(rng: np.random.Generator, T: int, L: int) -> Any:
    return np.argsort(rng.random((T, L, E)), axis=2)[..., :K]


def _make_route_trace(rng: np.random.Generator, path: Path) -> None:
    lines = ["# route_trace v1", f"# model=m arch=a n_layer=4 n_expert={E} n_expert_used={K}"]
    lines += [f"# layer={layer} expert_bytes={100 + layer} dense_bytes=1" for layer in LAYERS]
    lines.append("turn,phase,step,layer,slot,expert,weight,residency,expert_bytes")
    for steps in ((0, 1, 2), (3,), (4,)):
        ids = _ids(rng, len(steps), len(LAYERS))
        for i, layer in enumerate(LAYERS):
            for t, step in enumerate(steps):
                if len(steps) == 1 or i == 0 or t == 2:
                    lines += [f"0,{int(len(steps) == 1)},{step},{layer},{slot},{ids[t, i, slot]},"
                              f"{0.75 - slot / 2},0,5" for slot in range(K)]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")


def _make_megatron(rng: np.random.Generator, folder: Path) -> None:
    lines, data = [], b""
    for step, T in enumerate((3, 1)):
        for layer in LAYERS:
            bits = rng.integers(0x3E00, 0x4040, (T, E)).astype("<u2")
            top = np.argsort(-_widened(bits), axis=1, kind="stable")[:, :K]
            lines.append({"step": step, "stage": "pre_dispatch", "block": "decoder",
                          "layer": layer, "rank": 0, "num_tokens": T, "topk": K,
                          "top_indices": np.sort(top).tolist(), "logit_offset": len(data),
                          "logit_bytes": bits.nbytes, "logit_shape": [T, E]})  # fmt: skip
            data += bits.tobytes()
    (folder / "router_trace_rank0.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "logits_rank0.bin").write_bytes(data)


def _widened(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def imported(format: str) -> Callable[[Path], Any]:
    """Rows of the run that a trace becomes, which verify must find whole."""

    def bring(root: Path) -> Any:
        from tests.fuzz.readers import Missed

        out = root / "imported"
        try:
            write_trace(read_trace(format, root / PATHS[format], TOLD[format]), out)
        finally:
            beside = [path.name for path in root.iterdir() if path.name.startswith("imported.")]
            if beside:
                raise Missed(f"left {beside}")
        log = open_log(out)
        bad = [row for row in log.verify().rows() if row[1] == "error"]
        if bad:
            raise Missed(f"verify finds {bad}")
        columns = (*COLUMNS, "logits") if log.has_logits else (*COLUMNS, "weights")
        read = (log.read(group, columns).to_pylist() for group in log.row_groups())
        found = [tuple(row[name] for name in columns) for part in read for row in part]
        shutil.rmtree(out)
        return sorted(found, key=lambda row: row[:4])

    return bring


def plain_route_trace(root: Path) -> Any:
    lines = [l.strip() for l in (root / PATHS["route-trace"]).read_bytes().decode(errors="replace")
             .split("\n") if l.strip()]  # fmt: skip
    start = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    names = lines[start].split(",")
    cells = [dict(zip(names, line.split(","), strict=True)) for line in lines[start + 1 :]]
    forward, before, rows = 0, None, {}
    for cell in cells:
        turn, phase, step, layer = (int(cell[n]) for n in ("turn", "phase", "step", "layer"))
        here = (turn, phase, step if phase else 0)
        forward += before is not None and (here != before[0] or layer < before[1])
        before = here, layer
        row = rows.setdefault((layer, turn, step, forward, phase), {})
        weight = float(np.float32(float(cell["weight"])))
        row[int(cell["slot"])] = int(cell["expert"]), weight
    last = max(layer for layer, *_ in rows)
    for layer, turn, step, number, phase in [*rows]:
        if not phase and layer != last:
            rows.setdefault((last, turn, step, number, phase), {})
    return sorted(
        (
            (layer, turn, step, [e for _, (e, _) in sorted(row.items())],
             [1 / len(row) if w != w else w for _, (_, w) in sorted(row.items())])
            for (layer, turn, step, _, _), row in rows.items()
        ),
        key=lambda row: row[:4],
    )  # fmt: skip


def plain_megatron(root: Path) -> Any:
    folder = root / PATHS["megatron"]
    data, rows, number, seen, step = (folder / "logits_rank0.bin").read_bytes(), [], -1, set(), None
    text = (folder / "router_trace_rank0.jsonl").read_bytes().decode(errors="replace")
    for line in filter(str.strip, text.split("\n")):
        record = json.loads(line)
        if record.get("block", "decoder") != "decoder":
            continue
        layer = int(record["layer"])
        if layer in seen or record["step"] != step:
            number, seen, step = number + 1, set(), record["step"]
        seen.add(layer)
        for t, top in enumerate(record["top_indices"]):
            at = int(record["logit_offset"]) + t * 2 * E
            bits = struct.unpack_from(f"<{E}H", data, at)
            logits = _widened(np.array(bits, dtype="<u2")).tolist()
            keys = [-x if np.isfinite(x) else np.inf for x in logits]
            experts = sorted(map(int, top), key=lambda e: (keys[e], e))
            rows.append((layer, number, t, experts, logits))
    return sorted(rows, key=lambda row: row[:4])


def plain_numpy(root: Path) -> Any:
    rows = []
    for path in sorted((root / PATHS["numpy"]).glob("router_logits_L*.npy")):
        with np.errstate(all="ignore"):
            logits = np.load(path, allow_pickle=False).astype(np.float32)
        for t, row in enumerate(logits.tolist()):
            keys = [-x if np.isfinite(x) else np.inf for x in row]
            experts = sorted(range(len(row)), key=lambda e: (keys[e], e))[:K]
            rows.append((int(path.stem.rpartition("L")[2]), 0, t, experts, row))
    return sorted(rows, key=lambda row: row[:4])


def _answers(path: Path) -> Iterator[Any]:
    for line in filter(str.strip, path.read_bytes().decode(errors="replace").split("\n")):
        found = json.loads(line)
        yield from found if isinstance(found, list) else [found]


def _of_texts(texts: Iterator[tuple[Any, int]]) -> Any:
    rows = []
    for number, (experts, start) in enumerate(texts):
        layers = LAYERS if experts.shape[1] != len(LAYERS) else range(len(LAYERS))
        for t, token in enumerate(experts.tolist()):
            if any(e != -1 for at_layer in token for e in at_layer):
                for layer, i in zip(LAYERS, layers, strict=True):
                    k = len(token[i])
                    rows.append((layer, number, start + t, token[i], [1 / k] * k))
    return sorted(rows, key=lambda row: row[:4])


def plain_vllm(root: Path) -> Any:
    def texts() -> Iterator[tuple[Any, int]]:
        for answer in _answers(root / PATHS["vllm"]):
            for choice in answer.get("choices") or answer.get("outputs") or [answer]:
                parts = [answer.get("prompt_routed_experts"), choice.get("routed_experts")]
                data = [io.BytesIO(base64.b64decode(part)) for part in parts if part is not None]
                arrays = [np.load(one, allow_pickle=False) for one in data]
                if arrays:
                    start = choice.get("routed_experts_prompt_start") or 0
                    yield np.concatenate(arrays), int(start)

    return _of_texts(texts())


def plain_sglang(root: Path) -> Any:
    def texts() -> Iterator[tuple[Any, int]]:
        for answer in _answers(root / PATHS["sglang"]):
            for choice in answer.get("choices") or [answer]:
                about = choice.get("meta_info") or answer.get("meta_info") or {}
                text = about.get("routed_experts")
                text = (choice.get("sgl_ext") or {}).get("routed_experts") if text is None else text
                if text is None:
                    continue
                start = int(about.get("routed_experts_start_len") or 0)
                counts = about if about.get("prompt_tokens") else answer.get("usage") or about
                values = np.frombuffer(base64.b64decode(text), "<i4")
                prompt = int(counts.get("prompt_tokens") or 0)
                rows = prompt + int(counts.get("completion_tokens") or 0) - 1 - start
                yield values.reshape(rows if prompt else -1, len(LAYERS) if not prompt else
                                     len(values) // (K * rows), K), start  # fmt: skip

    return _of_texts(texts())


PLAIN = {
    "route-trace": plain_route_trace,
    "megatron": plain_megatron,
    "numpy": plain_numpy,
    "vllm": plain_vllm,
    "sglang": plain_sglang,
}
