"""An alpha for each layer: each layer decides as at that alpha alone, bit for bit."""

import json

import pytest

from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from tests.analysis.commands.test_replay_commands import bhlog, place  # noqa: F401

ALPHAS = {0: 0.05, 2: 0.4}


def layers_of(frame, alpha):
    rows = frame.filter(frame["layer"].is_not_null() & (frame["alpha"] == alpha))
    return {row["layer"]: row for row in rows.to_dicts()}


def test_a_replay_is_that_of_each_layers_alpha(place):  # noqa: F811
    run = open_log(place / "bh")
    both = run.replay([0.05, 0.4])
    mixed = run.replay(ALPHAS)
    for layer, alpha in ALPHAS.items():
        assert layers_of(mixed, alpha)[layer] == layers_of(both, alpha)[layer]
    (whole,) = mixed.filter(mixed["layer"].is_null()).to_dicts()
    assert whole["alpha"] is None
    assert whole["mean_experts"] == pytest.approx(mixed["mean_experts"][:2].mean())


def test_a_sweeps_file_is_fed_back_and_gives_what_it_foretold(place, bhlog):  # noqa: F811
    sweep = ("sweep", "bh", "--experts", "2.5", "--per-layer", "--out", "alphas.json")
    assert bhlog(*sweep)[0] == 0
    code, out, _ = bhlog("replay", "bh", "--alpha", "alphas.json", "--format", "json")
    foretold, found = json.loads((place / "alphas.json").read_text()), json.loads(out)
    assert code == 0
    for name in ("layer", "alpha"):
        assert [row[name] for row in found] == [row[name] for row in foretold]
    means = [row["mean_experts"] for row in foretold]
    assert [row["mean_experts"] for row in found] == pytest.approx(means)

    assert bhlog("replay", "bh", "--alpha", "alphas.json", "--out", "bh/replay")[0] == 0
    code, out, _ = bhlog("sql", "bh", "SELECT avg(n_selected) AS m FROM replays", "--format=json")
    assert json.loads(out)[0]["m"] == pytest.approx(means[-1])
    code, out, _ = bhlog("compare", "bh", "--policy", "bh:@alphas.json", "--format", "json")
    assert json.loads(out)[-1]["mean_experts"] == pytest.approx(means[-1])


def test_a_layer_without_an_alpha_is_named(place):  # noqa: F811
    with pytest.raises(InvalidOption, match="layer 2 has no alpha"):
        open_log(place / "bh").replay({0: 0.1})
