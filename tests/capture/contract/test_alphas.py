import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bhlog.capture.contract.alphas import expanded, read_file, read_text, text_of
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.named import ROUTED, Bh, parse
from bhlog.capture.contract.rule import BhOptions

PAIRS = ((0, 0.1), (2, 1 / 3), (11, 1e-5))
TEXT = "0=0.1+2=0.3333333333333333+11=1e-05"


@pytest.fixture
def rows():
    """As sweep --per-layer writes them: the last row is over all layers."""
    table = [{"layer": layer, "alpha": alpha, "mean_experts": 4.0} for layer, alpha in PAIRS]
    return [*table, {"layer": None, "alpha": None, "mean_experts": 4.0}]


def test_a_text_is_exact_both_ways():
    assert text_of(PAIRS) == TEXT
    assert read_text(TEXT) == PAIRS
    policy = parse(f"bh:{TEXT},max_k=6", ROUTED)
    assert (policy.by_layer, policy.max_k) == (PAIRS, 6)
    assert parse(str(policy), ROUTED) == policy
    assert [policy.alpha_of(layer) for layer in (0, 2, 11)] == [0.1, 1 / 3, 1e-5]
    assert parse("bh:0.2", ROUTED).alpha_of(7) == 0.2


def test_every_file_that_a_sweep_writes_is_read(rows, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps(dict(PAIRS)))
    lines = ["layer,alpha", *(f"{layer},{alpha!r}" for layer, alpha in PAIRS), ","]
    (tmp_path / "c.csv").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for file in tmp_path.iterdir():
        assert read_file(file) == PAIRS, file
        assert expanded(f"bh:@{file},max_k=6") == f"bh:{TEXT},max_k=6"
    assert expanded("topk:4") == "topk:4"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"[" * 100_000,
        b'{"0": 1.5}',
        b'{"-1": 0.5}',
        b'{"0": NaN}',
        b'{"70000": 0.5}',
        b'[{"layer": 0, "alpha": 0.1}, {"layer": 0, "alpha": 0.2}]',
        b'[{"layer": 0}]',
        b'[{"layer": 0, "alpha": null}]',
        b"[0.1, 0.2]",
        b"PAR1 and no more",
        b"layer,alpha\n0,high\n",
        b"layer;alpha\n0;0.1\n",
        b"\xff\xfe\x00",
    ],
)
def test_other_files_are_refused_in_one_line(data, tmp_path):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(InvalidOption, match="file: ") as error:
        read_file(tmp_path / "file")
    assert len(str(error.value).splitlines()) == 1


def test_a_file_too_large_or_missing_is_refused(tmp_path):
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidOption, match="larger than 16 MiB"):
        read_file(tmp_path / "zeros")
    with pytest.raises(InvalidOption, match="No such file"):
        read_file(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidOption, match="not a file"):
        read_file(tmp_path / "fifo")


def test_options_hold_alphas_as_text_and_no_text_of_a_run_names_a_file(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(dict(PAIRS)))
    options = BhOptions.of(f"bh:@{tmp_path}/a.json")
    assert options.policy == f"bh:{TEXT}"
    assert options.named == Bh.of_layers(dict(PAIRS))
    assert options.tested_alpha is None
    with pytest.raises(InvalidOption, match="alpha must be a number"):
        BhOptions(policy=f"bh:@{tmp_path}/a.json")
    with pytest.raises(InvalidOption, match="need a null model"):
        BhOptions.of(options.named, p_values="empirical")


@pytest.mark.parametrize("text", ["bh:0=", "bh:=0.1", "bh:0=0.1+", "bh:0=0.1+0=0.2", "by:0=0.1"])
def test_wrong_texts_are_refused(text):
    with pytest.raises(InvalidOption):
        parse(text, ROUTED)


def test_names_of_files_are_short_and_tell_vectors_apart():
    many = [Bh.of_layers({layer: 0.1 + layer / 1e4 for layer in range(n)}) for n in (94, 95)]
    names = {policy.file_name for policy in many}
    assert len(names) == 2
    assert all(len(name) < 40 and "/" not in name for name in names)
    assert parse("bh:0.3,max_k=4", ROUTED).file_name == "bh-0.3_max_k=4"
