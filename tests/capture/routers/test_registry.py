"""A family from outside: a row for a class of one's own is all that it takes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bhlog.capture.contract.errors import InvalidOption, UnsupportedModel
from bhlog.capture.contract.rule import decide
from bhlog.capture.observe import observe, route
from bhlog.capture.routers.registry import REGISTERED, Family, register
from tests.capture.tiny import (
    EXPERTS,
    LAYERS,
    TOP_K,
    TRANSFORMERS_4,
    batch,
    observed,
    read,
    real_tokens,
    rows_of,
    tiny_model,
)
from tests.synthetic import normal_kde

pytestmark = pytest.mark.skipif(TRANSFORMERS_4, reason="its OLMoE has no router to replace")


class SigmoidRouter(nn.Module):
    """Scores by sigmoid, weights that sum to 2."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.width, self.count, self.factor = EXPERTS, TOP_K, 2.0

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)
        weights, experts = logits.sigmoid().topk(self.count, dim=-1)
        return logits, self.factor * weights / weights.sum(-1, keepdim=True), experts


ROW = Family(
    SigmoidRouter,
    "sigmoid by hand",
    scoring="sigmoid",
    normalize="always",
    scale="factor",
    n_experts="width",
    top_k="count",
)


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def custom() -> Any:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.gate = SigmoidRouter(layer.mlp.gate.weight.detach())
    return model


def test_a_registered_family_is_observed_and_routed_by_its_row(tmp_path):
    model = custom()
    ids, mask = batch([6, 4])
    with pytest.raises(UnsupportedModel), observe(model, tmp_path / "early"):
        pass
    register(ROW)
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
    with observed(model, tmp_path / "run"):
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
    logged = read(tmp_path / "run")
    assert list(logged.sequences.values()) == real_tokens(ids, mask)
    info = logged.manifest.model
    assert (info.n_experts, info.top_k, info.scoring, info.scale) == (EXPERTS, TOP_K, "sigmoid", 2)
    kde = normal_kde(range(LAYERS))
    with torch.no_grad(), route(model, tmp_path / "routed", alpha=0.4, kde=kde):
        model(ids, attention_mask=mask)
    for row in rows_of(tmp_path / "routed", "routing"):
        logits = torch.tensor(row["logits"])
        thresholds = kde[row["layer"]].thresholds(0.4, EXPERTS)
        truth = decide(logits[None].numpy(), thresholds, min_k=1, max_k=EXPERTS)
        assert row["experts"] == truth.order[0, : truth.n_selected[0]].tolist()
        scores = logits[row["experts"]].sigmoid()
        assert row["weights"] == pytest.approx((2 * scores / scores.sum()).tolist(), rel=1e-5)


def test_a_family_that_is_observed_alone_says_why():
    register(
        Family(SigmoidRouter, "mine", None, n_experts="width", top_k="count", why_not="a bias")
    )
    with (
        pytest.raises(UnsupportedModel, match="mine can be observed but not routed by BH: a bias"),
        route(custom(), alpha=0.3, kde=normal_kde(range(LAYERS))),
    ):
        pass


@pytest.mark.parametrize(
    ("family", "says"),
    [
        (Family("SigmoidRouter", "mine"), "expected the router's class"),
        (Family(SigmoidRouter, "mine", None), "give scoring= .* or why_not="),
    ],
)
def test_a_row_that_says_too_little_is_refused(family, says):
    with pytest.raises(InvalidOption, match=says):
        register(family)
