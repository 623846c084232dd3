import numpy as np
import pytest

from bhlog.analysis.log import Log
from bhlog.analysis.replay.losses import clustered_mean, loss_difference, loss_of
from bhlog.capture.contract.errors import InvalidOption
from tests.synthetic import write_run


def test_the_error_of_a_mean_is_that_of_a_bootstrap_over_sequences():
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 60, size=80)
    clusters = np.repeat(np.arange(80), sizes)
    values = rng.normal(size=80)[clusters] + rng.normal(size=len(clusters))
    found = clustered_mean(values, clusters)
    sums = np.bincount(clusters, values)
    drawn = rng.integers(0, 80, size=(4000, 80))
    means = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    assert found.mean == pytest.approx(values.mean())
    assert found.se == pytest.approx(means.std(), rel=0.08)  # 4000 draws: about 1 %, and C/(C-1)
    assert found.se > 3 * values.std() / np.sqrt(len(values))  # the naive one


def test_one_sequence_has_no_error():
    assert np.isnan(clustered_mean(np.ones(3), np.zeros(3, dtype=np.int64)).se)


def test_a_run_differs_from_itself_by_nothing(tmp_path):
    run = Log(write_run(tmp_path / "run", n_sequences=4, length=5))
    nll = run.tokens(["nll"])["nll"].drop_null().to_numpy()
    assert loss_of(run).mean == pytest.approx(nll.mean())
    assert loss_difference(run, run) == (0.0, 0.0)


def test_runs_without_a_token_in_common_say_so(tmp_path):
    run = Log(write_run(tmp_path / "run", n_sequences=1, length=1))
    with pytest.raises(InvalidOption, match="holds no losses"):
        loss_of(run)
