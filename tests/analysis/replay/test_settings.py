import pytest

from bhlog.analysis.replay.comparison import compare, replay
from bhlog.analysis.replay.settings import bounds_of, bounds_words, settings_of
from bhlog.analysis.run import open_log
from bhlog.analysis.sweep.profiling import profile_log
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.rule import BhOptions, Bounds
from tests.synthetic import normal_kde, write_run

LAYERS, E = (0, 1), 16


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    """A BH run at alpha 0.3 whose bounds are 2 to 5."""
    folder = tmp_path_factory.mktemp("settings") / "bh"
    options = BhOptions(alpha=0.3, min_k=2, max_k=5)
    return open_log(write_run(folder, layers=LAYERS, options=options, kde=normal_kde(LAYERS)))


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("settings") / "native", layers=LAYERS)
    normal_kde(LAYERS).save(folder / "kde.parquet")
    return open_log(folder)


def answers(log, **bounds):
    """Mean experts at alpha 0.3 by replay, compare and profile."""
    given = Bounds(**bounds)
    replayed = replay(log, settings_of(log, [0.3], bounds=given))
    compared = compare(log, ["bh:0.3"], bounds=given)
    profile = profile_log(log)
    return [
        replayed["mean_experts"][-1],
        compared["mean_experts"][-1],
        profile.mean_experts(0.3, **bounds),
        profile.frame([0.3], **bounds)["overall"].item(),
    ]


def test_a_run_answers_the_same_everywhere_at_its_own_alpha(bounded):
    logged = [
        n for batch in bounded.batches(["n_selected"]) for n in batch["n_selected"].to_pylist()
    ]
    assert min(logged) == 2 and max(logged) == 5
    assert answers(bounded) == pytest.approx([sum(logged) / len(logged)] * 4, rel=1e-12)


@pytest.mark.parametrize(
    "bounds", [{}, {"min_k": 1, "max_k": E}, {"min_k": 0}, {"max_k": 3}, {"min_k": 4, "max_k": 9}]
)
def test_bounds_mean_the_same_everywhere(bounded, native, bounds):
    for log in (bounded, native):
        found = answers(log, **bounds)
        assert found == pytest.approx([found[0]] * 4, rel=1e-12)
    if bounds != {"min_k": 1, "max_k": E}:
        return
    assert found == pytest.approx(answers(native), rel=1e-12)  # a native run has no bounds
    assert answers(bounded, **bounds)[0] != answers(bounded)[0]


def test_open_bounds_are_those_of_the_run(bounded, native):
    assert bounds_of(bounded) == Bounds(2, 5)
    assert bounds_of(bounded, Bounds(max_k=9)) == Bounds(2, 9)
    assert bounds_of(native) == Bounds()
    assert [(o.min_k, o.max_k) for o in settings_of(native, [0.1])] == [(1, None)]
    with pytest.raises(InvalidOption, match=r"at least min_k \(2\), got 1"):
        settings_of(bounded, [0.1], bounds=Bounds(max_k=1))


def test_a_heading_says_which_bounds_are_in_force(bounded, native):
    assert bounds_words(bounded) == "2 to 5 experts a token, as in the run"
    assert bounds_words(bounded, Bounds(1)) == "1 to 5 experts a token, max_k as in the run"
    assert bounds_words(bounded, Bounds(1, 7)) == "1 to 7 experts a token"
    assert bounds_words(native) == "1 to 16 experts a token: a native run has no bounds of its own"
    assert bounds_words(native, Bounds(0, 4)) == "0 to 4 experts a token"
