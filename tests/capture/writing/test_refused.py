"""The n-th open, write, fsync or rename of a capture fails, for every n: SQLite's doctrine."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import RouterLogError
from bhlog.capture.contract.manifest import MANIFEST_NAME, Routing
from bhlog.capture.writing.fitting import KdeFit
from bhlog.capture.writing.writer import RunWriter, WriterOptions
from tests.capture.blocks import INFO, LAYERS, make_block, no_errors
from tests.disk import KINDS, Fault, between, faults
from tests.synthetic import normal_kde

BLOCKS = 3
KDE = normal_kde(LAYERS)
ROUTING = Routing()

pytestmark = pytest.mark.slow


def begin(folder: Path, *, resume: bool = False) -> RunWriter:
    options = WriterOptions(shard_rows=40, threads=1)
    return RunWriter(
        folder / "run", INFO, ROUTING, kde=None if resume else KDE, options=options, resume=resume
    )


def capture(
    folder: Path,
    *,
    resume: bool = False,
    blocks: int = BLOCKS,
    say: Callable[[int | str], None] = lambda what: None,
) -> None:
    """Log blocks as a capture logs batches, and fit a null model from them.

    Args:
        say: told how many blocks are promised to stay, and what is finished.
    """
    writer = begin(folder, resume=resume)
    fit = KdeFit(folder / "null.parquet")
    try:
        fit.begin(writer)
        writer.checkpoint()
        for number in range(writer.next_sequence, blocks):
            writer.submit(make_block(number))
            writer.checkpoint()
            if number == 0:
                writer.flush()
                say(1)
    except BaseException as error:
        with suppress(RouterLogError):
            writer.close(error)
        raise
    writer.close()
    say(blocks)
    say("closed")
    fit.finish(writer)
    say("fitted")


def plain(table: pa.Table) -> pa.Table:
    """Without metadata, and with text where it has dictionaries."""
    columns = {
        name: pc.cast(column, column.type.value_type)
        if "dictionary" in str(column.type)
        else column
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return pa.table(columns)


def rows(run: Path) -> list[pa.Table]:
    """What a log says, whatever its shards are."""
    log = open_log(run)
    assert log.shards == log.token_shards
    order = [(name, "ascending") for name in ("layer", "sequence", "position")]
    tables = []
    for folder, sizes in (("routing", order), ("tokens", order[1:])):
        shards = [pq.read_table(run / folder / name) for name in log.shards]
        whole = pa.concat_tables(shards) if shards else None
        tables.append(whole and plain(whole).sort_by(sizes))
    return tables


@pytest.fixture(scope="module", autouse=True)
def _one_id() -> Iterator[None]:
    """Every run has the same id, which null models name."""
    with mock.patch.object(uuid, "uuid4", lambda: uuid.UUID(int=7)):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A capture that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    capture(folder)
    return folder


def check_after(folder: Path, whole: Path, expected: list[pa.Table]) -> None:
    """What a fault left opens, and is completed to what nothing disturbed."""
    run, null = folder / "run", folder / "null.parquet"
    if null.exists():
        assert null.read_bytes() == (whole / "null.parquet").read_bytes()
    if (run / MANIFEST_NAME).exists():
        for before, after in zip(rows(run), expected, strict=True):
            if before is not None:  # a prefix
                last = pc.max(before["sequence"])
                assert before.equals(after.filter(pc.field("sequence") <= last))
    with between(folder):
        capture(folder, resume=(run / MANIFEST_NAME).exists())
    no_errors(run)
    assert rows(run) == expected
    totals = open_log(run).manifest.totals
    assert (totals.tokens, totals.rows, totals.dropped) == (10 * BLOCKS, 20 * BLOCKS, 0)
    assert null.read_bytes() == (whole / "null.parquet").read_bytes()
    assert not list(folder.rglob("*.part"))


@pytest.mark.parametrize("job", ["capture", "resume", "resume of what was cut"])
def test_whatever_is_refused_the_run_is_completed_to_the_same_rows(tmp_path, whole, job):
    before, expected, resume = tmp_path / "before", rows(whole / "run"), job != "capture"
    before.mkdir()
    if job == "resume":
        capture(before, blocks=2)
        (before / "null.parquet").unlink()
    elif resume:
        with between(before, Fault("rename", 6, True)), pytest.raises(RouterLogError):
            capture(before)
        assert open_log(before / "run").manifest.closed is None
    shutil.copytree(before, tmp_path / "undisturbed")
    with between(tmp_path / "undisturbed") as disk:
        capture(tmp_path / "undisturbed", resume=resume)
    assert min(disk.counts[kind] for kind in KINDS) > 4
    for number, fault in enumerate(faults(disk.counts)):
        folder = tmp_path / f"job{number}"
        shutil.copytree(before, folder)
        with between(folder, fault) as disturbed, pytest.raises(RouterLogError) as caught:
            capture(folder, resume=resume)
        assert disturbed.struck and "\n" not in str(caught.value)
        check_after(folder, whole, expected)
