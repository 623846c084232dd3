"""Routing in torch against the decision rule in numpy, bit for bit."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bhlog.capture.contract.manifest import Routing
from bhlog.capture.contract.named import Bh
from bhlog.capture.contract.null.model import LayerNull, NullCurve
from bhlog.capture.contract.rule import (
    BhOptions,
    Decisions,
    decide,
    decide_by_expert,
    decide_by_p_value,
    no_finite_logit,
    softmax_weights,
)
from bhlog.capture.contract.rule import empirical_p_values as slow_p_values
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.routers.routing import (
    Choice,
    TorchNull,
    Weighing,
    empirical_order,
    empirical_p_values,
    finite_keys,
    select,
    weigh,
)
from bhlog.capture.routers.stats import LayerStats
from tests.capture.tiny import EXPERTS, LAYERS, batch, tiny_model
from tests.synthetic import normal_null

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def curve(rng: np.random.Generator, expert: int | None, *, steps: bool) -> NullCurve:
    """A null with a random tail: smooth, or with flat stretches and jumps."""
    grid = int(rng.integers(2, 60))
    falls = rng.random(grid) * (rng.random(grid) < 0.3 if steps else 1.0)
    tail = 1.0 - np.cumsum(falls) / max(falls.sum(), 1e-9) * rng.uniform(0.5, 1.0)
    return NullCurve(
        expert=expert,
        n=0,
        x0=float(rng.normal(-2, 1)),
        dx=float(rng.uniform(0.01, 0.3)),
        tail=np.clip(tail, 0.0, 1.0),
    )


def make_logits(rng: np.random.Generator, T: int, E: int, kind: str, dtype: str) -> Tensor:
    logits = rng.normal(0, 1.5, (T, E))
    if kind == "tied":
        logits = np.round(logits)
    elif kind == "constant":
        logits[:] = rng.normal()
    elif kind == "huge":
        logits *= 10.0 ** rng.integers(-6, 5, (T, E))
    elif kind == "nonfinite":
        bad = np.array([np.nan, np.inf, -np.inf])
        logits = np.where(rng.random((T, E)) < 0.3, rng.choice(bad, (T, E)), logits)
        logits[0] = rng.choice(bad, E)
    return torch.from_numpy(logits).to(DTYPES[dtype])


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "T": st.integers(1, 24),
        "E": st.sampled_from([2, 3, 8, 16, 64, 160]),
        "kind": st.sampled_from(["normal", "tied", "constant", "huge", "nonfinite"]),
        "dtype": st.sampled_from(sorted(DTYPES)),
        "alpha": st.floats(1e-3, 0.99),
    }
)


def choice_of(
    logits: Tensor, order: Tensor, n_rejected: Tensor, min_k: int, max_k: int, top_k: int = 1
) -> Choice:
    keys = finite_keys(logits)
    own = logits.float().nan_to_num(nan=-1e9).topk(top_k, dim=-1).indices
    return select(
        keys,
        order,
        n_rejected,
        keys.softmax(dim=-1).nan_to_num(nan=0.0),
        own,
        torch.full(own.shape, 0.5),
        min_k=min_k,
        max_k=max_k,
    )


def agree(choice: Choice, slow: Decisions, logits: Tensor, top_k: int = 1) -> None:
    """Counts and chosen experts are the same; rows that cannot be decided keep the model's own."""
    undecided = no_finite_logit(logits.float().numpy())
    expected = np.where(undecided, top_k, slow.n_selected)
    np.testing.assert_array_equal(choice.n_selected.numpy(), expected)
    np.testing.assert_array_equal(
        choice.n_rejected.numpy(), np.where(undecided, 0, slow.n_rejected)
    )
    for row in np.flatnonzero(~undecided):
        n = slow.n_selected[row]
        np.testing.assert_array_equal(choice.experts[row, :n].numpy(), slow.order[row, :n])


def bounds(case: dict[str, Any]) -> tuple[int, int]:
    rng = np.random.default_rng(case["seed"] + 1)
    max_k = int(rng.integers(1, case["E"] + 1))
    return int(rng.integers(0, max_k + 1)), max_k


@settings(max_examples=150, deadline=None)
@given(cases)
def test_pooled_null_agrees_bit_for_bit(case):
    rng = np.random.default_rng(case["seed"])
    logits = make_logits(rng, case["T"], case["E"], case["kind"], case["dtype"])
    null = LayerNull(0, (curve(rng, None, steps=case["T"] % 2 == 0),))
    min_k, max_k = bounds(case)
    order, n_rejected = TorchNull(null, Bh(case["alpha"]), case["E"]).order(finite_keys(logits))
    thresholds = null.thresholds(case["alpha"], case["E"])
    slow = decide(logits.float().numpy(), thresholds, min_k=min_k, max_k=max_k)
    agree(choice_of(logits, order, n_rejected, min_k, max_k), slow, logits)


@settings(max_examples=80, deadline=None)
@given(cases.filter(lambda case: case["E"] <= 64))
def test_null_per_expert_agrees_bit_for_bit(case):
    rng = np.random.default_rng(case["seed"])
    logits = make_logits(rng, case["T"], case["E"], case["kind"], case["dtype"])
    null = LayerNull(
        0, tuple(curve(rng, expert, steps=expert % 2 == 0) for expert in range(case["E"]))
    )
    min_k, max_k = bounds(case)
    order, n_rejected = TorchNull(null, Bh(case["alpha"]), case["E"]).order(finite_keys(logits))
    wide = logits.float().numpy()
    slow = decide_by_expert(
        wide,
        null.thresholds(case["alpha"], case["E"]),
        null.p_value(np.where(np.isfinite(wide), wide, -np.inf)),
        min_k=min_k,
        max_k=max_k,
    )
    agree(choice_of(logits, order, n_rejected, min_k, max_k), slow, logits)


@settings(max_examples=120, deadline=None)
@given(cases, st.booleans())
def test_empirical_p_values_agree_bit_for_bit_and_ignore_padding(case, padded):
    rng = np.random.default_rng(case["seed"])
    logits = make_logits(rng, case["T"], case["E"], case["kind"], case["dtype"])
    keep = rng.random(case["T"]) < 0.7 if padded else np.ones(case["T"], dtype=bool)
    keep[rng.integers(case["T"])] = True
    kept = logits[torch.from_numpy(keep)].float().numpy()
    min_k, max_k = bounds(case)
    p = slow_p_values(kept)
    mask = torch.from_numpy(keep) if padded else None
    found = empirical_p_values(finite_keys(logits), mask)[torch.from_numpy(keep)]
    np.testing.assert_array_equal(found.numpy(), p)
    order, n_rejected = empirical_order(finite_keys(logits), case["alpha"], mask)
    slow = decide_by_p_value(kept, p, alpha=case["alpha"], min_k=min_k, max_k=max_k)
    choice = choice_of(logits, order, n_rejected, min_k, max_k)
    rows = torch.from_numpy(keep)
    agree(
        Choice(
            choice.experts[rows],
            choice.weights[rows],
            choice.n_selected[rows],
            choice.n_rejected[rows],
            choice.decided[rows],
        ),
        slow,
        logits[rows],
    )


@pytest.mark.parametrize("E", [2, 7, 64, 128, 512])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_large_batches_of_many_widths_agree(E, dtype):
    rng = np.random.default_rng(E)
    logits = make_logits(rng, 1000, E, "nonfinite", dtype)
    null = LayerNull(0, (curve(rng, None, steps=False),))
    for alpha in (0.01, 0.3):
        order, n_rejected = TorchNull(null, Bh(alpha), E).order(finite_keys(logits))
        slow = decide(logits.float().numpy(), null.thresholds(alpha, E), min_k=1, max_k=E)
        agree(choice_of(logits, order, n_rejected, 1, E), slow, logits)


@settings(max_examples=60, deadline=None)
@given(cases, st.booleans(), st.sampled_from([1.0, 0.5, 3.0]))
def test_weights_are_those_of_the_rule(case, renormalize, temperature):
    rng = np.random.default_rng(case["seed"])
    logits = make_logits(rng, case["T"], case["E"], case["kind"], case["dtype"])
    wide = logits.float().numpy()
    null = LayerNull(0, (curve(rng, None, steps=False),))
    min_k, max_k = bounds(case)
    slow = decide(wide, null.thresholds(0.3, case["E"]), min_k=min_k, max_k=max_k)
    keys = finite_keys(logits)
    order, n_rejected = TorchNull(null, Bh(0.3), case["E"]).order(keys)
    choice = select(
        keys,
        order,
        n_rejected,
        (keys / temperature).softmax(dim=-1).nan_to_num(nan=0.0),
        torch.zeros(case["T"], 1, dtype=torch.long),
        torch.ones(case["T"], 1),
        min_k=min_k,
        max_k=max_k,
    )
    choice = weigh(choice, Weighing(renormalize, scale=2.5))
    decided = ~no_finite_logit(wide)
    expected = softmax_weights(wide, slow, temperature=temperature, renormalize=renormalize)
    # softmax in another library: the last bits of exp and of the sum may differ
    np.testing.assert_allclose(
        choice.weights.numpy()[decided], 2.5 * expected[decided], rtol=1e-4, atol=1e-7
    )


def test_rows_without_a_finite_logit_keep_the_models_choice():
    logits = torch.tensor([[torch.nan] * 5, [1.0, 3.0, 2.0, 0.0, -1.0]])
    keys = finite_keys(logits)
    rows = (
        keys,
        keys.sort(dim=-1, descending=True, stable=True).indices,
        torch.tensor([5, 2]),
        keys.softmax(dim=-1).nan_to_num(nan=0.0),
        torch.tensor([[4, 2], [1, 2]]),
        torch.tensor([[0.6, 0.3], [0.5, 0.2]]),
    )
    choice = select(*rows, min_k=1, max_k=4)
    for weighing in (Weighing(False, scale=3.0), Weighing(True), Weighing(True, over_chosen=True)):
        torch.testing.assert_close(weigh(choice, weighing).weights[0], choice.weights[0])
    assert choice.experts.tolist() == [[4, 2, 0, 1], [1, 2, 0, 3]]
    assert choice.n_selected.tolist() == [2, 2]
    assert choice.n_rejected.tolist() == [0, 2]
    torch.testing.assert_close(choice.weights[0], torch.tensor([0.6, 0.3, 0.0, 0.0]))
    skipping = select(*rows, min_k=1, max_k=4, skip=True)
    assert skipping.experts.tolist() == [[4, 2, 5, 5], [1, 2, 5, 5]]


def test_unused_slots_hold_experts_that_were_not_chosen():
    """Every row names K different experts, so that padding with them is right, too."""
    logits = torch.randn(200, 16)
    logits[::3] = torch.nan
    keys = finite_keys(logits)
    null = LayerNull(0, (curve(np.random.default_rng(0), None, steps=False),))
    choice = choice_of(logits, *TorchNull(null, Bh(0.3), 16).order(keys), 1, 9, top_k=4)
    assert all(len(set(row)) == 9 for row in choice.experts.tolist())


def test_stats_count_kept_rows():
    model = tiny_model()
    ids, mask = batch([9, 4, 6], left=True)
    patcher = RouterPatcher(model)
    routing = Routing("bh", BhOptions(0.4, min_k=0, max_k=5, p_values="empirical"))
    patcher.attach(routing, collect_stats=True)
    seen: dict[int, Tensor] = {}
    handles = [  # after bhlog's own hook: what the experts get
        router.module.register_forward_hook(
            lambda module, args, output, layer=router.layer: seen.update({layer: output[2]})
        )
        for router in patcher.routers
    ]
    with patcher, torch.no_grad():
        model(ids, attention_mask=mask)
        stats: dict[int, LayerStats] = dict(patcher.stats)
    for handle in handles:
        handle.remove()
    for layer in range(LAYERS):
        experts = seen[layer][mask.reshape(-1).bool()]
        used = experts < EXPERTS
        assert stats[layer].tokens == mask.sum() == len(experts)
        n = used.sum(dim=1)
        assert stats[layer].selected.tolist() == torch.bincount(n, minlength=EXPERTS + 1).tolist()
        load = torch.bincount(experts[used], minlength=EXPERTS)
        assert stats[layer].load.tolist() == load.tolist()
        assert stats[layer].mean_experts == pytest.approx(n.double().mean().item())


@pytest.mark.parametrize("by_expert", [False, True])
def test_centred_nulls_route_as_the_rule_decides_bit_for_bit(by_expert):
    E = 8
    rng = np.random.default_rng(9)
    logits = (rng.normal(size=(400, E)) + 2 * rng.normal(size=(400, 1))).astype(np.float32)
    logits[:50][rng.random((50, E)) < 0.4] = np.nan
    logits[50], logits[51, 0], logits[51, 1:] = np.inf, 3e38, -3e38
    curves = [normal_null(0, mean=m, sd=1.0).curves[0] for m in np.linspace(-0.3, 0.3, E)]
    kept = enumerate(curves) if by_expert else [(None, curves[0])]
    null = LayerNull(0, tuple(replace(c, expert=e, centre="median") for e, c in kept))
    found, n_rejected = TorchNull(null, Bh(0.4), E).order(finite_keys(torch.from_numpy(logits)))
    slow = null.decide(logits, null.thresholds(0.4, E), min_k=0, max_k=E)
    decided = np.isfinite(logits).any(axis=1)
    assert np.array_equal(n_rejected.numpy()[decided], slow.n_rejected[decided])
    assert np.array_equal(found.numpy()[decided], slow.order[decided])
    assert 0 < n_rejected.sum() < logits.size
