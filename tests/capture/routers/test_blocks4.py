"""Blocks of transformers 4: observed and routed like the routers of transformers 5."""

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from bhlog.analysis.log import logits_of
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import UnsupportedModel
from bhlog.capture.contract.rule import decide, softmax_weights
from bhlog.capture.observe import observe, route
from bhlog.capture.routers.search import find_routers
from tests.capture.tiny import TRANSFORMERS_4, batch, observed, read, real_tokens
from tests.synthetic import normal_kde

pytestmark = pytest.mark.skipif(
    not TRANSFORMERS_4, reason="for transformers 4: make test-transformers4"
)

E, TOP_K = 8, 2
KDE = normal_kde(range(3))
COLUMNS = ["logits", "experts", "weights", "n_selected", "n_rejected"]
FAMILIES = ["Olmoe", "Mixtral", "Qwen2Moe", "Qwen3Moe"]


@cache
def model_of(name: str) -> Any:
    """A tiny random model; the first layer of those of Qwen has no router."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}Config")
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": E,
        "num_local_experts": E,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": name == "Qwen3Moe",
        "mlp_only_layers": [0],
    }
    known = config_class().to_dict()
    config = config_class(**{key: value for key, value in sizes.items() if key in known})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    return model


def blocks(model: Any) -> dict[int, Any]:
    return {
        number: block
        for number, layer in enumerate(model.model.layers)
        if hasattr(block := getattr(layer, "mlp", None) or layer.block_sparse_moe, "gate")
    }


def normalizes(name: str) -> bool:
    return name in ("Mixtral", "Qwen3Moe")


def slow_block(block: Any, hidden: Tensor, experts: list[list[int]], weights: Any) -> Tensor:
    """What a block answers to (T, H) rows if each row takes these experts, one by one."""
    answers = []
    for row, chosen, its_weights in zip(hidden, experts, weights, strict=True):
        answer = torch.zeros_like(row)
        for expert, weight in zip(chosen, its_weights, strict=False):
            answer += float(weight) * block.experts[expert](row[None])[0]
        if hasattr(block, "shared_expert"):
            share = torch.sigmoid(block.shared_expert_gate(row[None]))
            answer += (share * block.shared_expert(row[None]))[0]
        answers.append(answer)
    return torch.stack(answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_observing_changes_nothing_and_logs_what_the_block_does(name, dtype, tmp_path):
    model = model_of(name).to(dtype)
    try:
        ids, mask = batch([6, 4], left=True)
        seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        gates: dict[int, Tensor] = {}
        handles = []
        for number, block in blocks(model).items():
            handles += [
                block.gate.register_forward_hook(
                    lambda m, args, logits, number=number: gates.update({number: logits})
                ),
                block.register_forward_hook(
                    lambda m, args, out, number=number: seen.update(
                        {number: (args[0].flatten(0, 1), out[0].flatten(0, 1), gates[number])}
                    )
                ),
            ]
        with torch.no_grad():
            before = model(ids, attention_mask=mask).logits
        for handle in handles:
            handle.remove()
        with observed(model, tmp_path / "run"):
            assert torch.equal(model(ids, attention_mask=mask).logits, before)
        with torch.no_grad():
            assert torch.equal(model(ids, attention_mask=mask).logits, before)
        assert list(read(tmp_path / "run").sequences.values()) == real_tokens(ids, mask)
        log = open_log(tmp_path / "run")
        assert log.layers == tuple(blocks(model))
        keep = mask.reshape(-1).bool()
        for number, block in blocks(model).items():
            (rows,) = log.batches(["logits", "experts", "weights"], layers=[number])
            hidden, answer, logits = (t[keep] for t in seen[number])
            assert torch.equal(torch.from_numpy(logits_of(rows).copy()), logits.float())
            with torch.no_grad():
                slow = slow_block(
                    block, hidden, rows["experts"].to_pylist(), rows["weights"].to_pylist()
                )
            # sums in another order; bfloat16 has 8 bits
            near = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(slow, answer, atol=near, rtol=near)
    finally:
        model.float()


@pytest.mark.parametrize("name", FAMILIES)
def test_routing_decides_by_the_rule_and_computes_the_chosen_experts(name, tmp_path):
    model = model_of(name)
    ids, mask = batch([7, 5])
    untouched = [sorted(vars(module)) for module in model.modules()]
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        with route(model, tmp_path / "run", alpha=0.4, kde=KDE, min_k=0, max_k=6):
            handles = [
                block.register_forward_hook(
                    lambda m, args, out, number=number: seen.update(
                        {number: (args[0].flatten(0, 1), out[0].flatten(0, 1))}
                    )
                )
                for number, block in blocks(model).items()
            ]
            model(ids, attention_mask=mask)
        for handle in handles:
            handle.remove()
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert [sorted(vars(module)) for module in model.modules()] == untouched
    log, counts = open_log(tmp_path / "run"), set()
    keep = mask.reshape(-1).bool()
    for number, block in blocks(model).items():
        (rows,) = log.batches(COLUMNS, layers=[number])
        logits = logits_of(rows)
        truth = decide(logits, KDE[number].thresholds(0.4, E), min_k=0, max_k=6)
        weights = softmax_weights(logits, truth, renormalize=normalizes(name))
        chosen = [
            order[:n].tolist() for order, n in zip(truth.order, truth.n_selected, strict=True)
        ]
        assert rows["experts"].to_pylist() == chosen
        assert rows["n_rejected"].to_pylist() == truth.n_rejected.tolist()
        for found, expected in zip(rows["weights"].to_pylist(), weights, strict=True):
            assert found == pytest.approx(expected[: len(found)].tolist(), rel=1e-5)
        hidden, answer = (t[keep] for t in seen[number])
        with torch.no_grad():
            slow = slow_block(block, hidden, chosen, weights)
        torch.testing.assert_close(slow, answer, atol=1e-5, rtol=1e-5)
        counts |= set(truth.n_selected.tolist())
    assert len(counts) > 2


@pytest.mark.parametrize("name", FAMILIES)
def test_routing_with_the_models_own_count_changes_nothing(name):
    model = model_of(name)
    ids, mask = batch([7, 5])
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        with route(model, alpha=0.3, kde=KDE, min_k=TOP_K, max_k=TOP_K):
            after = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


def test_stats_count_what_was_chosen(tmp_path):
    from bhlog.capture.contract.manifest import Routing
    from bhlog.capture.contract.rule import BhOptions
    from bhlog.capture.observe import new_writer
    from bhlog.capture.patch import RouterPatcher

    model = model_of("Olmoe")
    patcher = RouterPatcher(model)
    routing = Routing("bh", BhOptions(0.4, max_k=5))
    writer = new_writer(tmp_path / "run", patcher.info, routing, kde=KDE)
    patcher.attach(routing, KDE, writer=writer, collect_stats=True)
    ids, mask = batch([9, 4, 6], left=True)
    with patcher, torch.no_grad():
        model(ids, attention_mask=mask)
        stats = dict(patcher.stats)
    writer.close()
    for number in blocks(model):
        (rows,) = open_log(tmp_path / "run").batches(COLUMNS, layers=[number])
        assert stats[number].tokens == mask.sum() == len(rows)
        n = torch.tensor(rows["n_selected"].to_pylist())
        assert stats[number].selected.tolist() == torch.bincount(n, minlength=E + 1).tolist()
        load = torch.bincount(torch.tensor(rows["experts"].flatten().to_pylist()), minlength=E)
        assert stats[number].load.tolist() == load.tolist()


def test_layers_without_a_router_are_left_alone():
    layers = {name: [r.layer for r in find_routers(model_of(name))] for name in FAMILIES}
    assert layers == {
        "Olmoe": [0, 1, 2], "Mixtral": [0, 1, 2], "Qwen2Moe": [1, 2], "Qwen3Moe": [1, 2],
    }  # fmt: skip


def test_training_reaches_gate_and_experts_when_routed():
    model = model_of("Olmoe")
    ids, mask = batch([6, 6])
    with route(model, alpha=0.4, kde=KDE):
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    block = blocks(model)[0]
    assert block.gate.weight.grad.abs().sum() > 0
    assert sum(expert.up_proj.weight.grad is not None for expert in block.experts) > 1
    model.zero_grad()


def test_other_families_are_refused_with_those_supported(tmp_path):
    config = transformers.DeepseekV3Config(
        vocab_size=40, hidden_size=32, intermediate_size=16, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8,
        n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=0, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    with (
        pytest.raises(UnsupportedModel, match="Supported are Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE"),
        observe(model, tmp_path / "run"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
