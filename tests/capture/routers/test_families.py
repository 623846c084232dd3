"""Every router family: observed without a trace, routed by the rule with its own weights."""

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bhlog.analysis.log import logits_of
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import UnsupportedModel
from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.rule import BhOptions, decide
from bhlog.capture.observe import observe, route
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.routers.family import Router
from bhlog.capture.routers.registry import FAMILIES, UNREADABLE
from bhlog.capture.routers.search import find_routers, supported
from tests.capture.families import build, inputs, narrow, output, packages, readme_table, table
from tests.synthetic import normal_kde

ROUTED = [name for name, family in FAMILIES.items() if family.scoring is not None]
ONLY_OBSERVED = [name for name, family in FAMILIES.items() if family.scoring is None]
ALPHA = 0.4
KEPT = 10  # tokens of families.inputs that are not padding


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The library warns of kernels that are not there; this file is not about that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def model_of(router: str) -> Any:
    return build(router)


def null_of(model: Any) -> Any:
    return normal_kde([router.layer for router in find_routers(model)])


def layers_of(router: Router) -> tuple[int, ...]:
    """What it is in each pass of a forward: further passes are layers after all others."""
    if router.family.name != "Inkling 2 Loop" or router.layer != 1:
        return (router.layer,)
    return (1, 3, 4)


def plain(model: Any) -> dict[int, tuple[Tensor, ...]]:
    """What each router returns, raw logits first, seen by hooks of this test's own."""
    seen: dict[int, tuple[Tensor, ...]] = {}
    raw: dict[int, Tensor] = {}
    handles = []
    for router in find_routers(model):
        of_router = layers_of(router)

        def keep(module: Any, args: Any, out: Any, layers: Any = of_router) -> None:
            layer = next(layer for layer in layers if layer not in seen)
            seen[layer] = (raw.get(layer, out[0]), *out[1:])

        def keep_raw(module: Any, args: Any, out: Any, layer: int = router.layer) -> None:
            raw[layer] = out

        handles.append(router.module.register_forward_hook(keep))
        if router.family.logits is not None:
            inner = router.module.get_submodule(router.family.logits)
            handles.append(inner.register_forward_hook(keep_raw))
    output(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", FAMILIES)
def test_observing_changes_nothing_and_logs_every_token(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    routers = find_routers(model)
    assert name in {type(router.module).__name__ for router in routers}
    before, seen = output(model), plain(model)
    with observe(model, tmp_path / "run"):
        assert torch.equal(output(model), before)
    assert torch.equal(output(model), before)
    log = open_log(tmp_path / "run")
    assert log.manifest.totals.tokens == KEPT
    keep = inputs(model)["attention_mask"].reshape(-1).bool()
    assert log.layers == tuple(sorted(seen))
    for layer, answer in seen.items():
        logits, weights, experts = (t[keep] for t in answer[:3])
        columns = ["sequence", "position", "logits", "experts", "weights"]
        (rows,) = log.batches(columns, layers=[layer])
        where = list(zip(rows["sequence"].to_pylist(), rows["position"].to_pylist(), strict=True))
        assert where == [(0, p) for p in range(6)] + [(1, p) for p in range(4)]
        assert torch.equal(torch.from_numpy(logits_of(rows).copy()), logits.float())
        own = [dict(zip(e, w, strict=True)) for e, w in pairs(experts, weights)]
        logged = rows.select(["experts", "weights"]).to_pylist()
        assert [dict(zip(r["experts"], r["weights"], strict=True)) for r in logged] == own


def pairs(experts: Tensor, weights: Tensor) -> list[tuple[list[int], list[float]]]:
    return list(zip(experts.tolist(), weights.float().tolist(), strict=True))


@pytest.mark.parametrize("name", ROUTED)
def test_routing_decides_as_the_rule_on_the_logged_logits(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    before, kde = output(model), null_of(model)
    E = find_routers(model)[0].n_experts
    with route(model, tmp_path / "run", alpha=ALPHA, kde=kde):
        routed = output(model)
    assert not torch.equal(routed, before) and routed.isfinite().all()
    assert torch.equal(output(model), before)
    log = open_log(tmp_path / "run")
    assert log.manifest.totals.tokens == KEPT
    seen = set()
    for rows in log.batches(["layer", "logits", "experts", "n_selected", "n_rejected"]):
        thresholds = kde[rows["layer"][0].as_py()].thresholds(ALPHA, E)
        truth = decide(logits_of(rows), thresholds, min_k=1, max_k=E)
        assert rows["n_selected"].to_pylist() == truth.n_selected.tolist()
        assert rows["n_rejected"].to_pylist() == truth.n_rejected.tolist()
        for i, experts in enumerate(rows["experts"].to_pylist()):
            assert experts == truth.order[i, : truth.n_selected[i]].tolist()
            seen.add(len(experts))
    assert len(seen) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTED)
def test_weights_are_the_models_own_where_the_experts_are(name: str, dtype: torch.dtype) -> None:
    """Bounds that leave top-k experts: where those are the model's own, so are their weights.

    Sums depend on their order, which differs where the model leaves its top-k unsorted.
    """
    model = model_of(name) if dtype == torch.float32 else narrow(model_of(name))
    routers = find_routers(model)
    own: dict[int, tuple[Tensor, ...]] = {}
    routed: dict[int, tuple[Tensor, ...]] = {}

    def listen(heard: dict[int, tuple[Tensor, ...]]) -> list[Any]:
        return [
            router.module.register_forward_hook(
                lambda module, args, out, layer=router.layer: heard.update({layer: out})
            )
            for router in routers
        ]

    handles, top_k = listen(own), routers[0].top_k
    with route(model, alpha=ALPHA, kde=null_of(model), min_k=top_k, max_k=top_k):
        handles += listen(routed)  # hooks run in the order they came
        output(model)
    for handle in handles:
        handle.remove()
    compared, worst = 0, 0.0
    for layer, theirs in own.items():
        mine = routed[layer]
        assert mine[1].dtype == theirs[1].dtype and mine[2].dtype == theirs[2].dtype
        for (e, w), (f, v) in zip(pairs(*theirs[2:0:-1]), pairs(*mine[2:0:-1]), strict=True):
            if set(e) == set(f):
                at = dict(zip(f, v, strict=True))
                worst = max([worst] + [abs(at[i] - x) / x for i, x in zip(e, w, strict=True)])
                compared += 1
    assert compared >= 3
    assert worst < 2**-22  # a sigmoid's last bit may depend on how many are computed at once


@pytest.mark.parametrize("name", ROUTED)
def test_unused_slots_add_nothing_in_every_implementation_of_the_experts(name: str) -> None:
    """Against slots that hold experts of weight 0 in the library's plain loop."""
    model = model_of(name)
    patcher = RouterPatcher(model)
    plain = [replace(r, family=replace(r.family, sentinel=False)) for r in patcher.routers]
    patcher.routers = tuple(plain)
    patcher.attach(Routing("bh", BhOptions(ALPHA)), null_of(model))
    expected = output(model)
    patcher.unpatch()
    try:
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            for router in plain:
                if hasattr(router.experts, "config"):
                    router.experts.config._experts_implementation = implementation
            with route(model, alpha=ALPHA, kde=null_of(model)):
                torch.testing.assert_close(output(model), expected, atol=2e-3, rtol=2e-3)
    finally:
        model.config._experts_implementation = "eager"


@pytest.mark.parametrize("name", ONLY_OBSERVED)
def test_a_family_that_cannot_be_routed_says_why(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    with (
        pytest.raises(UnsupportedModel, match=re.escape(FAMILIES[name].why_not)),
        route(model, tmp_path / "run", alpha=ALPHA, kde=null_of(model)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_router_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    model = build("Llama4Router", intermediate_size_mlp=16)
    with pytest.raises(UnsupportedModel) as error, observe(model, tmp_path / "run"):
        pass
    assert "feed_forward.router is a Llama4Router" in str(error.value)
    assert "not the chosen experts" in str(error.value)
    assert f"Of the {len(supported())} families" in str(error.value)
    assert sum(family.name in str(error.value) for family in FAMILIES.values()) < 10


def test_every_router_of_the_library_has_a_row() -> None:
    others = {
        "GraniteDoclingDensityRouter",  # chooses how to read a page
        "Qwen3OmniMoeTextTopKRouter",  # no model of the library builds it
        "ZayaRouterMLP",  # inside ZayaRouter
    }
    found = {name for name in packages() if re.search(r"Router|TopKGat|MoEV1Gate", name)}
    models = {name for name in found if "Model" in name or "Output" in name}
    assert found - models - others == {*FAMILIES, *UNREADABLE}


def test_what_a_router_returns_in_another_version_is_refused() -> None:
    (router, *_) = find_routers(model_of("MixtralTopKRouter"))
    logits, weights = torch.zeros(3, router.n_experts), torch.zeros(3, router.top_k)
    for output_ in [(weights, weights), logits, (logits, weights, logits), (weights,) * 3]:
        with pytest.raises(UnsupportedModel, match="MixtralTopKRouter returned"):
            router.triple(output_)


def test_the_readme_lists_every_family() -> None:
    assert readme_table() == table(), "run python -m tests.capture.families"
