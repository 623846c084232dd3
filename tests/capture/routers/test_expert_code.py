"""A routed model's experts: right, nobody else's, gone afterwards, and cheaper than native's."""

import copy
import pickle
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OlmoeForCausalLM

from bhlog.analysis.run import open_log
from bhlog.analysis.verify.facts import facts_of
from bhlog.capture.changes import Changes
from bhlog.capture.observe import observe, route
from bhlog.capture.routers.expert_code import COMPUTED, NAME, SKIPPED, in_torch, obstacle, take
from bhlog.capture.routers.search import find_routers
from tests.capture.pairs import make_case, slow_experts
from tests.capture.tiny import EXPERTS, LAYERS, TRANSFORMERS_4, batch, tiny_model
from tests.synthetic import normal_kde

KDE = normal_kde(range(LAYERS))
needs_experts = pytest.mark.skipif(TRANSFORMERS_4, reason="experts are modules of their own there")


class Experts(nn.Module):
    """What `in_torch` needs of an experts module."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(gate_up), nn.Parameter(down)

    def _apply_gate(self, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def logits(model: Any) -> Tensor:
    ids, mask = batch([9, 6, 4], left=True)
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits


def configs(model: Any) -> list[Any]:
    return [router.experts.config for router in find_routers(model)]


@pytest.mark.parametrize("T", [0, 1, 50])
@pytest.mark.parametrize("E", [4, 64, 512])
def test_used_pairs_are_a_loop_over_experts(T, E):
    for K in (0, 1, 4):
        x, experts, weights, *matrices = make_case(T, E, max(K, 1), 24, 8)
        x, experts, weights = x.double(), experts[:, :K], weights[:, :K].double()
        case = [t.double() for t in matrices]
        found = in_torch(Experts(*case), x, experts, weights)
        torch.testing.assert_close(found, slow_experts(x, experts, weights, *case))
        assert torch.equal(in_torch(Experts(*case), x, experts, weights), found)


def test_gradients_are_those_of_the_loop():
    x, experts, weights, *matrices = make_case(20, 8, 3, 12, 5)
    x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
    module = Experts(*(t.double() for t in matrices))
    leaves = (x, weights, *module.parameters())
    found = torch.autograd.grad(in_torch(module, x, experts, weights).sin().sum(), leaves)
    slow = slow_experts(x, experts, weights, module.gate_up_proj, module.down_proj)
    for mine, theirs in zip(found, torch.autograd.grad(slow.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
    nothing = in_torch(module, x, torch.full_like(experts, 8), weights)
    assert all(not g.any() for g in torch.autograd.grad(nothing.sum(), leaves))


@needs_experts
def test_our_experts_give_what_the_librarys_give():
    model = tiny_model()
    before = logits(model)
    changes = Changes()
    for router in find_routers(model):
        take(router, changes)
    assert {c._experts_implementation for c in configs(model)} == {NAME}
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)
    changes.undo()
    assert torch.equal(logits(model), before)


@needs_experts
def test_a_model_that_shares_the_config_is_left_alone():
    model = tiny_model()
    other = OlmoeForCausalLM(model.config).eval()
    before, implementation = logits(other), model.config._experts_implementation
    with route(model, alpha=0.3, kde=KDE):
        assert {c._experts_implementation for c in configs(model)} == {NAME}
        assert model.config._experts_implementation == implementation
        assert all(c is model.config for c in configs(other))
        assert configs(OlmoeForCausalLM(model.config))[0]._experts_implementation == implementation
        assert torch.equal(logits(other), before)
    assert all(c is model.config for c in configs(model))


@needs_experts
def test_observing_keeps_the_librarys_experts(tmp_path):
    model = tiny_model()
    with observe(model, tmp_path / "run"):
        assert all(c is model.config for c in configs(model))
    assert "experts_implementation" not in open_log(tmp_path / "run").manifest.options


@needs_experts
@pytest.mark.parametrize("log", [False, True])
def test_a_copy_of_a_routed_model_is_plain(tmp_path, log):
    model = tiny_model()
    before = logits(model)
    with route(model, tmp_path / "run" if log else None, alpha=0.3, kde=KDE):
        twin = copy.deepcopy(model)
        experts = pickle.loads(pickle.dumps(model.model.layers[0].mlp.experts))
        assert torch.equal(logits(twin), before)
        routed = logits(model)
        assert not torch.allclose(routed, before)
    assert torch.equal(logits(twin), before)
    assert all(c is twin.config for c in configs(twin)) and twin.config is not model.config
    assert type(experts.config) is type(model.config)
    with route(twin, alpha=0.3, kde=KDE):
        assert torch.equal(logits(twin), routed)
    assert torch.equal(logits(twin), before)
    if log:
        assert open_log(tmp_path / "run").manifest.totals.forwards == 1


@needs_experts
def test_a_compiled_model_is_routed_as_the_bare_one():
    model = tiny_model()
    with route(model, alpha=0.3, kde=KDE):
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(logits(compiled), logits(model), atol=1e-5, rtol=1e-5)


@needs_experts
def test_a_run_says_which_experts_it_had(tmp_path):
    with route(tiny_model(), tmp_path / "run", alpha=0.3, kde=KDE) as patcher:
        assert patcher.experts_implementation == NAME
    assert facts_of(open_log(tmp_path / "run"))["experts_implementation"] == NAME


def spread(model: Any) -> None:
    model.model.layers[0].mlp.experts._is_expert_parallel = True


def biased(model: Any) -> None:
    model.model.layers[0].mlp.experts.register_parameter("bias", nn.Parameter(torch.zeros(2)))


def gated(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    own = type("Clamped", (type(experts),), {"_apply_gate": Experts._apply_gate})
    experts.__class__ = own


def transposed(model: Any) -> None:
    model.model.layers[0].mlp.experts.is_transposed = True


def quantized(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    weight = nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)
    experts.down_proj = weight


def replaced(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    experts.__class__ = type("Own", (type(experts),), {"forward": Experts.forward})


@needs_experts
@pytest.mark.parametrize("change", [spread, biased, gated, transposed, quantized, replaced])
def test_other_experts_keep_the_librarys_code_and_the_user_is_told_once(change):
    model = tiny_model()
    assert all(obstacle(router) is None for router in find_routers(model))
    change(model)
    before = [c for c in configs(model)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with route(model, alpha=0.3, kde=KDE) as patcher:
            assert configs(model)[0] is before[0]
            assert {c._experts_implementation for c in configs(model)[1:]} == {NAME}
            first = patcher.experts_implementation.split(f", {NAME}")[0]
            assert first in (SKIPPED, COMPUTED)
    assert [w.category for w in told] == [UserWarning]
    assert first in str(told[0].message) and str(obstacle(find_routers(model)[0])) in str(
        told[0].message
    )
    assert all(a is b for a, b in zip(configs(model), before, strict=True))


@needs_experts
@pytest.mark.filterwarnings("ignore:routing OlmoeForCausalLM may cost more")
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_librarys_code_under_route_gives_what_ours_gives(implementation):
    model = tiny_model()
    options = {"alpha": 0.4, "kde": KDE, "min_k": 0, "max_k": EXPERTS}
    with route(model, **options):
        expected = logits(model)
    model.config._experts_implementation = implementation
    for layer in model.model.layers:
        layer.mlp.experts.register_parameter("other", nn.Parameter(torch.zeros(1)))
    with route(model, **options) as patcher:
        assert patcher.experts_implementation in (SKIPPED, COMPUTED)
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


@needs_experts
def test_fewer_experts_take_less_time_on_a_cpu():
    """At 1 expert of 8 a fifth as much is to be done; half the time leaves room for a busy host."""
    case = make_case(256, 8, 8, 256, 256)
    x, _, weights, *matrices = case
    module = Experts(*matrices)
    every = torch.arange(8).expand(256, 8).contiguous()
    one = torch.where(torch.arange(8) < 1, torch.randint(0, 8, (256, 1)), 8)

    def seconds(experts: Tensor) -> float:
        taken = []
        for _ in range(7):
            start = time.process_time()
            with torch.no_grad():
                in_torch(module, x, experts, weights)
            taken.append(time.process_time() - start)
        return min(taken)

    seconds(every)
    assert seconds(one) < 0.5 * seconds(every)
