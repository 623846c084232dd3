import polars as pl
import pytest

from bhlog.analysis.null.estimate import fit_kde
from bhlog.analysis.replay.comparison import compare
from bhlog.analysis.replay.held_out import held_out, kinds_of_null
from bhlog.analysis.replay.match import match_experts
from bhlog.analysis.replay.registry import parse_policy
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.rule import Bounds
from tests.synthetic import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate("ab"):
        write_run(folder / name, layers=(0, 1), n_experts=16, top_k=4, seed=seed)
    write_run(folder / "other", layers=(0, 1), n_experts=8, top_k=4, seed=3)
    return [open_log(folder / name) for name in ("a", "b", "other")]


def test_parameters_are_of_one_run_and_the_rest_of_the_other(runs):
    a, b, _ = runs
    bounds = Bounds(max_k=8)
    table = held_out(a, b, ["bh", "threshold", "topk"], 3, bounds=bounds)
    kinds = kinds_of_null(4)
    assert [*table["null"].drop_nulls().sort()] == sorted(kinds)
    assert table["probability_kept"].is_sorted(descending=True)
    for row in table.rows(named=True):
        kde = None if row["null"] is None else fit_kde([a], kinds[row["null"]])
        family = parse_policy(row["policy"].partition(":")[0], open_value=True)
        (policy,) = match_experts(a, [family], 3, kde=kde, bounds=bounds)
        assert row["policy"] == str(policy)
        for log, column in ((a, "fitted_experts"), (b, "mean_experts")):
            whole = compare(log, [policy], kde=kde, bounds=bounds).filter(pl.col("layer").is_null())
            assert row[column] == whole["mean_experts"].item()
        assert row["noise_experts"] == whole["noise_experts"].item()
    assert (table["fitted_experts"] - 3).abs().max() < 0.1
    assert (table["fitted_experts"] != table["mean_experts"]).any()


def test_a_run_is_not_tested_on_itself_nor_another_model(runs):
    a, _, other = runs
    with pytest.raises(InvalidOption, match="are one run"):
        held_out(a, a, ["topk"], 3)
    with pytest.raises(InvalidOption, match="models of other shape"):
        held_out(a, other, ["topk"], 3)
