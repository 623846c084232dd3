import json
import re
import warnings

import numpy as np
import pytest
import torch

from bhlog.analysis.log import logits_of
from bhlog.analysis.run import open_log
from bhlog.capture.apps.notebook import patcher as notebook
from bhlog.capture.contract.errors import (
    CorruptKde,
    InvalidOption,
    KdeMismatch,
    RunExists,
    UnsupportedModel,
)
from bhlog.capture.contract.null.pickles import load_kde_models
from bhlog.capture.contract.rule import decide, empirical_p_values
from capture import (
    BHRoutingLogger,
    OLMoERouterPatcher,
    benjamini_hochberg_routing,
    compute_pvalues_empirical,
    compute_pvalues_kde,
)
from tests.synthetic import normal_kde

EMPIRICAL = "ignore:no null model"
pytestmark = [
    pytest.mark.filterwarnings("ignore:empirical p-values count"),  # once a process
    pytest.mark.filterwarnings("ignore:p-values that rank a forward"),
]


def run(demo, text="def f(x):\n    return x + 1\n"):
    ids = torch.tensor([demo.tokenizer.encode(text)])
    with torch.no_grad():
        return demo.model(ids).logits


def test_the_seed_snippet_runs_as_it_stands(demo, tmp_path):
    model, OUTPUT_DIR = demo.model, tmp_path
    logger = BHRoutingLogger(
        output_dir=str(OUTPUT_DIR), experiment_name="test_experiment", log_every_n=100
    )
    patcher = OLMoERouterPatcher(model)
    with pytest.warns(UserWarning, match="no null model"):
        patcher.patch_with_bh(alpha=0.30, max_k=8, logger=logger)
    run(demo, "import this\n" * 20)
    logger.save_logs()
    logger.generate_plots()
    patcher.unpatch()
    log = json.loads((tmp_path / "logs/test_experiment_bh_log.json").read_text())
    assert log["config"]["alpha"] == 0.3
    assert {(d["sample_idx"], d["token_idx"]) for d in log["decisions"]} == {
        (0, 0), (0, 100), (0, 200),
    }  # fmt: skip
    assert len(log["decisions"]) == 3 * 4  # tokens x layers
    summary = json.loads((tmp_path / "logs/test_experiment_summary.json").read_text())
    assert summary["experts_selected"]["max"] <= 8
    assert len(list((tmp_path / "plots/test_experiment").glob("*.png"))) == 6
    assert open_log(tmp_path / "logs/test_experiment").manifest.closed


def test_the_json_log_ranks_p_values_within_the_whole_batch(demo, tmp_path, monkeypatch):
    # 10 tokens, 4 layers
    monkeypatch.setattr("bhlog.capture.apps.notebook.told.MOST_JSON_DECISIONS", 40)
    logger = BHRoutingLogger(tmp_path, "json", log_every_n=3)
    with OLMoERouterPatcher(demo.model) as patcher, pytest.warns(UserWarning, match="no null"):
        patcher.patch_with_bh(alpha=0.3, logger=logger)
        run(demo, "x = 1\n" * 10)
        found = json.loads(logger.save_logs().read_text())["decisions"]
    assert [(d["token_idx"], d["layer_idx"]) for d in found] == [
        (token, layer) for token in range(0, 30, 3) for layer in range(4)
    ]
    for batch in open_log(logger.run_dir).batches(["layer", "logits", "position"]):
        layer = batch["layer"][0].as_py()
        assert batch["position"].to_pylist() == list(range(60))
        p = empirical_p_values(logits_of(batch))
        for d in found:
            if d["layer_idx"] == layer:
                assert d["p_values"] == p[d["token_idx"]].tolist()


def test_unpatching_restores_outputs_bit_for_bit(demo):
    before = run(demo)
    with OLMoERouterPatcher(demo.model) as patcher:
        patcher.patch_with_bh(alpha=0.3, max_k=2, kde=normal_kde(range(4)))
        assert not torch.equal(run(demo), before)
    assert torch.equal(run(demo), before)


def test_patching_again_starts_afresh(demo, tmp_path):
    logger = BHRoutingLogger(tmp_path, "again")
    with OLMoERouterPatcher(demo.model) as patcher:
        for alpha, text in ((0.3, "first"), (0.5, "second text")):
            patcher.patch_with_bh(alpha=alpha, logger=logger, kde=normal_kde(range(4)))
            run(demo, text)
        assert {s.tokens for s in patcher.stats.values()} == {len("second text")}
        summary = logger.get_summary()
    assert summary["total_tokens"] == len("second text")
    assert open_log(logger.run_dir).manifest.routing.options.alpha == 0.5


def test_a_patch_that_fails_closes_its_run(demo, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no hook")

    monkeypatch.setattr(OLMoERouterPatcher, "_attach", fail)
    logger = BHRoutingLogger(tmp_path, "fails")
    with pytest.raises(RuntimeError, match="no hook"):
        OLMoERouterPatcher(demo.model).patch_with_bh(logger=logger, kde=normal_kde(range(4)))
    assert open_log(logger.run_dir).manifest.error == "RuntimeError: no hook"


def test_stats_count_what_the_run_holds(demo, tmp_path):
    logger = BHRoutingLogger(tmp_path, "stats")
    with OLMoERouterPatcher(demo.model) as patcher:
        patcher.patch_with_bh(alpha=0.4, max_k=8, logger=logger, kde=normal_kde(range(4)))
        run(demo)
        stats = patcher.stats
    for batch in open_log(logger.run_dir).batches(["layer", "n_selected", "experts"]):
        mine = stats[batch["layer"][0].as_py()]
        n = batch["n_selected"].to_numpy()
        assert mine.selected.tolist() == np.bincount(n, minlength=65).tolist()
        load = np.bincount(batch["experts"].flatten().to_numpy(), minlength=64)
        assert mine.load.tolist() == load.tolist()
        assert mine.mean_experts == pytest.approx(n.mean())


def test_without_a_logger_nothing_is_recorded(demo):
    with OLMoERouterPatcher(demo.model) as patcher:
        patcher.patch_with_bh(alpha=0.3, collect_stats=False, kde=normal_kde(range(4)))
        run(demo)
        assert patcher.recorder is None and patcher.stats == {}


def test_a_json_log_that_cannot_be_written_leaves_nothing(tmp_path):
    logger = BHRoutingLogger(tmp_path, "mine")
    benjamini_hochberg_routing(torch.zeros(1, 8), max_k=4, logger=logger)
    (tmp_path / "logs" / "mine_bh_log.json").mkdir(parents=True)
    with pytest.raises(OSError, match=r"mine_bh_log\.json"):
        logger.save_logs()
    assert not list(tmp_path.rglob("*.part"))


def test_clear_forgets_and_goes_on(demo, tmp_path):
    logger = BHRoutingLogger(tmp_path, "clear")
    with OLMoERouterPatcher(demo.model) as patcher:
        patcher.patch_with_bh(alpha=0.3, logger=logger, kde=normal_kde(range(4)))
        run(demo, "gone")
        logger.clear()
        run(demo, "kept text")
        assert logger.get_summary()["total_tokens"] == len("kept text")


def test_a_logger_of_a_patched_model_takes_no_other_decisions(demo, tmp_path):
    logger = BHRoutingLogger(tmp_path, "patched")
    with OLMoERouterPatcher(demo.model) as patcher:
        patcher.patch_with_bh(alpha=0.3, logger=logger, kde=normal_kde(range(4)))
        run(demo, "text")
        for _ in range(2):  # patched, and after
            with pytest.raises(InvalidOption, match="holds the run of a patched model"):
                benjamini_hochberg_routing(torch.zeros(1, 8), max_k=4, logger=logger)
            patcher.unpatch()
    assert logger.get_summary()["total_tokens"] == len("text")
    logger.clear()
    assert logger.get_summary() == {"total_decisions": 0}
    benjamini_hochberg_routing(torch.zeros(1, 8), max_k=4, logger=logger)
    assert logger.get_summary()["total_decisions"] == 1


@pytest.mark.parametrize("saved", [False, True])
def test_a_logger_of_the_function_follows_no_model(demo, tmp_path, saved):
    logger = BHRoutingLogger(tmp_path, "function")
    benjamini_hochberg_routing(torch.zeros(1, 8), max_k=4, logger=logger)
    if saved:
        logger.save_logs()
    with OLMoERouterPatcher(demo.model) as patcher:
        with pytest.raises(InvalidOption, match="holds decisions of benjamini_hochberg_routing"):
            patcher.patch_with_bh(logger=logger, kde=normal_kde(range(4)))
        assert logger.get_summary()["total_decisions"] == 1
        logger.clear()
        patcher.patch_with_bh(logger=logger, kde=normal_kde(range(4)))


def test_a_logger_replaces_only_what_a_logger_wrote(demo, tmp_path):
    folder = tmp_path / "logs" / "mine"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("precious")
    with OLMoERouterPatcher(demo.model) as patcher, pytest.raises(RunExists):
        patcher.patch_with_bh(logger=BHRoutingLogger(tmp_path, "mine"), kde=normal_kde(range(4)))
    assert (folder / "notes.txt").read_text() == "precious"


def test_an_experiment_is_replaced_with_its_replays(demo, tmp_path):
    with OLMoERouterPatcher(demo.model) as patcher:
        for _ in range(2):
            logger = BHRoutingLogger(tmp_path, "again")
            patcher.patch_with_bh(logger=logger, kde=normal_kde(range(4)))
            assert not (logger.run_dir / "replay").exists()
            (logger.run_dir / "replay" / "bh_a0.3").mkdir(parents=True)


def test_a_file_of_the_user_keeps_the_experiment_whole(demo, tmp_path):
    with OLMoERouterPatcher(demo.model) as patcher:
        logger = BHRoutingLogger(tmp_path, "mine")
        patcher.patch_with_bh(logger=logger, kde=normal_kde(range(4)))
        run(demo, "text")
        patcher.unpatch()
        (logger.run_dir / "notes.txt").write_text("precious")
        before = sorted(logger.run_dir.rglob("*"))
        with pytest.raises(RunExists, match=r"notes\.txt: not part of a run"):
            patcher.patch_with_bh(
                logger=BHRoutingLogger(tmp_path, "mine"), kde=normal_kde(range(4))
            )
    assert sorted(logger.run_dir.rglob("*")) == before


@pytest.mark.parametrize("name", ["", "../up", "a/b"])
def test_an_experiment_name_is_a_plain_name(tmp_path, name):
    with pytest.raises(InvalidOption, match="plain name"):
        BHRoutingLogger(tmp_path, name)


def test_other_models_are_refused():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel):
        OLMoERouterPatcher(MixtralForCausalLM(config))


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_the_function_routes_as_the_rule_says(shape):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (*shape, 16)).astype(np.float32)
    kde = normal_kde([5])
    weights, experts, counts, stats = benjamini_hochberg_routing(
        torch.from_numpy(logits), alpha=0.3, max_k=6, layer_idx=5, kde_models=kde,
        return_stats=True,
    )  # fmt: skip
    flat = logits.reshape(-1, 16)
    expected = decide(flat, kde[5].thresholds(0.3, 16), min_k=1, max_k=6)
    assert counts.shape == shape and counts.flatten().tolist() == expected.n_selected.tolist()
    for i, n in enumerate(expected.n_selected):
        row = experts.reshape(-1, 6)[i].tolist()
        assert row == [*expected.order[i, :n].tolist(), *[-1] * (6 - n)]
        assert set(weights.reshape(-1, 16)[i].nonzero().flatten().tolist()) == set(row) - {-1}
    # float32 sums of at most 6 weights
    assert torch.allclose(weights.sum(-1), torch.ones(shape), atol=1e-6)
    assert stats["p_values"].shape == logits.shape and stats["p_values"].dtype == torch.float64
    assert stats["critical_values"].tolist() == pytest.approx([k * 0.3 / 16 for k in range(1, 17)])
    assert torch.equal(stats["selected_mask"].sum(-1), counts)
    p = compute_pvalues_kde(torch.from_numpy(logits), 5, kde)
    assert torch.equal(p, stats["p_values"])


def test_the_function_without_a_null_ranks_the_call():
    logits = torch.tensor([[3.0, 1.0], [2.0, 5.0], [1.0, 4.0], [0.0, 0.0]])
    assert compute_pvalues_empirical(logits).tolist() == [
        [0.25, 0.75], [0.5, 0.25], [0.75, 0.5], [1.0, 1.0],
    ]  # fmt: skip
    _, _, counts = benjamini_hochberg_routing(logits, alpha=0.5, max_k=2)
    assert counts.tolist() == [1, 2, 1, 1]


def test_the_function_logs_every_nth_token(tmp_path):
    logger = BHRoutingLogger(tmp_path, "function")
    kde = normal_kde([0, 1])
    logits = torch.randn(2, 7, 8)
    for layer in (0, 1):
        benjamini_hochberg_routing(
            logits, max_k=4, layer_idx=layer, kde_models=kde, logger=logger,
            log_every_n_tokens=3, sample_idx=10,
        )  # fmt: skip
    logger.save_logs()
    tokens = open_log(logger.run_dir).tokens(["sequence", "position"]).to_pylist()
    assert [(t["sequence"], t["position"]) for t in tokens] == [
        (10, 0), (10, 3), (10, 6), (11, 0), (11, 3), (11, 6),
    ]  # fmt: skip


def test_the_function_names_bad_options():
    with pytest.raises(InvalidOption, match="max_k is 16, but the model has 8 experts"):
        benjamini_hochberg_routing(torch.zeros(1, 8))
    with pytest.raises(KdeMismatch, match="layers 0, but not 3"):
        benjamini_hochberg_routing(
            torch.zeros(1, 8), max_k=4, layer_idx=3, kde_models=normal_kde([0])
        )


def strictly_larger(x, alpha):
    """Experts a token if strictly larger logits are counted, as earlier notebooks did."""
    p = np.array([[(x[:, i] > v).mean() for i, v in enumerate(row)] for row in x])
    ranks = np.arange(1, x.shape[1] + 1)
    return float(((np.sort(p) <= ranks * alpha / x.shape[1]) * ranks).max(axis=1).mean())


def test_what_earlier_notebooks_counted_is_told_once_and_measured():
    notebook._warn_of_the_larger_logits.cache_clear()
    noise = [np.random.default_rng(seed).normal(size=(50, 64)) for seed in range(12)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = [
            benjamini_hochberg_routing(torch.tensor(x), 0.6, min_k=0)[2].double().mean()
            for x in noise
        ]
    assert ["strictly larger" in str(w.message) for w in told] == [True]
    earlier = [strictly_larger(x, 0.6) for x in noise]
    words = re.search(r"took (.*) experts a token, where (.*) are rejected", str(told[0].message))
    took, rejected = words.groups()
    assert np.mean(earlier) == pytest.approx(float(took), abs=0.4)
    assert np.mean(ours) == pytest.approx(float(rejected), abs=0.4)


def test_a_token_at_a_time_without_a_null_model_is_told_to_reject_nothing(recwarn):
    with pytest.warns(UserWarning, match="a forward of 1 row are at least 1: BH at alpha 0.9"):
        _, _, counts = benjamini_hochberg_routing(torch.randn(1, 64), alpha=0.9, min_k=0)
    assert counts.tolist() == [0]
    with pytest.warns(UserWarning, match="a forward of 9 rows are at least 0.111"):
        benjamini_hochberg_routing(torch.randn(9, 64), alpha=0.1)
    benjamini_hochberg_routing(torch.randn(10, 64), alpha=0.1)
    assert not [w for w in recwarn if "a forward of" in str(w.message)]


def test_the_null_model_may_be_a_plain_dict_as_notebooks_kept_it():
    logits = torch.randn(30, 64)
    kde = normal_kde(range(2))
    plain = {layer: {"x": kde[layer]["x"], "cdf": kde[layer]["cdf"]} for layer in kde}
    expected = benjamini_hochberg_routing(logits, 0.3, layer_idx=1, kde_models=kde)
    for given in (plain, dict(kde), {1: plain[1]}):
        found = benjamini_hochberg_routing(logits, 0.3, layer_idx=1, kde_models=given)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        p = compute_pvalues_kde(logits, 1, given)
        torch.testing.assert_close(p, compute_pvalues_kde(logits, 1, kde), rtol=1e-9, atol=1e-15)
    with pytest.raises(KdeMismatch, match="layers 0, but not 1"):
        benjamini_hochberg_routing(logits, layer_idx=1, kde_models={0: plain[0]})
    with pytest.raises(CorruptKde, match=r"layer 1 of the null model: holds \['x'\]"):
        benjamini_hochberg_routing(logits, layer_idx=1, kde_models={1: {"x": plain[1]["x"]}})
    with pytest.raises(CorruptKde, match="layer 1 of the null model is a int"):
        benjamini_hochberg_routing(logits, layer_idx=1, kde_models={1: 3})


def test_an_empty_dict_of_null_models_is_none():
    logits = torch.randn(30, 64)
    found = benjamini_hochberg_routing(logits, 0.5, kde_models={})
    expected = benjamini_hochberg_routing(logits, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(KdeMismatch, match="no null model in kde_models"):
        compute_pvalues_kde(logits, 0, {})


def test_a_loaded_layer_answers_as_the_dict_that_notebooks_kept(tmp_path):
    normal_kde(range(2)).save(tmp_path / "null.parquet")
    models = load_kde_models(tmp_path / "null.parquet")
    layer = models[0]
    assert "x" in layer and "cdf" in layer and "pdf" not in layer
    assert list(layer) == list(layer.keys()) == ["x", "cdf"] and len(layer) == 2
    assert [len(values) for values in layer.values()] == [len(layer["x"])] * 2
    assert layer.get("pdf") is None and dict(layer.items()).keys() == {"x", "cdf"}
