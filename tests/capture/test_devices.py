"""A model that is not in one piece: accelerate's hooks and offloading, DataParallel's replicas."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.observe import observe, route
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.writing.writer import WriterOptions
from tests.capture.tiny import LAYERS, batch, check_logits, read, real_tokens, tiny_model
from tests.synthetic import normal_kde

KDE = normal_kde(range(LAYERS))
accelerate = pytest.importorskip("accelerate", reason="it spreads the models of these tests")


def offloaded(tmp_path: Path) -> Any:
    """Weights are on no device but while their module runs."""
    return accelerate.cpu_offload(tiny_model(), torch.device("cpu"))


def mapped(tmp_path: Path) -> Any:
    """As device_map does it: some modules stay, some are read from disk when they run."""
    places: dict[str, Any] = {"model.layers.1": "disk", "lm_head": "disk"}
    parts = ["model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm"]
    places |= dict.fromkeys([*parts, "model.rotary_emb"], "cpu")
    tiny_model().save_pretrained(tmp_path / "model")
    return type(tiny_model()).from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    ).eval()  # fmt: skip


@pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")  # transformers 4
@pytest.mark.parametrize("spread", [offloaded, mapped])
def test_offloaded_models_are_observed_and_routed(spread: Callable[[Path], Any], tmp_path: Path):
    whole, model = tiny_model(), spread(tmp_path)
    ids, mask = batch([5, 3], left=True)

    def answer(model: Any) -> Tensor:
        with torch.no_grad():
            model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
            return model(ids, attention_mask=mask).logits

    with route(whole, alpha=0.3, kde=KDE):
        routed = answer(whole)
    assert "meta" in {parameter.device.type for parameter in model.parameters()}
    before = answer(model)
    torch.testing.assert_close(before, answer(whole))
    with observe(model, tmp_path / "observed"):
        assert torch.equal(answer(model), before)
    with route(model, tmp_path / "routed", alpha=0.3, kde=KDE):
        torch.testing.assert_close(answer(model), routed)
    assert torch.equal(answer(model), before)
    logged = read(tmp_path / "observed")
    assert [logged.sequence(n) for n in (2, 3)] == real_tokens(ids, mask)
    check_logits(whole, logged)
    assert len(read(tmp_path / "routed").tokens) == 4


def test_a_model_is_offloaded_while_it_is_observed(tmp_path):
    model, whole = tiny_model(), tiny_model()
    ids, mask = batch([5, 3])
    with observe(model, tmp_path / "run"), torch.no_grad():
        accelerate.cpu_offload(model, torch.device("cpu"))
        found = model(ids, attention_mask=mask).logits
    with torch.no_grad():
        assert torch.equal(found, whole(ids, attention_mask=mask).logits)
        assert torch.equal(found, model(ids, attention_mask=mask).logits)
    check_logits(whole, read(tmp_path / "run"))


def test_counts_of_an_offloaded_model_are_where_its_tokens_are(tmp_path):
    ids, mask = batch([5, 3])
    counts = []
    for model in (tiny_model(), offloaded(tmp_path)):
        patcher = RouterPatcher(model)
        patcher.attach(Routing("bh", BhOptions(0.3)), KDE, collect_stats=True)
        with torch.no_grad():
            model(ids, attention_mask=mask)
        patcher.unpatch()
        counts.append([stats.selected.tolist() for stats in patcher.stats.values()])
    assert counts[0] == counts[1] and sum(counts[0][0]) == 8


def replica(module: nn.Module) -> nn.Module:
    """What DataParallel makes of a module on each device, here sharing the weights."""
    copy = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(copy, name, replica(child))
    for name, parameter in module._parameters.items():
        copy._parameters[name] = parameter
    return copy


@pytest.mark.parametrize("how", ["observe", "route"])
def test_replicas_that_run_side_by_side(tmp_path, how):
    """As under DataParallel: each forward splits its batch over replicas, in a thread each."""
    model = tiny_model()
    ids, mask = batch([6, 3, 5, 4], left=True)
    answers: dict[int, Tensor] = {}

    def run(part: int, copy: nn.Module) -> None:
        rows = slice(2 * part, 2 * part + 2)
        with torch.no_grad():
            answers[part] = copy(ids[rows], attention_mask=mask[rows]).logits

    options = WriterOptions(shard_rows=40)
    patched = (
        observe(model, tmp_path / "run", options=options)
        if how == "observe"
        else route(model, tmp_path / "run", alpha=0.3, kde=KDE, options=options)
    )
    with patched:
        for _ in range(5):
            threads = [threading.Thread(target=run, args=(i, replica(model))) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    logged = read(tmp_path / "run")
    assert sorted(logged.sequences.values()) == sorted(real_tokens(ids, mask) * 5)
    assert all(nll is not None for n in logged.nll.values() for p, nll in n.items() if p)
    assert len({f for by in logged.forward.values() for f in by.values()}) == 10
    if how == "observe":
        check_logits(model, logged)
        with torch.no_grad():
            for part, answer in answers.items():
                rows = slice(2 * part, 2 * part + 2)
                assert torch.equal(answer, model(ids[rows], attention_mask=mask[rows]).logits)
    else:
        assert logged.manifest.routing.kind == "bh"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="DataParallel needs two GPUs")
def test_data_parallel_itself(tmp_path):
    model = tiny_model().cuda()
    ids, mask = batch([6, 3, 5, 4], left=True)
    with observe(model, tmp_path / "run"), torch.no_grad():
        for _ in range(3):
            nn.DataParallel(model)(ids.cuda(), attention_mask=mask.cuda())
    logged = read(tmp_path / "run")
    assert sorted(logged.sequences.values()) == sorted(real_tokens(ids, mask) * 3)
