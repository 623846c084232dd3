"""The torch of analysis/README.md, on thresholds that bhlog exported, against the rule."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from bhlog.analysis.exports.register import export
from bhlog.analysis.exports.wanted import Wanted
from bhlog.analysis.null.estimate import fit_kde
from bhlog.analysis.run import open_log
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.rule import Bounds, no_finite_logit, softmax_weights
from tests.synthetic import normal_logits, write_run

README = Path(__file__).parents[2] / "analysis/README.md"


@pytest.mark.parametrize("centre", ["none", "median"])
@pytest.mark.parametrize("n_experts", [8, 33])
def test_the_readmes_torch_decides_bit_for_bit(tmp_path, monkeypatch, n_experts, centre):
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"), layers=(0, 2), n_experts=n_experts, n_sequences=2, top_k=2)
    log = open_log("run")
    kde = fit_kde([log], FitOptions(centre=centre))
    wanted = Wanted(log, alpha=0.3, kde=kde, bounds=Bounds(1, 6))
    export("thresholds", wanted, "bh.safetensors")
    (program,) = re.findall(
        r"^```python\n(import torch\n.*?)^```$", README.read_text(), re.S | re.M
    )
    assert len(program.split("def choose")[1].splitlines()) <= 20
    found = {}
    exec(program, found)

    logits = np.concatenate([normal_logits(np.random.default_rng(5), 300, n_experts)] * 2)
    logits[300:] = np.round(logits[300:])  # ties
    logits[:4, 1:3] = [[np.nan], [np.inf], [-np.inf], [np.nan]]
    logits[4], logits[5, 1:], logits[6] = np.nan, -np.inf, 3e38
    logits[6, 0] = -3e38
    for layer in (0, 2):
        null = kde[layer]
        decided = null.decide(logits, null.thresholds(0.3, n_experts), min_k=1, max_k=6)
        experts, weights, n = found["choose"](torch.from_numpy(logits), layer)
        assert n.numpy().astype(np.uint16).tolist() == decided.n_selected.tolist()
        chosen = np.arange(6) < decided.n_selected[:, None]
        assert (experts.numpy()[chosen] == decided.order[chosen]).all()
        sure = ~no_finite_logit(logits)
        with np.errstate(over="ignore"):
            expected = softmax_weights(logits, decided)
        assert np.allclose(weights.numpy()[sure], expected[sure], rtol=1e-5, atol=1e-7)
        assert {*n.tolist()} > {0, 1}

        half = torch.from_numpy(logits[7:]).bfloat16()  # on its lattice: nothing is rounded
        assert (found["choose"](half, layer)[2] == n[7:]).all()
