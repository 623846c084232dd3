import contextlib
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bhlog.analysis.replay.settings import settings_of
from bhlog.analysis.run import Run, open_log
from bhlog.analysis.verify.verification import verify
from bhlog.capture.apps.demo import story
from bhlog.capture.contract.errors import MissingExtra, RunExists
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import Bounds

pytestmark = pytest.mark.slow

ALPHAS = (0.05, 0.3)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """A short demonstration: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("story") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setattr(story, "ALPHAS", ALPHAS)
        patch.setattr(story, "FIT_TOKENS", 3072)
        patch.setattr(story, "HELD_OUT_TOKENS", 1536)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            story.tell(out)
    return out, printed.getvalue()


def rows_after(text: str, first: str) -> list[list[str]]:
    """Cells of the table whose header starts with `first`."""
    lines = iter(text.splitlines())
    next(line for line in lines if line.split()[:1] == [first])
    rows = []
    for line in lines:
        if not line.strip():
            return rows
        rows.append(line.split())
    return rows


def test_it_tells_six_steps(demo):
    assert re.findall(r"^(\d)\. ", demo[1], re.MULTILINE) == list("123456")


def test_the_table_is_what_replay_and_the_reruns_say(demo):
    out, text = demo
    native, kde = open_log(out / "native"), KdeModel.load(out / "null.parquet")
    table = rows_after(text, "alpha")
    assert [float(row[0]) for row in table] == list(ALPHAS)
    for alpha, row in zip(ALPHAS, table, strict=True):
        options = settings_of(native, [alpha], bounds=Bounds(max_k=story.MAX_K))[0]
        counts = []
        for batch in native.batches(["layer", "logits"]):
            logits = np.array(batch["logits"].to_pylist(), dtype=np.float32)
            (layer,) = set(batch["layer"].to_pylist())
            thresholds = kde[layer].thresholds(alpha, 64)
            passes = -np.sort(-logits, axis=1) >= thresholds
            n = [max(np.flatnonzero(one) + 1, default=0) for one in passes]
            counts.append(np.clip(n, options.min_k, options.max_k))
        rerun = open_log(out / f"bh-{alpha}")
        used = np.concatenate([b["n_selected"].to_numpy() for b in rerun.batches(["n_selected"])])
        nll = rerun.tokens(["nll"])["nll"].drop_null().to_numpy()
        expected = [np.mean(n) for n in counts] + [np.mean(np.concatenate(counts)), used.mean()]
        np.testing.assert_allclose([float(x) for x in row[1:7]], expected, rtol=1e-3)
        assert float(row[-1]) == pytest.approx(nll.mean(), rel=1e-3)


def test_replay_is_exact_at_the_first_layer_and_reproduces_the_run(demo):
    _, text = demo
    first = rows_after(text, "layer")[0]
    assert [float(x) for x in first[4:]] == [0, 1, 1, 1]  # gap, same_count, same_experts, jaccard
    n_tokens = 2 * 1536
    assert f"{4 * n_tokens:,} rows replayed, 0 disagree" in text


def test_its_runs_are_whole_and_of_held_out_text(demo):
    out, _ = demo
    for run in ("fit", "native", *(f"bh-{alpha}" for alpha in ALPHAS)):
        assert {finding.status for finding in verify(open_log(out / run))} == {"ok"}, run
    native = open_log(out / "native").tokens(["source", "token_id", "sequence"])
    assert set(native["source"].to_pylist()) == {"docs", "code"}


def test_its_figures_are_in_the_run(demo):
    out, text = demo
    figures = sorted((out / "bh-0.3" / "figures").glob("*.png"))
    assert f"{len(figures)} figures in" in text and len(figures) >= 9


def test_an_earlier_demo_makes_room(demo, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(story, "ALPHAS", ALPHAS)
    shutil.copytree(demo[0], tmp_path / "demo")
    story._make_room(tmp_path / "demo")
    left = {path.name for path in (tmp_path / "demo").iterdir()}
    assert left == {"null.parquet", "report.html"}


def test_it_ends_in_a_page(demo):
    out, text = demo
    assert f"open {out / 'report.html'}" in text
    assert 'id="bhlog-profiles"' in (out / "report.html").read_text()


def test_without_bokeh_it_names_the_command_that_installs_it(demo, tmp_path: Path, monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise MissingExtra("this needs the package bokeh: pip install 'bhlog[report]'")

    monkeypatch.setattr(Run, "report", missing)
    native, bh = open_log(demo[0] / "native"), open_log(demo[0] / f"bh-{story.ALPHA}")
    assert story._report(native, bh, tmp_path).endswith("pip install 'bhlog[report]'")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(RunExists, match="not of an earlier demo"):
        story.tell(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_equal_costs_are_those_of_the_reruns(demo):
    out, text = demo
    rows = rows_after(text, "budget")
    assert len(rows) == len(story.BUDGETS) * len(story.FAMILIES)
    for budget, policy, experts, loss, *_ in rows:
        run = open_log(out / story.run_name(policy.partition(":")[0], int(budget)))
        assert str(run.manifest.routing.options.named) == policy
        assert float(experts) == pytest.approx(story.mean_experts(run), abs=1e-3)
        assert abs(float(experts) - int(budget)) < 0.3
        nll = run.tokens(["nll"])["nll"].to_numpy()
        assert float(loss) == pytest.approx(np.nanmean(nll), abs=1e-3)
    said = re.findall(r"^At (\d) experts .*(?:wins over|lose the same)", text, re.MULTILINE)
    assert list(map(int, said)) == list(story.BUDGETS)
    assert "ranks all 10 reruns by loss" in text
