"""Each kind of damage to rows, on the smallest run that shows it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify_decisions
from bhlog.capture.contract.schema import shard_name
from tests.analysis.verify.damage import (
    LAST,
    E,
    edit_manifest,
    edit_shard,
    edited,
    errors,
    only_error,
    small_run,
    warnings,
    with_column,
)
from tests.synthetic import write_run


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path / "run")


def test_a_layer_is_missing(run):
    edit_shard(run, lambda t: t.filter(pa.array(np.asarray(t["layer"]) == 1)))
    assert ("rows", LAST, "layers 1; the manifest says 1, 4") in errors(run)


def test_a_token_is_missing_at_one_layer(run):
    edit_shard(run, lambda t: t.slice(0, t.num_rows - 1))
    assert (
        "rows",
        LAST,
        "layer 4: 9 rows for 10 tokens; no more rows, tokens has sequence 5 position 4",
    ) in errors(run)


def test_rows_in_another_order_are_no_error(run):
    edit_shard(run, lambda t: t.take(pa.array(np.arange(t.num_rows)[::-1])))
    assert errors(run) == []


def test_a_token_that_is_there_twice(run):
    def twice(table):
        return pa.concat_tables([table, table.slice(0, 1)])

    edit_shard(run, twice, folder="tokens")
    assert ("rows", LAST, "tokens: sequence 4 position 0 is there twice") in errors(run)


def test_a_position_run_in_two_forwards_is_worth_knowing(tmp_path):
    run = write_run(tmp_path / "run", layers=(0,), n_experts=E, n_sequences=1, length=4, n_shards=1)
    name = shard_name(0, 0)
    for folder in ("routing", "tokens"):
        edit_shard(run, with_column("position", [0, 1, 1, 2]), folder=folder, name=name)
        edit_shard(run, with_column("forward", [0, 0, 1, 1]), folder=folder, name=name)
    assert errors(run) == []
    assert warnings(run) == [(name, "1 positions of a sequence were run more than once")]


@pytest.mark.parametrize("column, value", [("forward", 9), ("token_id", 5)])
def test_routing_and_tokens_disagree_on_a_token(run, column, value):
    def change(items):
        items[3] = value

    edit_shard(run, with_column(column, edited(change)), folder="tokens")
    found = errors(run)
    assert len(found) == 2  # one a layer
    assert f"sequence 4 position 3: {column} " in found[0][2]
    assert found[0][2].endswith(f"tokens says {value}")


def test_an_unknown_phase(run):
    edit_shard(run, with_column("phase", lambda c: ["dreaming"] * len(c)), folder="tokens")
    assert ("rows", LAST, "tokens: unknown phase 'dreaming'") in errors(run)


def test_token_ids_that_were_to_be_withheld(run):
    edit_manifest(run, token_ids=False)
    assert (
        "rows",
        LAST,
        "tokens: has token ids, the manifest says they are withheld",
    ) in errors(run)


def rows_error(run, column, change):
    edit_shard(run, with_column(column, edited(change)))
    check, where, detail = only_error(run)
    assert (check, where) == ("rows", LAST)
    return detail


def row_with(run, n):
    """The first row of the last shard's first layer with n experts or more."""
    table = pq.read_table(run / "routing" / LAST).slice(0, 10)
    return int(np.argmax(np.asarray(table["n_selected"]) >= n))


def test_an_expert_that_the_model_does_not_have(run):
    row = row_with(run, 2)

    def change(experts):
        experts[row][-1] = E

    assert rows_error(run, "experts", change) == (
        f"layer 1: sequence {4 + row // 5} position {row % 5}: an expert is not below 8 "
        "(1 such rows)"
    )


def test_an_expert_twice_in_a_row(run):
    row = row_with(run, 2)

    def change(experts):
        experts[row][1] = experts[row][0]

    assert "an expert is there twice" in rows_error(run, "experts", change)


def test_experts_out_of_order(run):
    row = row_with(run, 2)

    def change(experts):
        experts[row].reverse()

    assert "experts are not in order of falling logit" in rows_error(run, "experts", change)


def test_weights_of_another_number(run):
    def change(weights):
        weights[0].append(0.5)

    assert "experts and weights differ in number" in rows_error(run, "weights", change)


def test_n_selected_is_the_number_of_experts(run):
    def change(n):
        n[0] += 1

    edit_shard(run, with_column("n_selected", edited(change)))
    assert "n_selected is not the number of experts" in errors(run)[0][2]


def test_n_selected_is_n_rejected_within_the_bounds(run):
    def change(n):
        n[0] = 0 if n[0] > 1 else 3

    assert "n_selected is not n_rejected within [1, 4]" in rows_error(run, "n_rejected", change)


def test_n_rejected_goes_with_bh_routing(run, tmp_path):
    edit_shard(run, with_column("n_rejected", lambda c: [None] * len(c)))
    assert "no n_rejected under BH routing" in errors(run)[0][2]
    native = write_run(tmp_path / "native", n_sequences=4, length=5)
    edit_shard(native, with_column("n_rejected", lambda c: [1] * len(c)), name=shard_name(0, 1))
    assert "n_rejected under native routing, expected null" in errors(native)[0][2]


def test_replay_finds_a_decision_that_the_rule_did_not_make(run):
    assert {f.status for f in verify_decisions(open_log(run))} == {"ok"}
    row = row_with(run, 2)

    def fewer(items):
        items[row] = items[row][:-1] if isinstance(items[row], list) else items[row] - 1

    for column in ("experts", "weights", "n_selected", "n_rejected"):
        edit_shard(run, with_column(column, edited(fewer)))
    assert errors(run) == []
    wrong = [f for f in verify_decisions(open_log(run)) if f.status == "error"]
    assert len(wrong) == 1
    assert wrong[0].where == "layer 1"
    assert wrong[0].detail.startswith("30 rows replayed, 1 disagree, first at rank 0 sequence")
