import inspect

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from bhlog.analysis.log import Log
from bhlog.analysis.run import Run, open_log
from bhlog.analysis.sweep.profile import Profile
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch, MissingRun
from bhlog.capture.contract.null.fit import FitOptions
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

LAYERS = (0, 2)
SHAPE = {"layers": LAYERS, "n_experts": 16, "n_sequences": 4, "length": 30, "top_k": 4}
VERBS = {
    "replay",
    "sweep",
    "compare",
    "cache",
    "explore",
    "fidelity",
    "report",
    "fit",
    "check",
    "sql",
    "plot",
    "verify",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A native and a BH run over the same text, and their null model."""
    folder = tmp_path_factory.mktemp("runs")
    kde = normal_kde(LAYERS)
    kde.save(folder / "null.parquet")
    write_run(folder / "native", **SHAPE)
    write_run(folder / "bh", options=BhOptions(alpha=0.3, max_k=8), kde=kde, **SHAPE)
    return folder


def test_a_run_has_the_verbs_and_a_log_has_none():
    assert {name for name in dir(Run) if not name.startswith("_")} - set(dir(Log)) == VERBS
    assert all(getattr(Run, verb).__doc__ for verb in VERBS)


def test_opening_what_is_not_a_run_says_so(tmp_path):
    with pytest.raises(MissingRun, match="no such folder"):
        open_log(tmp_path / "nothing")


def test_a_null_model_may_be_named_by_path_wherever_a_verb_takes_one(folder):
    run, kde = open_log(folder / "native"), normal_kde(LAYERS)
    for named in (folder / "null.parquet", str(folder / "bh"), open_log(folder / "bh")):
        assert_frame_equal(run.replay(0.2, kde=named), run.replay(0.2, kde=kde))
        frame = run.compare(["bh:0.2", "topk:3"], kde=named)
        assert_frame_equal(frame, run.compare(["bh:0.2", "topk:3"], kde=kde))
        assert_frame_equal(run.check(named), run.check(kde))
        assert run.sweep(named).kde_sha256 == kde.sha256
    with pytest.raises(KdeMismatch, match="no null model of its own"):
        run.replay(0.2)


def test_a_run_may_be_named_by_path_wherever_a_verb_takes_one(folder):
    native, bh = open_log(folder / "native"), open_log(folder / "bh")
    expected = native.fidelity(bh)
    assert expected["same_experts"].to_list() == [1.0, 1.0]
    assert_frame_equal(native.fidelity(folder / "bh"), expected)
    assert_frame_equal(native.fidelity(str(folder / "bh")), expected)
    both = native.fit(FitOptions(trim_high=4), also=[folder / "bh"])
    assert both[0].curves[0].n == 2 * native.fit(FitOptions(trim_high=4))[0].curves[0].n


def test_rows_are_chosen_alike_by_all_verbs(folder):
    bh = open_log(folder / "bh")
    rows = {"layers": [2], "where": "position < 10"}
    n = 4 * 10
    assert bh.replay(0.3, **rows)["rows"].to_list() == [n, n]
    assert bh.compare(["bh:0.3"], **rows)["rows"].to_list() == [n, n]
    assert bh.sweep(**rows).rows(2) == n
    assert bh.fit(**rows)[2].curves[0].n == n * 16
    assert bh.check(**rows)["n"].to_list() == [n * 16]
    with pytest.raises(TypeError, match="lyers"):
        bh.replay(0.3, lyers=[2])


def test_verify_answers_with_a_finding_a_row(folder):
    frame = open_log(folder / "bh").verify(replay=True)
    assert frame.columns == ["check", "status", "where", "detail"]
    assert set(frame["status"]) == {"ok"}
    assert frame.filter(pl.col("check") == "replay").height == len(LAYERS)


def test_a_run_and_what_it_gives_have_short_reprs(folder):
    run = open_log(folder / "bh")
    texts = [repr(run), repr(run.kde), repr(run.sweep())]
    assert texts[0] == f"Run('{folder}/bh': bh, 2 layers of 16 experts, 240 rows)"
    assert texts[1] == "KdeModel(2 layers, pooled over experts)"
    assert texts[2].startswith("Profile(2 layers of 16 experts, 1,790 alphas from 1e-06 to 0.999,")
    assert all(len(text) < 160 + len(str(folder)) and "array" not in text for text in texts)


def test_decisions_are_of_every_row(folder, tmp_path):
    with pytest.raises(InvalidOption, match="every row"):
        open_log(folder / "bh").replay(0.3, out=tmp_path / "out", where="position < 3")
    open_log(folder / "bh").replay(0.3, out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["alpha-0.3_k-1-8"]


def test_a_profile_is_what_a_sweep_gives(folder):
    assert isinstance(open_log(folder / "bh").sweep(alphas=[0.1, 0.3]), Profile)


def test_verbs_say_which_rows_they_read_by_one_bundle():
    for verb in ("replay", "sweep", "compare", "cache", "fit", "check"):
        parameters = inspect.signature(getattr(Run, verb)).parameters
        assert "rows" in parameters
        assert not {"layers", "where", "threads"} & set(parameters)
