"""What only a GPU shows of compiled models: CUDA graphs, which run no Python at all."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import OlmoeConfig, OlmoeForCausalLM, StaticCache

from bhlog.capture.contract.rule import decide
from bhlog.capture.observe import observe, route
from tests.capture.tiny import past
from tests.synthetic import normal_kde

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYERS, E, B, STEPS = 3, 64, 4, 40
KDE = normal_kde(range(LAYERS))


@pytest.fixture
def model() -> Any:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=500,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = OlmoeForCausalLM(config).eval().to("cuda", torch.bfloat16)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.2)
    yield model
    torch._dynamo.reset()


def table(run: Path, folder: str = "routing") -> Any:
    order = ["layer"] * (folder == "routing") + ["forward", "sequence", "position"]
    found = pq.read_table(sorted((run / folder).iterdir())[0])
    return found.sort_by([(name, "ascending") for name in order])


def decode(model: Any, called: Any, logits: list[Any]) -> None:
    """A prompt and STEPS tokens; keeps the router logits that each step answers."""
    torch.manual_seed(1)
    ids = torch.randint(1, 500, (B, 7), device="cuda")
    cache = StaticCache(model.config, max_cache_len=64)
    model(ids, use_cache=True, **past(cache))
    for _ in range(STEPS):
        token = torch.randint(1, 500, (B, 1), device="cuda")
        output = called(token, use_cache=True, output_router_logits=True, **past(cache))
        logits.append(torch.stack([layer.view(B, E) for layer in output.router_logits]).float())


@pytest.mark.parametrize("kind", ["observe", "route"])
@torch.no_grad()
def test_a_cuda_graph_logs_what_it_computes(model, tmp_path: Path, kind: str):
    def how(run: Path) -> Any:
        if kind == "observe":
            return observe(model, run)
        return route(model, run, alpha=0.3, kde=KDE, max_k=12)

    with how(tmp_path / "eager"):
        decode(model, model, [])
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    used: list[Any] = []
    with how(tmp_path / "graph"):
        decode(model, compiled, used)
    assert not counters["inductor"]["cudagraph_skips"] and not counters["graph_break"]
    eager, graph = table(tmp_path / "eager"), table(tmp_path / "graph")
    assert graph.num_rows == LAYERS * B * (7 + STEPS)
    for name in ("layer", "sequence", "position", "token_id", "phase", "forward"):
        assert graph[name].equals(eager[name]), name
    decoded = graph.filter(np.array(graph["forward"]) > 0)
    logits = np.array(decoded["logits"].to_pylist(), dtype=np.float32)
    expected = torch.stack(used, dim=1).cpu().numpy().reshape(-1, E)  # layer, step, row
    np.testing.assert_array_equal(logits, expected)
    if kind == "route":
        for layer in range(LAYERS):
            rows = np.array(decoded["layer"]) == layer
            slow = decide(logits[rows], KDE[layer].thresholds(0.3, E), min_k=1, max_k=12)
            mine = decoded.filter(rows)
            assert mine["n_rejected"].to_pylist() == slow.n_rejected.tolist()
            experts = [
                order[:n].tolist() for order, n in zip(slow.order, slow.n_selected, strict=True)
            ]
            assert mine["experts"].to_pylist() == experts
    losses = [np.array(table(tmp_path / run, "tokens")["nll"].to_pylist()[B * 7 :], dtype=float)
              for run in ("eager", "graph")]  # fmt: skip
    np.testing.assert_allclose(losses[1], losses[0], atol=0.1)


@torch.no_grad()
def test_generate_with_a_static_cache_compiles_what_it_logs(model, tmp_path: Path):
    ids = torch.randint(1, 500, (B, 7), device="cuda")
    options = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": "static"}
    with observe(model, tmp_path / "run"):
        model.generate(ids, **options)
    assert counters["stats"]["unique_graphs"] >= 1
    assert table(tmp_path / "run", "tokens").num_rows == B * (7 + 19)
