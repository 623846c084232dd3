"""A copy of a model that is observed or routed is a plain model, however it is made."""

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bhlog.capture.observe import observe, route
from tests.capture.tiny import LAYERS, batch, observed, read, tiny_model
from tests.synthetic import normal_kde

KDE = normal_kde(range(LAYERS))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


def things(model: nn.Module) -> list[Any]:
    """What could travel: hooks and attributes of each module."""
    return [
        (name, sorted(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks),
         list(m._forward_hooks_with_kwargs), list(m._forward_hooks_always_called),
         list(m._forward_pre_hooks_with_kwargs), getattr(m, "_is_expert_parallel", None))
        for name, m in model.named_modules()
    ]  # fmt: skip


def changed(model: Any) -> Any:
    """The copy with other weights."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("how", ["observe", "route", "empirical"])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_made_inside_the_block_is_plain(name, how, tmp_path):
    model = tiny_model()
    ids, mask = batch([5, 3], left=True)
    ask: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    seen: list[int] = []  # another's hook goes along
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: seen.append(1))
    if name != "deepcopy":
        model.model.layers[0].mlp.gate._forward_hooks.clear()
    untouched = things(model)
    blocks: dict[str, Any] = {
        "observe": lambda: observe(model, tmp_path / "run"),
        "route": lambda: route(model, tmp_path / "run", alpha=0.3, kde=KDE),
        "empirical": lambda: route(model, tmp_path / "run", alpha=0.3, p_values="empirical"),
    }
    truth = changed(tiny_model())
    with torch.no_grad(), blocks[how]():
        model(ids, attention_mask=mask)
        inside = changed(COPIES[name](model))
        assert things(inside) == untouched
        found = inside.generate(ids, **ask)
        inside(ids, attention_mask=mask)
        again = COPIES[name](model)
        layer = copy.deepcopy(model.model.layers[1])
    assert not layer.mlp.gate._forward_hooks
    assert torch.equal(found, truth.generate(ids, **ask))
    assert torch.equal(inside.generate(ids, **ask), found)
    with torch.no_grad():
        plain = again(ids, attention_mask=mask).logits
        assert torch.equal(plain, tiny_model()(ids, attention_mask=mask).logits)
    assert things(model) == untouched
    assert read(tmp_path / "run").manifest.totals.forwards == 1
    with observed(inside, tmp_path / "copy"):
        inside(ids, attention_mask=mask)
    assert len(read(tmp_path / "copy").tokens) == 2


def test_a_shallow_copy_shares_the_observed_modules_and_is_itself_plain(tmp_path):
    model = tiny_model()
    ids, _ = batch([4])
    with observed(model, tmp_path / "run"):
        twin = copy.copy(model)
        assert "generate" not in vars(twin)
        twin(ids)
    assert list(read(tmp_path / "run").sequences.values()) == ids.tolist()


def answer(model: Any, ids: list[list[int]], queue: Any) -> None:
    with torch.no_grad():
        queue.put(model(torch.tensor(ids)).logits.sum().item())


@pytest.mark.slow
def test_a_spawned_process_gets_a_plain_model(tmp_path):
    model = tiny_model()
    ids, _ = batch([4])
    with torch.no_grad():
        truth = model(ids).logits.sum().item()
    with observed(model, tmp_path / "run"):
        context = multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        process = context.Process(target=answer, args=(model, ids.tolist(), queue))
        process.start()
        found = queue.get()
        process.join()
    assert process.exitcode == 0
    assert found == pytest.approx(truth, rel=1e-5)
    assert read(tmp_path / "run").tokens == {}
