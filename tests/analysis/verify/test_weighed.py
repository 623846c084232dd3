from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import CorruptShard
from tests.analysis.verify.damage import LAST, edit_shard, only_error, small_run, warnings


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path / "run")


def first_weight(value):
    def change(table):
        lists = table["weights"].to_pylist()
        lists[0][0] = value(lists[0][0])
        index = table.column_names.index("weights")
        field = table.schema.field("weights")
        return table.set_column(index, field, pa.array(lists, field.type))

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.25])
def test_a_weight_that_cannot_be_is_an_error(run, value):
    edit_shard(run, first_weight(lambda _: value))
    check, where, detail = only_error(run)
    assert (check, where) == ("rows", LAST)
    assert "a weight is NaN, infinite or negative, its logits are finite (1 such rows)" in detail


def test_a_weight_of_another_formula_is_a_warning(run):
    edit_shard(run, first_weight(lambda weight: weight / 2 + 0.01))
    ((where, detail),) = warnings(run)
    assert where == LAST
    assert detail.startswith("layer 1: weights of 1 rows are not by the model's formula")


def test_rounding_to_bfloat16_is_the_same_formula(run):
    def rounded(weight):
        bits = np.float32(weight).view(np.uint32) & np.uint32(0xFFFF0000)
        return float(bits.view(np.float32))

    edit_shard(run, first_weight(rounded))
    assert warnings(run) == []


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -1.0])
def test_a_loss_that_cannot_be_is_a_warning(run, loss):
    def change(table):
        losses = table["nll"].to_pylist()
        losses[1] = loss
        index = table.column_names.index("nll")
        return table.set_column(index, table.schema.field("nll"), pa.array(losses, pa.float32()))

    edit_shard(run, change, folder="tokens")
    assert warnings(run) == [(LAST, "1 losses are NaN, infinite or below 0")]


def test_rows_of_another_layer_than_the_statistics_say_are_an_error(run):
    log = open_log(run)
    group = log.groups_of(LAST, log.open_shard("routing", LAST))[0]
    assert group.layer == 1
    lying = replace(group, layer=4)
    with pytest.raises(CorruptShard, match="has rows of layer 1, its statistics say 4"):
        log.read(lying, ["layer", "logits"])
