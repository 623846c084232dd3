import numpy as np
import pytest

from bhlog.analysis.fold import Scope, sampled
from bhlog.analysis.log import logits_of
from bhlog.analysis.null.estimate import FitOptions, fit_kde
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.null.curve import NullCurve
from bhlog.capture.contract.null.histogram import Histogram
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.null.trim import Trim
from tests.synthetic import normal_kde, same_histogram, without_logits, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return write_run(folder, layers=(0, 2, 5), n_experts=16, n_sequences=6, length=60, seed=3)


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "other"
    return write_run(folder, layers=(0, 2, 5), n_experts=16, n_sequences=3, length=40, seed=4)


def logits_by_layer(log, where=None):
    found = {}
    for batch in log.batches(["layer", "logits"], where=where):
        found.setdefault(batch.column("layer")[0].as_py(), []).append(logits_of(batch))
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def same(a, b):
    return a.to_bytes() == b.to_bytes()


def test_a_fit_from_a_log_counts_every_logit_once(run):
    log = open_log(run)
    model = fit_kde(log)
    assert sorted(model) == [0, 2, 5]
    for layer, logits in logits_by_layer(log).items():
        curve = model[layer].curves[0]
        assert same_histogram(curve.histogram, Histogram.of(logits))
        assert curve.bandwidth == pytest.approx(
            logits.astype(float).std(ddof=1) * logits.size**-0.2
        )
        assert curve.source == (log.manifest.run_id,)
        assert (curve.kernel, curve.rule, curve.n) == ("gaussian", "scott", logits.size)


def test_threads_do_not_change_a_fit(run):
    assert same(
        fit_kde(open_log(run), scope=Scope(threads=1)),
        fit_kde(open_log(run), scope=Scope(threads=5)),
    )


def test_layers_where_and_several_runs(run, other_run):
    log = open_log(run)
    model = fit_kde(log, scope=Scope([2], "position < 10"))
    assert list(model) == [2]
    assert model[2].curves[0].n == 6 * 10 * 16
    both = fit_kde([log, open_log(other_run)])
    assert both[0].curves[0].n == (6 * 60 + 3 * 40) * 16
    assert len(both[0].curves[0].source) == 2
    with pytest.raises(
        InvalidOption, match=r"no rows of layers 0, 2, 5 in .* where position > 999"
    ):
        fit_kde(log, scope=Scope(where="position > 999"))


def test_trimming_leaves_out_the_ends_of_each_row(run):
    log = open_log(run)
    model = fit_kde(log, FitOptions(trim_low=1, trim_high=3, keep=((0, 0),)))
    for layer, logits in logits_by_layer(log).items():
        ranked = np.sort(logits, axis=1)
        curve = model[layer].curves[0]
        assert same_histogram(curve.histogram, Histogram.of(ranked[:, 1:-3]))
        assert same_histogram(curve.kept[Trim(0, 0)], Histogram.of(logits))
    with pytest.raises(InvalidOption, match="leave nothing of rows of 16 experts"):
        fit_kde(log, FitOptions(trim_high=16))


def test_one_null_per_expert(run):
    log = open_log(run)
    model = fit_kde(log, FitOptions(null="expert"))
    for layer, logits in logits_by_layer(log).items():
        assert [curve.expert for curve in model[layer].curves] == list(range(16))
        for expert, curve in enumerate(model[layer].curves):
            assert same_histogram(curve.histogram, Histogram.of(logits[:, expert]))


def test_a_sample_is_of_whole_tokens_and_always_the_same(run):
    log = open_log(run)
    tokens = {}
    for batch in log.batches(["layer", "rank", "sequence", "position"]):
        chosen = batch.filter(sampled(batch, 0.3))
        columns = (chosen.column(name).to_pylist() for name in ("sequence", "position"))
        tokens.setdefault(batch.column("layer")[0].as_py(), set()).update(
            zip(*columns, strict=True)
        )
    assert tokens[0] == tokens[2] == tokens[5]
    assert 0.2 < len(tokens[0]) / 360 < 0.4
    model = fit_kde(log, scope=Scope(sample=0.3))
    assert model[0].curves[0].n == len(tokens[0]) * 16
    assert same(model, fit_kde(log, scope=Scope(sample=0.3)))
    with pytest.raises(InvalidOption, match="sample must be above 0"):
        fit_kde(log, scope=Scope(sample=0))


def test_nan_and_infinite_logits_are_counted_and_left_out(tmp_path):
    logits = np.random.default_rng(0).normal(size=(1, 1, 20, 16)).astype(np.float32)
    logits[0, 0, 3, 4], logits[0, 0, 5, :3] = np.nan, np.inf
    shape = {"layers": (0,), "n_sequences": 1, "length": 20, "n_shards": 1}
    run = write_run(tmp_path / "broken", **shape, logits=logits)
    curve = fit_kde(open_log(run))[0].curves[0]
    assert (curve.n, curve.histogram.left_out) == (20 * 16 - 4, 4)
    trimmed = fit_kde(open_log(run), FitOptions(trim_high=2))[0].curves[0]
    assert (trimmed.n, trimmed.histogram.left_out) == (20 * 14 - 4, 4)
    none = write_run(tmp_path / "none", **shape, logits=np.full_like(logits, np.nan))
    with pytest.raises(InvalidOption, match=r"layer 0 has no finite logit .* \(320 were left out"):
        fit_kde(open_log(none))


def test_runs_of_different_models_are_refused(run, tmp_path):
    other = write_run(tmp_path / "other", layers=(0, 1), n_experts=8)
    with pytest.raises(KdeMismatch, match="has layers 0-1 of 8 experts"):
        fit_kde([open_log(run), open_log(other)])


CHANGES = {
    "same": {},
    "kernel": {"kernel": "epanechnikov"},
    "none": {"kernel": "none"},
    "number": {"bandwidth": 0.1},
    "isj": {"bandwidth": "isj"},
    "trim": {"trim_high": 4},
    "all": {"kernel": "tophat", "bandwidth": "silverman", "trim_high": 4},
}


@pytest.mark.parametrize("null", ["pooled", "expert"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_refit_equals_a_fit_from_scratch(run, null, change):
    log = open_log(run)
    fitted = fit_kde(log, FitOptions(null=null, keep=((0, 4),)))
    trim_high = CHANGES[change].get("trim_high", 0)
    keep = ((0, 0), (0, 4))
    scratch = fit_kde(log, FitOptions(null=null, keep=keep, **CHANGES[change]))
    again = fitted.refit(**CHANGES[change])
    assert again[0].curves[0].trim_high == trim_high
    assert same(again, scratch)
    assert same(again.refit(kernel="gaussian", bandwidth="scott", trim_high=0), fitted)


def test_a_refit_at_a_level_the_file_does_not_keep_is_refused(run):
    model = fit_kde(open_log(run), FitOptions(keep=((0, 4),)))
    with pytest.raises(InvalidOption, match="trim_high 5; it keeps 0:0, 0:4"):
        model.refit(trim_high=5)
    with pytest.raises(KdeMismatch, match="imported"):
        imported().refit()


def imported():
    model = normal_kde([0])
    (curve,) = model[0].curves
    bare = NullCurve(expert=None, n=0, x0=curve.x0, dx=curve.dx, tail=curve.tail, source=("a.pkl",))
    return KdeModel({0: type(model[0])(0, (bare,))})


@pytest.mark.parametrize("null", ["pooled", "expert"])
def test_merging_equals_fitting_together_in_any_order(run, other_run, null):
    options = FitOptions(null=null, trim_high=2, keep=((0, 0),))
    a, b = (fit_kde(open_log(path), options) for path in (run, other_run))
    together = fit_kde([open_log(run), open_log(other_run)], options)
    assert same(a.merge(b), together)
    assert same(b.merge(a), together)
    parts = [
        fit_kde(open_log(run), options, scope=Scope(where=f"sequence % 3 = {i}")) for i in range(3)
    ]
    assert same(parts[0].merge(parts[1]).merge(parts[2]), a)
    assert same(parts[2].merge(parts[1].merge(parts[0])), a)


def test_models_of_other_routers_do_not_merge(run, tmp_path):
    model = fit_kde(open_log(run))
    assert (model.n_experts, model.refit(bandwidth=0.1).n_experts) == (16, 16)
    of_8 = write_run(tmp_path / "of_8", layers=(0, 2, 5), n_experts=8, n_sequences=2, length=9)
    with pytest.raises(KdeMismatch, match="routers of 8 and 16 experts"):
        model.merge(fit_kde(open_log(of_8)))


def test_merging_keeps_layers_and_refuses_what_does_not_fit(run):
    log = open_log(run)
    model = fit_kde(log)
    parts = fit_kde(log, scope=Scope([0])).merge(fit_kde(log, scope=Scope([2, 5])))
    assert same(parts, model)
    with pytest.raises(InvalidOption, match="fitted differently"):
        model.merge(model.refit(kernel="tophat"))
    with pytest.raises(InvalidOption, match="fitted differently"):
        model.merge(fit_kde(log, FitOptions(null="expert")))
    with pytest.raises(KdeMismatch, match=r"imported from a\.pkl"):
        model.merge(imported())
    assert same(model.merge(), model)


def test_a_run_without_logits_has_no_null_model(run, tmp_path):
    bare = without_logits(write_run(tmp_path / "bare", layers=(0,), n_experts=16))
    with pytest.raises(InvalidOption, match="bare has no logits, only the experts"):
        fit_kde(open_log(bare))


def test_experts_are_fitted_a_few_layers_at_a_time_and_alike(run, monkeypatch):
    log = open_log(run)
    options = FitOptions(null="expert", trim_high=2, keep=((0, 0),))
    together = fit_kde(log, options)
    monkeypatch.setattr("bhlog.analysis.null.estimate.MOST_COUNTED", 1)
    assert fit_kde(log, options).to_bytes() == together.to_bytes()
