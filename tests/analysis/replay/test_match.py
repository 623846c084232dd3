import numpy as np
import polars as pl
import pytest

import bhlog.analysis.replay.sampling as sampling
from bhlog.analysis.fold import Scope
from bhlog.analysis.replay import match
from bhlog.analysis.replay.comparison import compare
from bhlog.analysis.replay.match import TOLERANCE, match_experts
from bhlog.analysis.replay.registry import families, parse_policy
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.rule import BhOptions, Bounds
from tests.synthetic import normal_kde, write_run

LAYERS, E = (0, 1), 16
STEPS = {"topk", "hc", "hc+"}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget") / "run"
    options = BhOptions(alpha=0.3, max_k=12)
    rng = np.random.default_rng(0)  # no equal logits, so that means move in steps of one row
    logits = rng.normal(-0.5, 1.5, (len(LAYERS), 12, 200, E)).astype(np.float32)
    return open_log(
        write_run(
            folder,
            layers=LAYERS,
            n_experts=E,
            n_sequences=24,
            length=100,
            n_shards=12,
            options=options,
            kde=normal_kde(LAYERS),
            logits=logits,
        )
    )


@pytest.fixture
def small_samples(monkeypatch):
    """A log that a sample does not hold: 200 rows of 2,400 of a layer, of 8 groups of 12."""
    monkeypatch.setattr(sampling, "MOST_ROWS", 200)


def every_family():
    return [parse_policy(name, open_value=True) for name in families() if name != "lfdr"]


def means(log, policies, **options):
    frame = compare(log, policies, **options).filter(pl.col("layer").is_null())
    return dict(zip([policy.name for policy in policies], frame["mean_experts"], strict=True))


def reached(log, policies, goal, **options):
    """Whether each policy is at the goal, or at its nearest step."""
    rows = compare(log, policies, **options)["rows"][-1]
    for policy, (name, mean) in zip(policies, means(log, policies, **options).items(), strict=True):
        if name not in STEPS:
            step = 0.005 if name == "seqtopk" else E / rows  # a token a sequence; one row by E
            assert abs(mean - goal) <= max(TOLERANCE, step), name
            continue
        steps = [kind_at(policy, k) for k in range(1, E + 1)]
        every = compare(log, steps, **options).filter(pl.col("layer").is_null())["mean_experts"]
        assert abs(mean - goal) == pytest.approx(min(abs(m - goal) for m in every)), name
    return True


def kind_at(policy, k):
    return policy.at(policy.value_at((k - 1) / (E - 1) if policy.name == "topk" else k / E, E))


@pytest.mark.parametrize("goal", [1.5, 4.0, 9.3])
def test_a_log_larger_than_the_sample_is_brought_to_the_budget(log, small_samples, goal):
    policies = [p for p in every_family() if p.name != "by" or goal < 2]  # it cannot reach more
    assert reached(log, match_experts(log, policies, goal), goal)


def test_a_log_that_fits_the_sample_needs_no_pass(log, monkeypatch):
    monkeypatch.setattr(match, "fold", None)
    policies = match_experts(log, every_family(), 2.2)
    monkeypatch.undo()
    assert reached(log, policies, 2.2)


def test_a_sample_that_misleads_costs_passes_not_the_budget(log, small_samples, monkeypatch):
    monkeypatch.setattr(match, "SPREAD", 1e-3)  # as if the sample told the mean nearly exactly
    policies = [parse_policy(name, open_value=True) for name in ("bh", "topp", "threshold")]
    assert reached(log, match_experts(log, policies, 4.2), 4.2)


@pytest.mark.parametrize("small", [False, True])
def test_what_cannot_reach_the_budget_stops_at_its_nearest(log, monkeypatch, small):
    if small:
        monkeypatch.setattr(sampling, "MOST_ROWS", 200)
    policies = [parse_policy(text, open_value=True) for text in ("bh,min_k=3", "topp,max_k=5")]
    fewest, _ = match_experts(log, policies, 2.0)
    assert means(log, [fewest])["bh"] == 3.0
    _, most = match_experts(log, policies, 7.0)
    assert means(log, [most])["topp"] == 5.0


def test_bounds_layers_and_rows_are_those_of_the_comparison(log, small_samples):
    options = {"bounds": Bounds(2, 9), "scope": Scope([1], "position >= 40")}
    policies = [parse_policy(name, open_value=True) for name in ("bh", "topp", "threshold")]
    assert reached(log, match_experts(log, policies, 5.2, **options), 5.2, **options)


def test_options_stay_and_bounds_are_not_written_into_the_policy(log):
    (policy,) = match_experts(log, [parse_policy("storey,lambda=0.8", open_value=True)], 4)
    assert str(policy).startswith("storey:") and str(policy).endswith(",lambda=0.8")


def test_compare_matches_first_when_a_budget_is_given(log):
    frame = compare(log, ["bh", "topk", "topp:0.9"], experts=4)
    overall = frame.filter(pl.col("layer").is_null())
    assert np.allclose(overall["mean_experts"], 4, atol=TOLERANCE)


@pytest.mark.parametrize("goal", [-1, 17, float("nan")])
def test_a_budget_beyond_the_experts_is_an_error(log, goal):
    with pytest.raises(InvalidOption, match="from 0 to the model's 16 experts"):
        match_experts(log, every_family(), goal)


def test_no_rows_is_an_error(log):
    with pytest.raises(InvalidOption, match="no rows where forward > 999"):
        match_experts(log, every_family(), 4, scope=Scope(where="forward > 999"))
