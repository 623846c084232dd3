import numpy as np
import pytest

from bhlog.analysis.fold import Scope
from bhlog.analysis.null.estimate import fit_kde
from bhlog.analysis.replay import fidelity as module
from bhlog.analysis.replay.decide import decider_of
from bhlog.analysis.replay.fidelity import fidelity
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

OPTIONS = BhOptions(alpha=0.3, max_k=6)
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A native run and a BH rerun of the same text through a tiny model."""
    torch = pytest.importorskip("torch", reason="a rerun needs torch")
    from bhlog.capture.observe import observe, route
    from tests.capture.tiny import batch, tiny_model

    folder = tmp_path_factory.mktemp("fidelity")
    model = tiny_model()
    ids, mask = batch([9, 14, 6])
    text = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        with observe(model, folder / "native"):
            model(**text)
        kde = fit_kde(open_log(folder / "native"))
        with route(model, folder / "bh", kde=kde, alpha=0.4, max_k=6):
            model(**text)
    return open_log(folder / "native"), open_log(folder / "bh")


def test_the_first_layer_of_a_real_rerun_is_exact(real):
    frame = fidelity(*real)
    first = frame.row(0, named=True)
    assert first["tokens"] == 29
    assert (first["gap"], first["same_count"], first["same_experts"], first["jaccard"]) == (
        0, 1, 1, 1
    )  # fmt: skip
    assert frame["jaccard"][1:].min() > 0.5  # so small a model hardly changes below


def test_each_layer_is_the_plain_comparison_token_by_token(real):
    native, rerun = real
    options = rerun.manifest.routing.options
    frame = fidelity(native, rerun)
    for row in frame.iter_rows(named=True):
        sets = {}
        decider = decider_of(native, [options], rerun.kde)
        for group in native.batches([*decider.columns, "rank", "sequence", "position"]):
            if group["layer"][0].as_py() != row["layer"]:
                continue
            (decided,) = decider.decide(group)
            for i, token in enumerate(group.select(["sequence", "position"]).to_pylist()):
                chosen = decided.order[i, : decided.n_selected[i]].tolist()
                sets[tuple(token.values())] = [set(chosen)]
        for group in rerun.batches(["sequence", "position", "experts"], layers=[row["layer"]]):
            for token in group.to_pylist():
                sets[token["sequence"], token["position"]].append(set(token["experts"]))
        pairs = [*sets.values()]
        assert row["replayed"] == pytest.approx(np.mean([len(a) for a, _ in pairs]))
        assert row["actual"] == pytest.approx(np.mean([len(b) for _, b in pairs]))
        assert row["gap"] == pytest.approx(row["replayed"] - row["actual"])
        assert row["same_count"] == np.mean([len(a) == len(b) for a, b in pairs])
        assert row["same_experts"] == np.mean([a == b for a, b in pairs])
        jaccard = np.mean([len(a & b) / len(a | b) for a, b in pairs])
        assert row["jaccard"] == pytest.approx(jaccard)


def runs(tmp_path, **changes):
    logits = np.random.default_rng(0).normal(-0.4, 1.6, (2, 4, 20, 8)).astype(np.float32)
    common = {"layers": LAYERS, "n_experts": 8, "n_sequences": 4, "length": 20, "top_k": 2}
    native = write_run(tmp_path / "native", n_shards=4, logits=logits, **common)
    kde = normal_kde(LAYERS)
    bh = write_run(
        tmp_path / "bh",
        n_shards=4,
        logits=logits,
        kde=kde,
        **{"options": OPTIONS, **common, **changes},
    )
    return open_log(native), open_log(bh)


@pytest.mark.parametrize("piece", [1, 8 * 7, 8 * 1000])
def test_any_cut_of_the_streams_gives_the_same_answer(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE_LOGITS", piece)
    seen = []
    frame = fidelity(*runs(tmp_path), scope=Scope(progress=seen.append))
    assert frame["tokens"].to_list() == [80, 80]
    assert frame["same_experts"].to_list() == [1, 1]
    assert sum(seen) == 4 * 80


def test_empty_choices_agree(tmp_path):
    frame = fidelity(*runs(tmp_path, options=BhOptions(alpha=1e-6, min_k=0)))
    assert frame["replayed"].to_list() == [0, 0]
    assert frame["jaccard"].to_list() == [1, 1]


def test_tokens_may_come_in_another_order(tmp_path, real):
    native, bh = runs(tmp_path)
    routing = tmp_path / "bh" / "routing"
    first, last = (routing / f"rank00000-{i:05d}.parquet" for i in (0, 3))
    first.rename(tmp_path / "aside")
    last.rename(first)
    (tmp_path / "aside").rename(last)
    assert fidelity(native, open_log(bh.path))["same_experts"].to_list() == [1, 1]


@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_a_rerun_of_part_of_the_text_is_compared_over_that_part(tmp_path):
    native, bh = runs(tmp_path)
    (tmp_path / "bh" / "routing" / "rank00000-00001.parquet").unlink()
    assert fidelity(native, open_log(bh.path))["tokens"].to_list() == [60, 60]


@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_runs_that_cannot_be_compared_say_why(tmp_path):
    native, bh = runs(tmp_path)
    with pytest.raises(InvalidOption, match="native: routed natively; expected a run"):
        fidelity(bh, native)
    other = write_run(tmp_path / "other", layers=(0,), n_experts=8, top_k=2)
    with pytest.raises(InvalidOption, match="models of other shape"):
        fidelity(open_log(other), bh)
    text = write_run(
        tmp_path / "text", layers=LAYERS, n_experts=8, n_sequences=4, length=20, top_k=2,
        n_shards=4, seed=5,
    )  # fmt: skip
    with pytest.raises(InvalidOption, match="hold other texts"):
        fidelity(open_log(text), bh)
    (tmp_path / "native" / "routing" / "rank00000-00002.parquet").unlink()
    with pytest.raises(InvalidOption, match=r"20 of 80 tokens of .*bh are not in .*native"):
        fidelity(open_log(native.path), bh)
