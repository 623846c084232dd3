"""Conditions on any column of routing and tokens, against rows joined by hand."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.condition import condition_columns
from bhlog.analysis.fold import Scope, fold
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import CorruptShard, InvalidOption
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.contract.schema import COLUMNS
from tests.synthetic import normal_kde, write_run

LAYERS = (0, 1, 4)
KEYS = ["rank", "sequence", "position", "forward"]


class Rows:
    def __init__(self):
        self.rows = []

    def update(self, batch):
        self.rows += batch.to_pylist()

    def merge(self, other):
        self.rows += other.rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(
        tmp_path_factory.mktemp("condition") / "run", layers=LAYERS, n_experts=8, n_sequences=6,
        length=10, n_shards=3, decode_from=7, options=BhOptions(alpha=0.3),
        kde=normal_kde(LAYERS), sources=("a.txt", "b.txt", "it's.txt"),
    )  # fmt: skip


def joined(run):
    """Every routing row with what the tokens say of it."""
    routing = pa.concat_tables(
        [pq.read_table(path) for path in sorted((run / "routing").iterdir())]
    ).to_pylist()
    tokens = open_log(run).tokens().to_pylist()
    by_key = {tuple(row[k] for k in KEYS): row for row in tokens}
    return [{**by_key[tuple(row[k] for k in KEYS)], **row} for row in routing]


CONDITIONS = {
    "source = 'b.txt'": lambda r: r["source"] == "b.txt",
    "source = 'it''s.txt' AND layer = 1": lambda r: r["source"] == "it's.txt" and r["layer"] == 1,
    "source LIKE '%.txt' AND phase = 'decode'": lambda r: r["phase"] == "decode",
    "source IN ('a.txt', 'b.txt') AND n_selected > 2": lambda r: (
        r["source"] in ("a.txt", "b.txt") and r["n_selected"] > 2
    ),
    "nll > 1.0": lambda r: r["nll"] is not None and r["nll"] > 1,
    "nll IS NULL OR source = 'a.txt'": lambda r: r["nll"] is None or r["source"] == "a.txt",
    "sample_id IS NULL AND position < 3": lambda r: r["sample_id"] is None and r["position"] < 3,
    "source = 'absent'": lambda r: False,
}


@pytest.mark.parametrize("where", CONDITIONS)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_condition_on_columns_of_tokens_chooses_their_rows(run, where, threads):
    columns = ["layer", "sequence", "position"]
    found = fold(open_log(run), Rows, columns, Scope(where=where, threads=threads)).rows
    expected = [{k: r[k] for k in columns} for r in joined(run) if CONDITIONS[where](r)]
    assert found == expected


def test_every_column_can_be_asked(run):
    for column in {c.name for folder in COLUMNS.values() for c in folder}:
        where = f"{column} IS NOT NULL OR {column} IS NULL"
        assert condition_columns(where) == [column]
        assert len(fold(open_log(run), Rows, ["layer"], Scope(where=where)).rows) == 180


def test_rows_in_another_order_than_their_tokens_find_them(run, tmp_path):
    shuffled = tmp_path / "run"
    write_run(
        shuffled, layers=LAYERS, n_experts=8, n_sequences=6, length=10, n_shards=1,
        sources=("a.txt", "b.txt"),
    )  # fmt: skip
    (path,) = (shuffled / "tokens").iterdir()
    table = pq.read_table(path)
    order = np.random.default_rng(0).permutation(table.num_rows)
    before = fold(open_log(shuffled), Rows, ["sequence"], Scope(where="source = 'b.txt'")).rows
    pq.write_table(table.take(pa.array(order)), path)
    after = fold(open_log(shuffled), Rows, ["sequence"], Scope(where="source = 'b.txt'")).rows
    assert before == after and 0 < len(before) < 180


@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_rows_whose_token_is_not_there_match_no_condition_on_it(run, tmp_path):
    cut = tmp_path / "run"
    write_run(cut, layers=LAYERS, n_sequences=2, length=10, n_shards=1, sources=("a.txt",))
    (path,) = (cut / "tokens").iterdir()
    table = pq.read_table(path)
    pq.write_table(table.filter(pc.less(table["position"], 4)), path)
    found = fold(open_log(cut), Rows, ["position"], Scope(where="source = 'a.txt'")).rows
    assert {row["position"] for row in found} == {0, 1, 2, 3}
    path.unlink()
    with pytest.raises(CorruptShard, match=path.name):
        fold(open_log(cut), Rows, ["position"], Scope(where="source = 'a.txt'"))


def test_every_verb_takes_it(run):
    log = open_log(run)
    where = "source = 'b.txt' AND nll IS NOT NULL"
    n = sum(r["source"] == "b.txt" and r["nll"] is not None for r in joined(run))
    assert log.replay(0.3, where=where)["rows"][-1] == n
    assert log.compare(["bh:0.3"], where=where)["rows"][-1] == n
    assert sum(map(log.sweep(where=where).rows, LAYERS)) == n
    assert sum(log.check(where=where)["n"]) == n * 8
    assert sum(c.n for _, c in log.fit(where=where).curves) == n * 8


def test_a_typo_names_the_column_that_is_near(run):
    with pytest.raises(InvalidOption) as found:
        open_log(run).replay(0.3, where="sorce = 'b.txt'")
    assert str(found.value) == "where: no column 'sorce'; did you mean 'source'?"
    with pytest.raises(InvalidOption, match=r"columns: layer, sequence, .*, nll, source"):
        open_log(run).replay(0.3, where="xyzzy = 1")
    with pytest.raises(InvalidOption) as found:
        open_log(run).replay(0.3, where="source > 1 AND (")
    assert "\n" not in str(found.value)
