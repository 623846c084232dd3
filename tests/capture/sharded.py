"""A model under one way to use several processes, captured and compared with one process's.

    torchrun --nproc-per-node 2 tests/capture/sharded.py MODE

MODE: dp, fsdp, tp, ep, mismatch; grid with 4 processes; device_map with 1 and two GPUs. NCCL where
there are GPUs, else gloo. It reads logs by pyarrow alone: a machine with GPUs may lack analysis.
"""

import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from transformers import OlmoeForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
from bhlog.capture.contract.errors import InvalidOption, RouterLogError
from bhlog.capture.contract.manifest import Manifest
from bhlog.capture.contract.rule import decide
from bhlog.capture.observe import observe, route
from tests.capture.tiny import EXPERTS, LAYERS, batch, rows_of, tiny_model
from tests.synthetic import normal_kde

ALPHA, MAX_K = 0.3, 6


def main(mode: str) -> None:
    """Capture under a mode, observed and routed, and check the log on rank 0."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    base = Path(os.environ.get("SHARDED_DIR") or tempfile.gettempdir()) / f"sharded-{mode}"
    if rank == 0:
        shutil.rmtree(base, ignore_errors=True)
        tiny_model().save_pretrained(base / "model")
    _barrier()
    model = _spread(mode, base / "model", device)
    if mode == "mismatch":
        _mismatch(model, base / "run", rank)
        return
    same_data = {"tp": world, "ep": world, "grid": 2}.get(mode, 1)
    mine, n_data = rank // same_data, world // same_data
    ids, mask = batch([5, 9, 3], left=True, seed=mine)
    ids, mask = ids.to(device), mask.to(device)
    for kind in ("observe", "route"):
        with torch.no_grad(), _captured(kind, model, base / kind):
            output = model(input_ids=ids, attention_mask=mask).logits.float()
            made = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        _barrier()
        plain = tiny_model().to(device)
        with torch.no_grad(), _captured(kind, plain, None):
            truth = plain(input_ids=ids, attention_mask=mask).logits.float()
        output = output.full_tensor() if hasattr(output, "full_tensor") else output
        error = float(((output.to(device) - truth) * mask[..., None]).abs().max())
        assert error < 2e-3, f"{mode} {kind}: the model's answer is off by {error}"
        if rank == 0:
            _check(base / kind, kind, n_data, made.shape[1] - ids.shape[1])
            print(f"{mode} {kind}: {len(rows_of(base / kind, 'routing'))} rows of {n_data} data "
                  f"ranks, answers within {error:.1e}, {world} x {device.type}, "
                  f"torch {torch.__version__}", flush=True)  # fmt: skip
        _barrier()
    try:  # a run is there: every rank must hear of it, or the others wait in a collective
        with observe(model, base / "observe"):
            raise AssertionError("the run was there before")
    except (RouterLogError, OSError) as refused:
        assert "not empty" in str(refused) or "written here" in str(refused), refused
    _barrier()
    if world > 1:
        dist.destroy_process_group()


def _spread(mode: str, path: Path, device: torch.device) -> Any:
    if mode in ("dp", "fsdp"):
        model = OlmoeForCausalLM.from_pretrained(path).to(device).eval()
        if mode == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        return model
    if mode == "device_map":
        return OlmoeForCausalLM.from_pretrained(path, device_map="balanced").eval()
    if mode in ("ep", "grid"):
        from transformers.distributed import DistributedConfig

        newer = "ep_size" in DistributedConfig.__dataclass_fields__
        spread = {"ep_size": 2} if newer else {"enable_expert_parallel": True}
        if mode == "grid":
            spread = {"fsdp_size": 2}
            if not newer:
                raise SystemExit(f"transformers {transformers.__version__} spreads no model 2 x 2")
        config = DistributedConfig(tp_size=2, **spread)
        return OlmoeForCausalLM.from_pretrained(path, distributed_config=config).eval()
    return OlmoeForCausalLM.from_pretrained(path, tp_plan="auto").eval()


def _captured(kind: str, model: Any, run: Path | None) -> Any:
    if kind == "observe":
        return torch.no_grad() if run is None else observe(model, run)
    return route(model, run, alpha=ALPHA, max_k=MAX_K, kde=normal_kde(range(LAYERS)))


def _mismatch(model: Any, run: Path, rank: int) -> None:
    try:
        with route(model, run, alpha=0.1 + 0.2 * rank, kde=normal_kde(range(LAYERS))):
            raise AssertionError("ranks of a group may not route differently")
    except InvalidOption as error:
        assert "different thresholds" in str(error), error
    print(f"mismatch: rank {rank} refused", flush=True)
    _barrier()
    dist.destroy_process_group()


def _check(run: Path, kind: str, n_data: int, new: int) -> None:
    """Every token of every data rank is there once a layer, with the logits it has alone."""
    rows = rows_of(run, "routing")
    places = Counter((r["rank"], r["sequence"], r["position"], r["layer"]) for r in rows)
    assert max(places.values()) == 1
    manifest = Manifest.from_json((run / "run.json").read_bytes(), str(run))
    assert manifest.ranks == n_data and manifest.closed
    assert {r["rank"] for r in rows} == set(range(n_data))
    tokens = 2 * (5 + 9 + 3) + 3 * (new - 1)
    ends = n_data * LAYERS * tokens
    assert n_data * LAYERS * 2 * 17 <= len(rows) <= ends, (len(rows), ends)
    if kind == "observe":
        return
    logits = np.array([r["logits"] for r in rows], dtype=np.float32)
    layers, kde = np.array([r["layer"] for r in rows]), normal_kde(range(LAYERS))
    for layer in range(LAYERS):
        at = np.flatnonzero(layers == layer)
        again = decide(logits[at], kde[layer].thresholds(ALPHA, EXPERTS), min_k=1, max_k=MAX_K)
        for i, row in enumerate(at):
            n = int(again.n_selected[i])
            assert rows[row]["n_selected"] == n
            assert rows[row]["experts"] == again.order[i, :n].tolist()


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
