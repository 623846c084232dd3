"""A model routed at an alpha for each layer decides as its replay."""

import pytest
import torch

from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.observe import observe, route
from tests.capture.tiny import LAYERS, batch, tiny_model


def test_each_layer_is_routed_at_its_own_alpha(tmp_path):
    model = tiny_model()
    ids, mask = batch([12, 9])

    def run():
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)

    with observe(model, tmp_path / "native"):
        run()
    kde = open_log(tmp_path / "native").fit()
    alphas = dict(zip(range(LAYERS), (0.02, 0.3, 0.9), strict=True))
    text = "bh:" + "+".join(f"{layer}={alpha}" for layer, alpha in alphas.items())
    with route(model, tmp_path / "bh", policy=text, kde=kde):
        run()
    log = open_log(tmp_path / "bh")
    assert {*log.verify(replay=True)["status"]} == {"ok"}
    frame = log.replay(alphas)
    assert frame["logged_jaccard"].to_list() == [1.0] * (LAYERS + 1)
    assert frame["mean_experts"][0] < frame["mean_experts"][2]

    refused = pytest.raises(InvalidOption, match="layer 1 has no alpha")
    with refused, route(model, tmp_path / "none", policy="bh:0=0.1", kde=kde):
        pass
    assert not (tmp_path / "none").exists()
