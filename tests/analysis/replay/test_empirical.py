"""Empirical p-values rank whole forwards; a log that holds parts of them is refused."""

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.fold import Scope
from bhlog.analysis.replay.comparison import compare, replay
from bhlog.analysis.replay.decide import decider_of
from bhlog.analysis.replay.decisions import write_decisions
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

LAYERS, SETTING = (0, 3), BhOptions(alpha=0.3, p_values="empirical")


def native(folder, **options):
    return write_run(folder, layers=LAYERS, n_sequences=4, length=10, n_shards=2, **options)


def rewritten(run, tables_of):
    """The run with other row groups in its first shard: from a table of rows to those of groups."""
    path = run / "routing" / "rank00000-00000.parquet"
    table = pq.read_table(path)
    with pq.ParquetWriter(path, table.schema) as writer:
        for layer in LAYERS:
            rows = table.filter(pa.compute.equal(table["layer"], layer))
            for part in tables_of(rows):
                writer.write_table(part)
    return open_log(run)


def test_forwards_that_lie_apart_are_ranked_whichever_order_they_come_in(tmp_path):
    whole = replay(open_log(native(tmp_path / "a")), [SETTING])
    apart = rewritten(native(tmp_path / "b"), lambda rows: [rows.slice(10), rows.slice(0, 10)])
    assert len([*apart.row_groups()]) == 6
    assert replay(apart, [SETTING]).equals(whole)


def test_forwards_that_take_turns_but_are_whole_are_ranked(tmp_path):
    """Row groups whose numbers overlap without a forward that lies in both."""

    def numbered(rows):
        forward = pa.array([0] * 5 + [9] * 5 + [5] * 10, pa.uint32())
        at = rows.column_names.index("forward")
        rows = rows.set_column(at, rows.schema.field("forward"), forward)
        return [rows.slice(0, 10), rows.slice(10)]

    log = rewritten(native(tmp_path / "a"), numbered)
    assert replay(log, [SETTING])["rows"].to_list() == [40, 40, 80]


def test_a_forward_in_two_row_groups_is_refused_in_one_line(tmp_path):
    log = rewritten(native(tmp_path / "a"), lambda rows: [rows.slice(0, 13), rows.slice(13)])
    asked = [
        lambda: replay(log, [SETTING]),
        lambda: decider_of(log, [SETTING]),
        lambda: write_decisions(log, [SETTING], tmp_path / "out"),
    ]
    for ask in asked:
        with pytest.raises(
            InvalidOption, match=r"rows of forward 1 at layer 0 lie in several row groups; .*--kde"
        ) as error:
            ask()
        assert "\n" not in str(error.value)
    assert compare(log, ["topk:4"])["rows"][-1] == 80
    assert replay(log, [replace(SETTING, p_values="kde")], kde=normal_kde(LAYERS))["rows"][-1] == 80


def test_a_forward_in_two_shards_is_refused(tmp_path):
    # the decode forward of a position holds a token of every sequence
    log = open_log(native(tmp_path / "a", decode_from=5))
    with pytest.raises(InvalidOption, match="rows of forward 9 at layer 0 lie in several row"):
        replay(log, [SETTING])
    first = Scope(where="phase = 'prefill'")
    with pytest.raises(InvalidOption, match="lie in several row groups"):
        replay(log, [SETTING], scope=first)  # it looks at the log, not at what a condition leaves


def test_forwards_of_the_same_number_are_others_in_another_rank(tmp_path):
    log = open_log(native(tmp_path / "a", n_ranks=2, decode_from=5))
    assert replay(log, [SETTING])["rows"].to_list() == [40, 40, 80]


def test_a_sample_is_refused(tmp_path):
    log = open_log(native(tmp_path / "a"))
    with pytest.raises(InvalidOption, match="a sample leaves out parts of them"):
        replay(log, [SETTING], scope=Scope(sample=0.5))
