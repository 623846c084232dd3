"""What patching does to a model: nothing when observing, and nothing that stays."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bhlog.analysis.log import logits_of
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import (
    AlreadyPatched,
    InvalidOption,
    KdeMismatch,
    RunExists,
    UnsupportedModel,
)
from bhlog.capture.contract.rule import decide, softmax_weights
from bhlog.capture.forwards import Forwards
from bhlog.capture.observe import observe, route
from bhlog.capture.routers.search import find_routers
from tests.capture.tiny import (
    EXPERTS,
    LAYERS,
    TRANSFORMERS_4,
    batch,
    observed,
    read,
    real_tokens,
    tiny_model,
)
from tests.synthetic import normal_kde

KDE = normal_kde(range(LAYERS))
needs_router = pytest.mark.skipif(
    TRANSFORMERS_4, reason="transformers 4 has no router module; see test_blocks4.py"
)


def answers(model: Any) -> list[Tensor]:
    """What the model says, in several ways of asking."""
    ids, mask = batch([7, 4, 2], left=True)
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        hidden = model.model(ids, attention_mask=mask).last_hidden_state
        written = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    return [plain, hidden, written]


def hooks(model: nn.Module) -> list[Any]:
    return [
        (name, kind, list(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in vars(module)
        if "hooks" in kind and isinstance(getattr(module, kind), dict) and getattr(module, kind)
    ]


def state(model: nn.Module) -> list[Any]:
    """Everything that could be left behind."""
    names = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    flags = [getattr(r.experts, "_is_expert_parallel", None) for r in find_routers(model)]
    return [hooks(model), names, flags, [type(m) for m in model.modules()]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_observing_leaves_outputs_bit_identical(model, tmp_path):
    before = answers(model)
    with observed(model, tmp_path / "run"):
        assert same(answers(model), before)
    assert same(answers(model), before)


@needs_router
def test_observing_in_bfloat16_logs_the_exact_logits_and_weights(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    ids, mask = batch([6, 6])
    seen: list[tuple[Tensor, ...]] = []
    handle = model.model.layers[1].mlp.gate.register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    before = answers(model)
    seen.clear()
    with observed(model, tmp_path / "run"):
        model(ids, attention_mask=mask)
    handle.remove()
    assert same(answers(model), before)
    logits, weights, experts = (t.float() for t in seen[0])
    for rows in open_log(tmp_path / "run").batches(["logits", "experts", "weights"], layers=[1]):
        assert torch.equal(torch.from_numpy(logits_of(rows).copy()), logits)
        for i, row in enumerate(rows.select(["experts", "weights"]).to_pylist()):
            assert sorted(row["experts"]) == sorted(experts[i].int().tolist())
            by_expert = dict(zip(experts[i].int().tolist(), weights[i].tolist(), strict=True))
            assert row["weights"] == [by_expert[e] for e in row["experts"]]
            order = [-logits[i, e].item() for e in row["experts"]]
            assert order == sorted(order)


def test_routing_logs_what_the_rule_decides(model, tmp_path):
    ids, mask = batch([8, 5, 3], left=True)
    with torch.no_grad(), route(model, tmp_path / "run", alpha=0.3, kde=KDE, min_k=1, max_k=6):
        model(ids, attention_mask=mask)
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    log = open_log(tmp_path / "run")
    columns = ["layer", "logits", "experts", "weights", "n_selected", "n_rejected"]
    seen = set()
    for rows in log.batches(columns):
        logits = logits_of(rows)
        thresholds = log.kde[rows["layer"][0].as_py()].thresholds(0.3, EXPERTS)
        truth = decide(logits, thresholds, min_k=1, max_k=6)
        weights = softmax_weights(logits, truth)
        for i, row in enumerate(rows.select(columns[2:]).to_pylist()):
            n = row["n_selected"]
            assert (n, row["n_rejected"]) == (truth.n_selected[i], truth.n_rejected[i])
            assert row["experts"] == truth.order[i, :n].tolist()
            assert row["weights"] == pytest.approx(weights[i, :n].tolist(), rel=1e-5)
            seen.add(n)
    assert len(seen) > 2


@needs_router
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_routed_output_is_the_weighted_sum_of_the_chosen_experts(model, implementation):
    """Against a slow block that runs the chosen experts one by one."""
    block = model.model.layers[0].mlp
    hidden = torch.randn(1, 11, model.config.hidden_size)
    before = model.config._experts_implementation
    model.set_experts_implementation(implementation)
    try:
        with torch.no_grad(), route(model, alpha=0.4, kde=KDE, min_k=0, max_k=EXPERTS):
            found = block(hidden)
            found = found[0] if isinstance(found, tuple) else found
    finally:
        model.set_experts_implementation(before)
    with torch.no_grad():
        logits = block.gate(hidden.view(-1, hidden.shape[-1]))[0].float()
        truth = decide(logits.numpy(), KDE[0].thresholds(0.4, EXPERTS), min_k=0, max_k=EXPERTS)
        weights = softmax_weights(logits.numpy(), truth)
        expected = torch.zeros(11, hidden.shape[-1])
        for row in range(11):
            x = hidden[0, row]
            for slot in range(truth.n_selected[row]):
                e = int(truth.order[row, slot])
                gate, up = (block.experts.gate_up_proj[e] @ x).chunk(2)
                down = block.experts.down_proj[e] @ (nn.functional.silu(gate) * up)
                expected[row] += weights[row, slot] * down
    assert len(set(truth.n_selected.tolist())) > 2
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-4)


def test_routing_with_the_models_own_count_changes_nothing(model):
    """Bounds that leave no choice: the model's top-k experts with its own weights."""
    before = answers(model)
    top_k = model.config.num_experts_per_tok
    with torch.no_grad(), route(model, alpha=0.3, kde=KDE, min_k=top_k, max_k=top_k):
        after = answers(model)
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:p-values that rank a forward")
@pytest.mark.parametrize("how", ["observe", "route", "route and log", "empirical"])
@pytest.mark.parametrize("raises", [False, True])
def test_leaving_restores_everything(model, tmp_path, how, raises):
    before, untouched = answers(model), state(model)
    blocks: dict[str, Any] = {
        "observe": lambda: observe(model, tmp_path / "run"),
        "route": lambda: route(model, alpha=0.3, kde=KDE),
        "route and log": lambda: route(model, tmp_path / "run", alpha=0.3, kde=KDE),
        "empirical": lambda: route(model, alpha=0.3, p_values="empirical"),
    }
    try:
        with blocks[how]():
            assert state(model) != untouched
            answers(model)
            if raises:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert raises
    assert state(model) == untouched
    assert same(answers(model), before)


def test_only_one_patch_at_a_time(model, tmp_path):
    untouched = state(model)
    with observe(model, tmp_path / "first"):
        during = state(model)
        for again in (
            lambda: observe(model, tmp_path / "second"),
            lambda: route(model, tmp_path / "second", alpha=0.3, kde=KDE),
            lambda: route(model, alpha=0.3, kde=KDE),
            lambda: observe(model.model, tmp_path / "second"),
        ):
            with pytest.raises(AlreadyPatched, match="one patch at a time"), again():
                pass
        assert state(model) == during
        assert not (tmp_path / "second").exists()
        with torch.no_grad():
            model(torch.tensor([[5, 6]]))
    assert state(model) == untouched
    assert read(tmp_path / "first").sequence(0) == [5, 6]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"alpha": 0.0, "kde": KDE}, InvalidOption),
        ({"alpha": 0.3}, KdeMismatch),
        ({"alpha": 0.3, "kde": normal_kde([0])}, KdeMismatch),
        ({"alpha": 0.3, "kde": KDE, "max_k": EXPERTS + 1}, InvalidOption),
        ({"alpha": 0.3, "kde": KDE, "min_k": 3, "max_k": 2}, InvalidOption),
        ({"alpha": 0.3, "kde": KDE, "p_values": "empirical"}, InvalidOption),
    ],
)
def test_a_mistake_leaves_neither_hooks_nor_files(model, tmp_path, options, error):
    untouched = state(model)
    with pytest.raises(error), route(model, tmp_path / "run", **options):
        pass
    assert state(model) == untouched
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_leaves_no_hooks(model, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    untouched = state(model)
    with pytest.raises(RunExists), observe(model, tmp_path):
        pass
    assert state(model) == untouched
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_patch_that_fails_closes_its_run(model, tmp_path, monkeypatch):
    def fail(*args: Any) -> None:
        raise RuntimeError("no hook")

    monkeypatch.setattr(Forwards, "attach", fail)
    untouched = state(model)
    with pytest.raises(RuntimeError, match="no hook"), observe(model, tmp_path / "run"):
        pass
    assert state(model) == untouched
    manifest = open_log(tmp_path / "run").manifest
    assert manifest.closed is not None and manifest.error == "RuntimeError: no hook"


def test_a_model_without_routers_is_refused(tmp_path):
    with (
        pytest.raises(
            UnsupportedModel, match=r"families that it knows|Mixtral, OLMoE, .*Qwen3-MoE"
        ),
        observe(nn.Linear(2, 2), tmp_path / "run"),
    ):
        pass


def test_the_model_can_be_copied_and_pickled_after_observing(model, tmp_path):
    with observed(model, tmp_path / "run"):
        answers(model)
    assert same(answers(copy.deepcopy(model)), answers(model))
    assert same(answers(pickle.loads(pickle.dumps(model))), answers(model))


def test_base_model_alone_is_observed_without_a_loss(model, tmp_path):
    ids, mask = batch([5, 3])
    with observed(model.model, tmp_path / "run"):
        model.model(ids, attention_mask=mask)
    logged = read(tmp_path / "run")
    assert list(logged.sequences.values()) == real_tokens(ids, mask)
    assert {nll for losses in logged.nll.values() for nll in losses.values()} == {None}


def test_training_with_checkpointing_logs_each_forward_once(tmp_path):
    model = tiny_model().train()
    if TRANSFORMERS_4:
        model.gradient_checkpointing_enable()
    else:
        model.activation_checkpointing_enable()
    ids, mask = batch([6, 6])
    with observe(model, tmp_path / "run"):
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad is not None
    assert list(read(tmp_path / "run").sequences.values()) == ids.tolist() * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_under_bh_reaches_the_routers(dtype):
    """Bounds that leave no choice: gradients are those of the model's own routing."""
    model = tiny_model().to(dtype).train()
    ids, mask = batch([6, 4])
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    own = [gate.grad.clone() for gate in gates]
    model.zero_grad()
    top_k = model.config.num_experts_per_tok
    with route(model, alpha=0.3, kde=KDE, min_k=top_k, max_k=top_k):
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    for gate, expected in zip(gates, own, strict=True):
        assert expected.abs().sum() > 0
        close = (
            {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.1}
        )
        torch.testing.assert_close(gate.grad, expected, **close)


def test_a_compiled_model_is_observed_before_and_after(tmp_path):
    model = tiny_model()
    compiled = torch.compile(model, backend="eager")
    ids, mask = batch([5, 5])
    with torch.no_grad():
        before = compiled(ids, attention_mask=mask).logits
        with observe(model, tmp_path / "run"):
            during = compiled(ids, attention_mask=mask).logits
            torch.compile(model, backend="eager")(ids, attention_mask=mask)
        after = compiled(ids, attention_mask=mask).logits
    assert torch.equal(before, during) and torch.equal(before, after)
    assert list(read(tmp_path / "run").sequences.values()) == ids.tolist() * 2


def test_run_is_a_path_or_a_string(model, tmp_path):
    with observe(model, str(tmp_path / "run")):
        pass
    log = open_log(Path(tmp_path / "run"))
    assert log.manifest.closed is not None and log.manifest.totals.rows == 0
