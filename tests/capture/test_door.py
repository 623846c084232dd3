"""What is logged is what the experts get, whatever stands between them and the router."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bhlog.capture.contract.errors import UnsupportedModel, WriterFailed
from bhlog.capture.observe import route
from tests.capture.tiny import LAYERS, TRANSFORMERS_4, batch, observed, read, rows_of, tiny_model
from tests.synthetic import normal_kde

KDE = normal_kde(range(LAYERS))
needs_router = pytest.mark.skipif(TRANSFORMERS_4, reason="its OLMoE has no router module")


def force(module: Any, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Experts 6 and 7, whatever the router says."""
    experts = torch.tensor([6, 7]).expand(len(output[2]), 2)
    return output[0], output[0].softmax(-1).gather(1, experts).to(output[1].dtype), experts


@needs_router
@pytest.mark.parametrize("when", ["before", "inside", "between forwards", "first"])
def test_what_is_logged_is_what_the_experts_get_whenever_a_hook_is_added(when, run):
    model = tiny_model()
    ids, mask = batch([6, 4])
    used: list[Tensor] = []
    gates = [layer.mlp.gate for layer in model.model.layers]
    model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, args: used.append(args[1][mask.reshape(-1).bool()])
    )

    def add(prepend: bool = False) -> None:
        for gate in gates:
            gate.register_forward_hook(force, prepend=prepend)

    if when == "before":
        add()
    with observed(model, run):
        if when == "between forwards":
            model(ids, attention_mask=mask)
        if when != "before":
            add(prepend=when == "first")
        model(ids, attention_mask=mask)
    rows = [row for row in rows_of(run, "routing") if row["layer"] == 0]
    assert [set(row["experts"]) for row in rows] == [set(e.tolist()) for e in torch.cat(used)]
    assert {6, 7} == set(rows[-1]["experts"])


class Around(nn.Module):
    """A router in a module that changes what it chose."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return force(self, x, self.gate(x))


class OwnBlock(nn.Module):
    """A block of its own around the library's router and experts, which chooses by itself."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate, self.experts = block.gate, block.experts

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        weights, experts = self.gate(rows)[0].flip(-1).softmax(-1).topk(2, -1)
        answer: Tensor = self.experts(rows, experts, weights)
        return answer.view(x.shape)


def change(model: Any, how: str) -> None:
    """Let other experts run than those that the routers chose."""
    for layer in model.model.layers:
        if how == "router in a module":
            layer.mlp.gate = Around(layer.mlp.gate)
        elif how == "block of its own":
            layer.mlp = OwnBlock(layer.mlp)
        elif how == "block's forward replaced":
            layer.mlp.forward = OwnBlock(layer.mlp).forward
        else:
            layer.mlp.experts.register_forward_pre_hook(
                lambda module, args: (args[0], (args[1] + 1) % 8, args[2])
            )


CHANGED = "router in a module", "block of its own", "block's forward replaced", "hook at experts"


@needs_router
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", CHANGED)
def test_what_is_logged_is_what_the_experts_get_whatever_stands_before_them(how, compiled, run):
    model = tiny_model()
    ids, mask = batch([6, 4])
    used: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, args: Any) -> None:
        used.append((args[1][mask.reshape(-1).bool()], args[2][mask.reshape(-1).bool()]))

    experts = model.model.layers[0].mlp.experts
    change(model, how)
    if compiled:
        with torch.no_grad():
            experts.register_forward_pre_hook(look)
            model(ids, attention_mask=mask)
            experts._forward_pre_hooks.popitem()
        model.compile(backend="eager", fullgraph=True)
    with observed(model, run):
        if not compiled:
            experts.register_forward_pre_hook(look)
        model(ids, attention_mask=mask)
    rows = [row for row in rows_of(run, "routing") if row["layer"] == 0]
    ((chosen, weights),) = used
    for row, experts_used, their_weights in zip(rows, chosen, weights, strict=True):
        truth = dict(zip(experts_used.tolist(), their_weights.tolist(), strict=True))
        assert dict(zip(row["experts"], row["weights"], strict=True)) == pytest.approx(truth)


@needs_router
@pytest.mark.parametrize("how", CHANGED)
def test_routing_is_refused_where_other_experts_run_than_it_decided(how, run):
    model = tiny_model()
    change(model, how)
    ids, _ = batch([6])
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedModel, match=r"layer 0: .*or code around the router"),
        route(model, run, alpha=0.3, kde=KDE),
    ):
        model(ids)


@needs_router
def test_experts_of_another_width_than_the_router_chose_are_refused(run):
    model = tiny_model()
    experts = model.model.layers[1].mlp.experts
    experts.register_forward_pre_hook(
        lambda module, args: (args[0], args[1][:, :1], args[2][:, :1])
    )
    with observed(model, run), pytest.raises(UnsupportedModel, match="layer 1: its experts are"):
        model(batch([6])[0])


class Probabilities(nn.Module):
    """A router's answers with the softmax of its logits in their place."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits, *others = self.gate(x)
        return logits.softmax(-1), *others


@needs_router
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_in_place_of_logits_are_refused(dtype, run):
    model = tiny_model().to(dtype)
    for layer in model.model.layers:
        forward = layer.mlp.gate.forward
        layer.mlp.gate.forward = lambda x, forward=forward: Probabilities(forward)(x)
    with (
        pytest.raises(WriterFailed, match="probabilities in place of logits"),
        observed(model, run),
    ):
        model(batch([6])[0])
    assert "probabilities" in read(run).manifest.error


@needs_router
def test_a_hook_that_changes_what_routing_decided_is_refused(run):
    model = tiny_model()
    ids, _ = batch([6])
    with torch.no_grad(), route(model, run, alpha=0.3, kde=KDE):
        model(ids)
        handle = model.model.layers[1].mlp.gate.register_forward_hook(force)
        with pytest.raises(UnsupportedModel, match="layer 1: a hook that was added inside"):
            model(ids)
        handle.remove()
        model(ids)
    assert list(read(run).sequences.values()) == ids.tolist() * 2
