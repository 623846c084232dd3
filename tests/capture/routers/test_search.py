"""Which routers are found: the library's own and registered ones, one a layer, none in silence."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import OlmoeForCausalLM

from bhlog.capture.contract.errors import UnsupportedModel
from bhlog.capture.observe import observe, route
from bhlog.capture.routers.search import find_routers
from tests.capture.tiny import (
    EXPERTS,
    LAYERS,
    TRANSFORMERS_4,
    batch,
    check_logits,
    observed,
    read,
    real_tokens,
    tiny_model,
)
from tests.synthetic import normal_kde

pytestmark = pytest.mark.skipif(TRANSFORMERS_4, reason="its OLMoE has no router module")


class BiasRouter(nn.Module):
    """A router by hand, with outputs like the library's."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight = router.weight
        self.bias = nn.Parameter(torch.zeros(EXPERTS))
        self.top_k, self.num_experts = 2, EXPERTS

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight) + self.bias
        weights, experts = logits.softmax(-1).topk(2, dim=-1)
        return logits, weights, experts


class OlmoeTopKRouter(BiasRouter):
    """With the name of one of the library."""


class Alternatives(nn.Module):
    """A wrapper as PEFT puts around a module that is trained whole."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(module)})
        self.active = True

    def forward(self, *args: Any) -> Any:
        module = self.modules_to_save["default"] if self.active else self.original_module
        return module(*args)

    def __getattr__(self, name: str) -> Any:  # as PEFT's does
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.original_module, name)


def wrapped() -> Any:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.gate = Alternatives(layer.mlp.gate)
        nn.init.normal_(layer.mlp.gate.modules_to_save["default"].weight, std=0.4)
    return model


@pytest.mark.parametrize("how", ["observe", "route"])
def test_of_wrapped_routers_the_active_one_is_logged_once_a_layer(how, tmp_path):
    model, ids_and_mask = wrapped(), batch([6, 4], left=True)
    ids, mask = ids_and_mask
    trained, plain = tiny_model(), tiny_model()
    for layer, other in zip(trained.model.layers, model.model.layers, strict=True):
        layer.mlp.gate = copy.deepcopy(other.mlp.gate.modules_to_save["default"])
    kde = normal_kde(range(LAYERS))
    block = (
        observe(model, tmp_path) if how == "observe" else route(model, tmp_path, alpha=0.3, kde=kde)
    )
    with torch.no_grad(), block:
        model(ids, attention_mask=mask)
        for layer in model.model.layers:
            layer.mlp.gate.active = False
        model(ids, attention_mask=mask)
    logged = read(tmp_path)
    assert logged.manifest.model.layers == (0, 1, 2)
    assert list(logged.sequences.values()) == real_tokens(ids, mask) * 2
    if how == "observe":
        check_logits(trained, logged, [0, 1])
        check_logits(plain, logged, [2, 3])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_a_router_trained_whole_by_peft_is_logged_once_a_layer(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    model = peft.get_peft_model(tiny_model(), config).eval()
    ids, mask = batch([6, 4], left=True)
    with observed(model, tmp_path / "run"):
        model(input_ids=ids, attention_mask=mask)
        with model.disable_adapter():
            model(input_ids=ids, attention_mask=mask)
    logged = read(tmp_path / "run")
    assert logged.manifest.model.layers == (0, 1, 2)
    assert list(logged.sequences.values()) == real_tokens(ids, mask) * 2


def test_two_routers_of_a_layer_that_are_no_alternatives_are_refused(tmp_path):
    model = nn.ModuleList([tiny_model(), tiny_model(1)])
    with (
        pytest.raises(UnsupportedModel, match=r"layer 0 has the routers 0\.model.*, 1\.model"),
        observe(model, tmp_path / "run"),
    ):
        pass


@pytest.mark.parametrize("kind", [BiasRouter, OlmoeTopKRouter])
def test_a_layer_with_an_unknown_router_is_refused_or_left_out_if_asked(kind, tmp_path):
    model = tiny_model()
    model.model.layers[1].mlp.gate = kind(model.model.layers[1].mlp.gate)
    ids, mask = batch([6, 4])
    with (
        pytest.raises(
            UnsupportedModel, match=r"does not know model\.layers\.1\.mlp\.gate, a .*Router"
        ),
        observe(model, tmp_path / "run"),
    ):
        pass
    assert not (tmp_path / "run").exists()
    with torch.no_grad(), observe(model, tmp_path / "run", allow_missing_layers=True):
        model(ids, attention_mask=mask)
    logged = read(tmp_path / "run")
    assert logged.manifest.model.layers == (0, 2)
    assert list(logged.sequences.values()) == real_tokens(ids, mask)


def test_a_block_with_experts_and_a_router_of_another_name_is_noticed(tmp_path):
    model = tiny_model()
    block = model.model.layers[2].mlp
    chooser = type("Chooser", (BiasRouter,), {})(block.gate)
    del block.gate
    block.chooser = chooser
    with pytest.raises(UnsupportedModel, match=r"the router in model\.layers\.2\.mlp"):
        find_routers(model)


def test_a_class_called_like_one_of_the_librarys_is_not_it(tmp_path):
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.gate = OlmoeTopKRouter(layer.mlp.gate)
    with (
        pytest.raises(UnsupportedModel, match="the name of a class of transformers', but not that"),
        observe(model, tmp_path / "run"),
    ):
        pass


def test_a_block_called_like_one_of_transformers_4_is_not_it():
    """Its forward may choose by another rule than the one it is named after."""

    class OlmoeSparseMoeBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, EXPERTS)
            self.top_k, self.num_experts, self.norm_topk_prob = 2, EXPERTS, True

    with pytest.raises(UnsupportedModel, match="OlmoeSparseMoeBlock"):
        find_routers(nn.ModuleList([OlmoeSparseMoeBlock()]))


def test_a_subclass_has_its_parents_row_unless_its_forward_is_its_own():
    model = tiny_model()
    router = type(model.model.layers[0].mlp.gate)
    same = type("Parametrized", (router,), {})
    other = type(
        "Changed", (router,), {"forward": lambda self, hidden: router.forward(self, hidden)}
    )
    for layer in model.model.layers:
        layer.mlp.gate.__class__ = same
    assert len(find_routers(model)) == LAYERS
    for layer in model.model.layers:
        layer.mlp.gate.__class__ = other
    with pytest.raises(UnsupportedModel):
        find_routers(model)


def test_a_router_without_what_its_family_has_is_refused_in_one_line():
    model = tiny_model()
    del model.model.layers[0].mlp.gate.num_experts
    with pytest.raises(UnsupportedModel, match="layer 0: OlmoeTopKRouter has no num_experts"):
        find_routers(model)


def test_an_unknown_model_is_told_the_nearest_families_and_how_to_add_one():
    class OlmoeNextForCausalLM(nn.Module):
        pass

    with pytest.raises(UnsupportedModel) as error:
        find_routers(OlmoeNextForCausalLM())
    said = str(error.value)
    assert "nearest are " in said and "OLMoE" in said and "registry.register" in said
    assert len(said) < 500 and "\n" not in said
    assert OlmoeForCausalLM.__name__ not in said
