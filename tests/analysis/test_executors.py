"""A log is folded on an executor of the caller's: to the same bits, whoever ends first."""

import multiprocessing
import os
import random
import signal
import tempfile
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from bhlog.analysis import fold as folding
from bhlog.analysis.log import Log
from bhlog.analysis.replay import sampling
from bhlog.analysis.run import Run, open_log
from bhlog.capture.contract.errors import InvalidOption, RouterLogError
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs"))


def made(folder):
    """A native run, beside one of BH that logged the same text."""
    shape = {"n_sequences": 12, "length": 20, "n_shards": 6}
    kde = normal_kde((0, 1, 2))
    write_run(folder / "bh", options=BhOptions(alpha=0.3, max_k=8), kde=kde, **shape)
    return open_log(write_run(folder / "run", **shape))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Stretches are many, and a search for a budget takes passes over the log."""
    monkeypatch.setattr(folding, "STRETCH_LOGITS", 16)
    monkeypatch.setattr(sampling, "MOST_ROWS", 50)


def written(run, **how):
    """Name and bytes of each file of a replay."""
    with tempfile.TemporaryDirectory() as out:
        run.replay([0.1, 0.3], kde=normal_kde(run.layers), max_k=8, out=out, **how)
        files = [path for path in Path(out).rglob("*") if path.is_file()]
        return {str(path.relative_to(out)): path.read_bytes() for path in files}


def verified(run, threads=None, **how):
    return Run(run.location.parent / "bh").verify(replay=True, **how)


def trusted(run, threads=None, **how):
    return run.fidelity(run.location.parent / "bh", **how)


VERBS = [
    lambda run, **how: run.replay([0.05, 0.3], kde=normal_kde(run.layers), max_k=8, **how),
    lambda run, **how: run.sweep(normal_kde(run.layers), **how).alpha_for(4, max_k=8),
    lambda run, **how: run.fit(**how).sha256,
    lambda run, **how: str(run.check(normal_kde(run.layers), **how)),
    lambda run, **how: run.compare(
        ["bh", "minp"], experts=4, kde=normal_kde(run.layers), max_k=8, **how
    ),
    written,
    verified,
    trusted,
]


class Backwards(Executor):
    """Runs what it is given in any order, once somebody asks, each task as if sent elsewhere."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future, partial]] = []

    def submit(self, function, /, *args, **kwargs):
        import pickle

        task = pickle.loads(pickle.dumps(partial(function, *args, **kwargs)))
        future = Future()
        future.result = lambda timeout=None: self.run(future)  # type: ignore[method-assign]
        self.waiting.append((future, task))
        return future

    def run(self, wanted):
        random.Random(0).shuffle(self.waiting)
        for future, task in self.waiting:
            future.set_result(task())
        self.waiting = []
        return Future.result(wanted)


def same(a, b):
    return a.equals(b) if hasattr(a, "equals") else a == b


@pytest.mark.parametrize("verb", VERBS)
def test_any_order_gives_the_same_bits(run, verb):
    alone = verb(run, threads=1)
    assert same(verb(run, threads=3), alone)
    assert same(verb(run, executor=Backwards()), alone)


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_pool_of_processes(run, pool, verb):
    there: list[int] = []
    here: list[int] = []
    assert same(verb(run, executor=pool, progress=there.append), verb(run, progress=here.append))
    assert sum(there) == sum(here) >= run.manifest.totals.rows


def test_decisions_of_a_dead_worker_are_no_part_of_a_replay(run, tmp_path):
    """It left half a shard; another one wrote the shard whole."""

    class Dying(Backwards):
        def run(self, wanted):
            for part in tmp_path.glob(".part/*"):
                (part / "rank00000-00000.parquet.0badcafe.part").write_bytes(b"PAR1")
            return super().run(wanted)

    run.replay(0.3, kde=normal_kde(run.layers), max_k=8, out=tmp_path, executor=Dying())
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["_replay.json", *run.shards]


def test_decisions_that_workers_write_elsewhere_are_refused(run, tmp_path):
    class Away(Backwards):
        """Its workers' folder of this name is another one."""

        def run(self, wanted):
            done = super().run(wanted)
            for path in tmp_path.rglob("*.parquet"):
                path.unlink()
            return done

    replay = partial(run.replay, 0.3, kde=normal_kde(run.layers), max_k=8, out=tmp_path)
    with pytest.raises(InvalidOption, match="a worker wrote it, and it is not here; give a folder"):
        replay(executor=Away())
    assert not [*tmp_path.iterdir()]


def test_stretches_depend_on_the_log_alone_and_are_bounded(monkeypatch):
    monkeypatch.setattr(folding, "STRETCH_LOGITS", 1 << 22)
    groups = [folding.RowGroup("s", i, 0, 10_000 + i % 7) for i in range(10_000)]
    for experts in (1, 64, 512):
        parts = folding._cut(groups, lambda group, experts=experts: group.rows * experts)
        logits = 10_003 * 10_000 * experts
        most = min(folding.MOST_STRETCHES, logits / folding.STRETCH_LOGITS)
        assert 0.9 * most < len(parts) <= most + 1
        assert [g for part in parts for g in part] == groups
    assert len(folding._cut(groups, lambda group: 0)) == 1


def test_exact_sums_come_from_several_stretches_a_task(run, monkeypatch):
    n = len(folding.stretches_of(run))
    assert n >= 4
    monkeypatch.setattr(folding, "FEWEST_TASKS", 1)
    for verb, tasks in (
        (lambda how: run.sweep(normal_kde(run.layers), executor=how), -(-n // 4)),
        (lambda how: run.fit(executor=how), -(-n // 4)),
        (lambda how: run.replay(0.3, kde=normal_kde(run.layers), executor=how), n),
    ):
        given: list[Future] = []

        class Counting(Backwards):
            def submit(self, function, /, *args, given=given, **kwargs):
                given.append(super().submit(function, *args, **kwargs))
                return given[-1]

        verb(Counting())
        assert len(given) == tasks


@pytest.mark.parametrize("layers", [None, [1]])
def test_of_many_shards_a_stretch_holds_whole_ones_whose_footers_are_read_once(
    run, layers, monkeypatch
):
    few = run.replay(0.3, kde=normal_kde(run.layers), layers=layers)
    monkeypatch.setattr(folding, "MOST_FOOTERS", 4)
    opened: list[str] = []
    open_shard = Log.open_shard

    def counted(self, folder, name):
        opened.append(name)
        return open_shard(self, folder, name)

    monkeypatch.setattr(Log, "open_shard", counted)
    assert run.replay(0.3, kde=normal_kde(run.layers), layers=layers).equals(few)
    assert sorted(opened) == list(run.shards)


def test_an_error_cancels_what_is_left(run):
    class Watched(ThreadPoolExecutor):
        jobs: ClassVar[list[Future]] = []

        def submit(self, *args, **kwargs):
            self.jobs.append(super().submit(*args, **kwargs))
            if len(self.jobs) == 1:
                super().submit(threading.Event().wait, 1)  # holds up those that come after
            return self.jobs[-1]

    def fail(rows):
        raise KeyboardInterrupt

    with Watched(1) as pool:
        with pytest.raises(KeyboardInterrupt):
            run.replay(0.3, kde=normal_kde(run.layers), executor=pool, progress=fail)
        assert any(job.cancelled() for job in pool.jobs)


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_dead_workers_are_one_line(run):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(_die)
        with pytest.raises(RouterLogError, match="ProcessPoolExecutor: its workers ended") as told:
            run.replay(0.3, kde=normal_kde(run.layers), executor=pool)
    assert "\n" not in str(told.value)
