"""Each export: its numbers against plain Python, its shape as the program that reads it expects."""

import json
import shutil
import struct

import numpy as np
import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.exports.register import EXPORTS
from bhlog.analysis.exports.wanted import Wanted
from bhlog.analysis.run import open_log
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, without_logits, write_run

LAYERS, E, K = (1, 3), 8, 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    kde = normal_kde(LAYERS)
    common = {"layers": LAYERS, "n_experts": E, "n_sequences": 4, "length": 12, "top_k": K}
    write_run(folder / "native", **common, kde=kde, seed=3)
    write_run(folder / "bh", **common, options=BhOptions(alpha=0.3, max_k=4), kde=kde, seed=3)
    without_logits(write_run(folder / "ids", **common, seed=3))
    return folder


@pytest.fixture
def bhlog(place, monkeypatch, capsys):
    """Runs the command beside the runs; gives exit code and stderr."""
    monkeypatch.chdir(place)

    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert out == ""
        return stop.value.code, err

    return call


def rows_of(run, layer):
    log = open_log(run)
    for group in log.row_groups([layer]):
        columns = ("logits", "experts") if log.has_logits else ("experts",)
        yield from log.read(group, columns).to_pylist()


def chosen(run, layer, alpha=None, max_k=E):
    """Experts of each row: as logged, or by the thresholds, in plain Python."""
    thresholds = None if alpha is None else open_log(run).kde[layer].thresholds(alpha, E)
    for row in rows_of(run, layer):
        if alpha is None:
            yield row["experts"]
            continue
        logits = np.array(row["logits"], np.float32)
        order = sorted(range(E), key=lambda i: (-logits[i], i))
        passing = [k for k in range(1, E + 1) if logits[order[k - 1]] >= thresholds[k - 1]]
        yield order[: min(max(passing, default=1), max_k)]


@pytest.mark.parametrize(
    ("run", "alpha"), [("native", None), ("ids", None), ("native", 0.3), ("bh", 0.1)]
)
def test_load_counts_each_choice_in_the_shape_that_sglang_reads(place, bhlog, run, alpha):
    options = [] if alpha is None else ["--alpha", alpha]
    code, err = bhlog("export", "load", run, *options, "--out", "load.json")
    assert (code, err) == (0, "wrote load.json\n")
    data = json.loads((place / "load.json").read_text())
    counts = np.array(data["logical_count"])  # what EPLB sums over its first axis
    assert [*data] == ["logical_count"]
    assert counts.shape == (1, max(LAYERS) + 1, E)
    assert counts.dtype.kind == "i"
    assert not counts[0, [0, 2]].any()  # layers without a router
    for layer in LAYERS:
        expected = np.zeros(E, int)
        for experts in chosen(place / run, layer, alpha, 4 if run == "bh" else E):
            expected[experts] += 1
        assert counts[0, layer].tolist() == expected.tolist()


def test_hot_ranks_all_experts_and_tells_the_fewest_that_serve_half(place, bhlog):
    assert bhlog("export", "hot", "ids", "--out", "hot.json")[0] == 0
    data = json.loads((place / "hot.json").read_text())
    counts = {
        (layer, i): sum(i in experts for experts in chosen(place / "native", layer))
        for layer in LAYERS
        for i in range(E)
    }
    pin = [tuple(pair) for pair in data["pin"]]  # as turboquant_mlx's _load_pin_spec takes them
    assert pin == sorted((p for p in counts if counts[p]), key=lambda p: (-counts[p], p))
    for layer in LAYERS:
        hot, half = data["hot"][str(layer)], sum(counts[layer, i] for i in range(E)) / 2
        served = [sum(counts[layer, i] for i in hot[:n]) for n in range(len(hot) + 1)]
        assert served[-1] >= half > served[-2]
        assert data["cold"][str(layer)] == [i for i in range(E) if not counts[layer, i]]


def best_ks(run, budget):
    """Every vector of ks with that budget or more, the cheapest first, then by what is kept."""
    kept = {}
    for layer in LAYERS:
        p = np.sort([softmax(row["logits"]) for row in rows_of(run, layer)], axis=1)[:, ::-1]
        kept[layer] = np.cumsum(p.mean(axis=0))
    vectors = [(a, b) for a in range(1, E + 1) for b in range(1, E + 1)]
    cheapest = min(sum(v) for v in vectors if sum(v) >= 2 * budget)
    found = [v for v in vectors if sum(v) == cheapest]
    return max(found, key=lambda v: kept[1][v[0] - 1] + kept[3][v[1] - 1]), kept


def softmax(logits):
    e = np.exp(np.array(logits, np.float64) - max(logits))
    return e / e.sum()


@pytest.mark.parametrize("budget", [1, 2.5, 4, 8])
def test_topk_is_the_best_vector_of_that_budget(place, bhlog, budget):
    assert bhlog("export", "topk", "native", "--experts", budget, "--out", "topk.json")[0] == 0
    data = json.loads((place / "topk.json").read_text())
    best, kept = best_ks(place / "native", budget)
    ks = data["num_experts_per_tok"]
    assert ks == [K, best[0], K, best[1]]  # vLLM: config.num_experts_per_tok[layer_id]
    told = data["bhlog"]
    mean = (kept[1][best[0] - 1] + kept[3][best[1] - 1]) / 2
    assert told["probability_kept"] == pytest.approx(mean, rel=1e-12)
    assert told["mean_experts"] == sum(best) / 2
    k = told["uniform"]["num_experts_per_tok"]
    assert k == sum(best) // 2
    uniform = (kept[1][k - 1] + kept[3][k - 1]) / 2
    assert told["uniform"]["probability_kept"] == pytest.approx(uniform, rel=1e-12)
    assert told["uniform"]["scores"] is None


def test_topk_tells_the_scores_of_an_eval_that_the_run_is_of(place, tmp_path):
    shutil.copytree(place / "native", tmp_path / "native")
    (tmp_path / "scores").mkdir()
    scores = tmp_path / "scores" / "topk-3.json"
    scores.write_text(json.dumps({"tasks": {"arc": {"metrics": {"acc": [0.5, 0.1]}, "n": 2}}}))
    wanted = Wanted(open_log(tmp_path / "native"), experts=3)
    told = json.loads(EXPORTS["topk"](wanted))["bhlog"]["uniform"]
    assert (told["num_experts_per_tok"], told["scores"]) == (3, {"arc": {"acc": [0.5, 0.1]}})
    scores.write_text("[]")
    with pytest.raises(ValueError, match="none of bhlog eval's scores"):
        EXPORTS["topk"](wanted)


def test_a_profile_answers_as_the_log_does(place, bhlog):
    assert bhlog("export", "load", "bh", "--experts", "2", "--out", "a.json")[0] == 0
    open_log(place / "bh").sweep().save(place / "bh.profile")
    given = ("--experts", "2", "--profile", "bh.profile")
    assert bhlog("export", "load", "bh", *given, "--out", "b.json")[0] == 0
    assert (place / "a.json").read_text() == (place / "b.json").read_text()


def read_safetensors(path):
    """By the format's definition: 8 bytes of length, a JSON header, the numbers."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    metadata = header.pop("__metadata__")
    kinds = {"F32": "<f4", "I64": "<i8"}
    assert (8 + n) % 8 == 0
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - n
    tensors = {
        name: np.frombuffer(
            data[8 + n :][slice(*entry["data_offsets"])], kinds[entry["dtype"]]
        ).reshape(entry["shape"])
        for name, entry in header.items()
    }
    return tensors, metadata


def test_thresholds_are_those_of_the_rule(place, bhlog):
    out = ("--out", "bh.safetensors")
    assert bhlog("export", "thresholds", "bh", "--alpha", "0.1", *out)[0] == 0
    tensors, metadata = read_safetensors(place / "bh.safetensors")
    kde = open_log(place / "bh").kde
    expected = np.stack([kde[layer].thresholds(0.1, E) for layer in LAYERS])
    assert tensors["layers"].tolist() == [*LAYERS]
    assert tensors["thresholds"].tobytes() == expected.tobytes()
    assert all(isinstance(value, str) for value in metadata.values())
    assert (metadata["alpha"], metadata["min_k"], metadata["max_k"]) == ("0.1", "1", "4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("topk", "ids", "--experts", "2"), "has no logits"),
        (("load", "ids", "--alpha", "0.1"), "has no logits"),
        (("load", "bh", "--alpha", "0.1", "--experts", "2"), "not both"),
        (("load", "bh", "--experts", "nan"), "--experts must be above 0"),
        (("load", "bh", "--alpha", "1"), "alpha must be between 0 and 1"),
        (("topk", "bh", "--experts", "6"), "within 1 to 4 in every layer"),
        (("thresholds", "bh"), "give --alpha A or --experts K"),
        (("load", "bh", "--experts", "2", "--min-k", "3"), "no alpha comes down to it"),
        (("load", "bh", "--where", "position > 99"), "no experts were chosen"),
    ],
)
def test_what_cannot_be_answered_is_told_in_one_line(place, bhlog, arguments, words):
    code, err = bhlog("export", *arguments, "--out", "none")
    assert code == 1
    assert words in err
    assert len(err.splitlines()) == 1
    assert not (place / "none").exists()
