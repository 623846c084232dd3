"""What only a GPU shows: copies on a side stream, the fused loss, the rule in torch on CUDA."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from bhlog.capture.contract.named import Bh
from bhlog.capture.contract.null.model import KdeModel, LayerNull
from bhlog.capture.contract.rule import (
    decide,
    decide_by_expert,
    decide_by_p_value,
    empirical_p_values,
)
from bhlog.capture.kernels.loading import kernels
from bhlog.capture.observe import observe, route
from bhlog.capture.routers.routing import TorchNull, Weighing, finite_keys, select, weigh
from bhlog.capture.tokens.cross_entropy import cross_entropy
from tests.synthetic import normal_null

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYERS, E = 3, 64


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=500,
        eos_token_id=None,
    )
    model = OlmoeForCausalLM(config).eval().to("cuda", torch.bfloat16)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.2)
    return model


def read(run: Path, folder: str = "routing") -> list[dict[str, Any]]:
    """Rows of a run, by layer, sequence and position."""
    rows = [r for f in sorted((run / folder).iterdir()) for r in pq.read_table(f).to_pylist()]
    return sorted(rows, key=lambda r: (r.get("layer", 0), r["sequence"], r["position"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [2, 50, 4096, 50304])
def test_the_loss_kernel_is_exact_to_float32(dtype, columns):
    assert kernels() is not None
    logits = (8 * torch.randn(300, columns, device="cuda")).to(dtype)
    logits[0] = -torch.inf
    logits[0, 1] = 3.0
    targets = torch.randint(0, columns, (300,), device="cuda")
    targets[0] = 1
    truth = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    found = cross_entropy(logits, targets)
    torch.testing.assert_close(found.double(), truth, rtol=2e-6, atol=4e-6)


WEIGHINGS = (
    Weighing(False),
    Weighing(True, eps=1e-20, scale=2.5),
    Weighing(True, over_chosen=True),
    Weighing(True, floor=0.5),
)


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_experts", [2, 8, 60, 64, 128, 256, 512])
def test_the_kernel_selects_as_the_torch_code_bit_for_bit(dtype, n_experts, in_graph):
    """Weights are within 4e-6 of float64, beside the rounding to the router's dtype."""
    found = kernels()
    assert found is not None
    rows = found.select_rows_in_graph if in_graph else found.select_rows
    torch.manual_seed(n_experts)
    logits = torch.randn(2000, n_experts, device="cuda").to(dtype)  # 16-bit logits tie often
    logits[:4] = torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [0.0]])
    logits[4:200][torch.rand(196, n_experts, device="cuda") < 0.3] = torch.nan
    keys = finite_keys(logits)
    wide = keys.double()
    own_weights, own = keys.softmax(dim=-1).nan_to_num(nan=0.0).topk(min(8, n_experts), dim=-1)
    own_weights = own_weights.to(dtype)
    null = TorchNull(normal_null(0, mean=0.0, sd=1.0), Bh(0.3), n_experts)
    ranked = null.order(keys)
    bounds = ((1, own.shape[1]), (0, n_experts), (2, min(16, n_experts)))
    for number, weighing in enumerate(WEIGHINGS):
        for sigmoid in (False, True) if not weighing.over_chosen else (False,):
            min_k, max_k = bounds[number % 3]
            skip, temperature = min_k == 1, (1.0, 1.7)[number % 2]
            experts, weights, n_selected, n_rejected = rows(
                logits, null.thresholds(keys.device), own, own_weights, min_k, max_k, skip,
                sigmoid, temperature, weighing.renormalize, weighing.over_chosen, weighing.eps,
                weighing.floor, weighing.scale,
            )  # fmt: skip
            scores = wide / temperature
            if sigmoid:
                scores = scores.sigmoid()
            elif not weighing.over_chosen:
                scores = scores.softmax(dim=-1).nan_to_num(nan=0.0)
            slow = select(
                keys, *ranked, scores, own, own_weights, min_k=min_k, max_k=max_k, skip=skip
            )
            slow = weigh(slow, weighing)
            assert torch.equal(experts, slow.experts)
            assert torch.equal(n_selected.long(), slow.n_selected)
            assert torch.equal(n_rejected.long(), slow.n_rejected)
            rounding = torch.finfo(dtype).eps / 2
            torch.testing.assert_close(
                weights.double(), slow.weights.double(), rtol=4e-6 + rounding, atol=1e-7
            )


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_experts", [2, 8, 60, 64, 256])
def test_the_kernel_centres_as_the_torch_code_bit_for_bit(dtype, n_experts, in_graph):
    found = kernels()
    assert found is not None
    rows = found.select_rows_in_graph if in_graph else found.select_rows
    torch.manual_seed(n_experts)
    shift = torch.randn(2000, 1, device="cuda") * 3
    logits = (torch.randn(2000, n_experts, device="cuda") + shift).to(dtype)
    logits[:4] = torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [0.0]])
    logits[4, 0], logits[4, 1:] = 3e38, -3e38
    logits[5:200][torch.rand(195, n_experts, device="cuda") < 0.3] = torch.nan
    keys = finite_keys(logits)
    own_weights, own = keys.softmax(dim=-1).nan_to_num(nan=0.0).topk(min(8, n_experts), dim=-1)
    (curve,) = normal_null(0, mean=0.0, sd=1.0).curves
    null = TorchNull(LayerNull(0, (replace(curve, centre="median"),)), Bh(0.3), n_experts)
    order, n_rejected = null.order(keys)
    experts, _, _, rejected = rows(
        logits, null.thresholds(keys.device), own, own_weights.to(dtype), 0, n_experts, False,
        False, 1.0, False, False, 0.0, 0.0, 1.0, True,
    )  # fmt: skip
    decided = keys.isfinite().any(dim=-1)
    assert torch.equal(rejected.long()[decided], n_rejected[decided])
    assert torch.equal(experts[decided].long(), order[decided][:, : experts.shape[1]])


@torch.inference_mode()
def test_observing_many_forwards_changes_and_loses_nothing(model, tmp_path: Path):
    inputs = [torch.randint(2, 500, (4, 5 + i % 3), device="cuda") for i in range(60)]
    gates: list[Any] = []
    before = [model(ids).logits for ids in inputs]
    with observe(model, tmp_path / "run"):
        handles = [
            layer.mlp.gate.register_forward_hook(lambda m, a, out: gates.append(out[0].cpu()))
            for layer in model.model.layers
        ]
        during = [model(ids).logits for ids in inputs]
        for handle in handles:
            handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    truth = {}
    for number, ids in enumerate(inputs):
        for layer in range(LAYERS):
            logits = gates[number * LAYERS + layer].view(4, -1, E).float()
            for row in range(4):
                for position, token in enumerate(ids[row].tolist()):
                    key = (layer, 4 * number + row, position)
                    truth[key] = (token, logits[row, position].tolist())
    rows = read(tmp_path / "run")
    assert len(rows) == len(truth)
    for row in rows:
        token, logits = truth[row["layer"], row["sequence"], row["position"]]
        assert row["token_id"] == token and row["logits"] == logits
    for row in read(tmp_path / "run", "tokens"):
        number, position = divmod(row["sequence"], 4)[0], row["position"]
        if position:
            logits = before[number][row["sequence"] % 4, position - 1].double()
            loss = torch.logsumexp(logits, 0) - logits[row["token_id"]]
            assert row["nll"] == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.parametrize("kind", ["pooled", "expert", "empirical"])
@torch.inference_mode()
def test_decisions_on_the_device_are_those_of_the_rule_in_numpy(model, tmp_path: Path, kind: str):
    alpha, min_k, max_k, run = 0.3, 1, 20, tmp_path / "run"
    nulls = {layer: normal_null(layer, mean=0.0, sd=1.0) for layer in range(LAYERS)}
    if kind == "expert":
        nulls = {
            layer: LayerNull(layer, tuple(replace(null.curves[0], expert=i) for i in range(E)))
            for layer, null in nulls.items()
        }
    kde = None if kind == "empirical" else KdeModel(nulls)
    p_values = "empirical" if kind == "empirical" else "kde"
    ids = torch.randint(0, 500, (4, 50), device="cuda")
    with route(model, run, alpha=alpha, kde=kde, p_values=p_values, min_k=min_k, max_k=max_k):
        model(ids)
    rows = read(run)
    seen = set()
    for layer in range(LAYERS):
        mine = [row for row in rows if row["layer"] == layer]
        logits = np.array([row["logits"] for row in mine], dtype=np.float32)
        bounds = {"min_k": min_k, "max_k": max_k}
        if kind == "pooled":
            slow = decide(logits, nulls[layer].thresholds(alpha, E), **bounds)
        elif kind == "expert":
            p = nulls[layer].p_value(logits)
            slow = decide_by_expert(logits, nulls[layer].thresholds(alpha, E), p, **bounds)
        else:
            p = empirical_p_values(logits)
            slow = decide_by_p_value(logits, p, alpha=alpha, **bounds)
        assert [row["n_rejected"] for row in mine] == slow.n_rejected.tolist()
        assert [row["n_selected"] for row in mine] == slow.n_selected.tolist()
        for row, order, n in zip(mine, slow.order, slow.n_selected, strict=True):
            assert row["experts"] == order[:n].tolist()
        seen.update(slow.n_selected.tolist())
    assert len(seen) > 3
