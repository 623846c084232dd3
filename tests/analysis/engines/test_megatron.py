"""Megatron-core's router_trace, written by hand from its definition."""

import json
import os
import struct

import numpy as np
import pytest

from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify
from tests.analysis.engines.traces import rows, run_command

# bfloat16 of (2, 4) and (1, 4) values for each of two layers: 0x3F80 is 1, 0xC000 -2, 0x4040 3, ...
LOGITS = bytes.fromhex(
    "803F 0040 00C0 4040  0000 803F 803F 80BF"  # layer 3, step 0: 1 2 -2 3; 0 1 1 -1
    "0040 803F 0000 00C0  003F 803E 003E C07F"  # layer 5, step 0: 2 1 0 -2; .5 .25 .125 NaN
    "4040 0040 803F 0000"  # layer 3, step 1: 3 2 1 0
    "803F 0040 4040 8040"  # layer 5, step 1: 1 2 3 4
)


def record(step, layer, top, offset=None, **more):
    found = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0,
             "num_tokens": len(top), "topk": 2, "top_indices": top}  # fmt: skip
    if offset is not None:
        shape = [len(top), 4]
        found |= {"logit_offset": offset, "logit_bytes": len(top) * 8, "logit_shape": shape}
    return found | more


RECORDS = [  # ids of a mask come by rising number
    record(0, 3, [[1, 3], [1, 2]], 0),
    record(0, 5, [[0, 1], [0, 1]], 16),
    record(0, 5, [[0, 1]], block="mtp", mtp_idx=0),
    record(1, 3, [[0, 1]], 32),
    record(1, 5, [[2, 3]], 40),
]
NO_LOGITS = [{k: v for k, v in one.items() if not k.startswith("logit")} for one in RECORDS]


@pytest.fixture
def bring(tmp_path, capsys):
    """Imports records of a rank, changed or not."""

    def call(records=RECORDS, logits=LOGITS, *options, more=None):
        folder = tmp_path / "trace"
        folder.mkdir()
        lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
        (folder / "router_trace_rank0.jsonl").write_text("\n".join(lines) + "\n")
        if logits is not None:
            (folder / "logits_rank0.bin").write_bytes(logits)
        if more is not None:
            more(folder)
        return run_command(capsys, "megatron", folder, "--out", tmp_path / "run", *options)

    return call


def softmax(logits):
    terms = np.exp(np.array(logits) - max(logits))
    return terms / terms.sum()


def test_a_trace_with_logits_is_a_run_with_logits(bring, tmp_path):
    code, out, err = bring()
    assert (code, err) == (0, "")
    assert "3 tokens, 6 rows, 2 layers, top 2 of 4 experts, with logits" in out
    assert out.endswith("1 records left out\n")
    found = rows(tmp_path / "run", "forward", "experts", "logits", "weights")
    nan = pytest.approx(float("nan"), nan_ok=True)
    expected = [
        (3, 0, 0, 0, [3, 1], [1, 2, -2, 3]),
        (3, 0, 1, 0, [1, 2], [0, 1, 1, -1]),
        (3, 1, 0, 1, [0, 1], [3, 2, 1, 0]),
        (5, 0, 0, 0, [0, 1], [2, 1, 0, -2]),
        (5, 0, 1, 0, [0, 1], [0.5, 0.25, 0.125, nan]),
        (5, 1, 0, 1, [3, 2], [1, 2, 3, 4]),
    ]
    assert [row[:6] for row in found] == expected
    for row in found[:4]:
        p = softmax(row[5])
        assert row[6] == pytest.approx([p[expert] for expert in row[4]], rel=1e-6)
    log = open_log(tmp_path / "run")
    assert log.has_logits and log.manifest.totals.nonfinite == 1
    assert log.manifest.options == {"engine": "megatron", "records_left_out": 1}
    assert {finding.status for finding in verify(log)} == {"ok"}
    frame = log.verify(replay=True)
    assert set(frame["status"]) == {"ok"}


def test_a_trace_without_logits_needs_the_number_of_experts(bring, tmp_path, capsys):
    code, _, err = bring(NO_LOGITS, None)
    assert code == 1 and "does not tell n_experts; give --n-experts" in err
    arguments = ("megatron", tmp_path / "trace" / "router_trace_rank0.jsonl", "--n-experts", "4")
    code, out, _ = run_command(capsys, *arguments, "--out", tmp_path / "run")
    assert code == 0 and "experts, no logits" in out
    first = rows(tmp_path / "run", "experts", "weights")[0]
    assert first == (3, 0, 0, [1, 3], [0.5, 0.5])


def test_ranks_follow_one_another(bring, tmp_path):
    def two(folder):
        for name in ("router_trace_rank0.jsonl", "logits_rank0.bin"):
            for rank in ("2", "10"):
                (folder / name.replace("0", rank)).write_bytes((folder / name).read_bytes())

    assert bring(more=two)[0] == 0
    assert [row[1] for row in rows(tmp_path / "run")][:9] == [0, 0, 1, 2, 2, 3, 4, 4, 5]


def test_a_layer_that_comes_again_is_the_next_microbatch(bring, tmp_path):
    records = [one | {"step": 7} for one in RECORDS]
    assert bring(records)[0] == 0
    assert {row[3] for row in rows(tmp_path / "run", "forward")} == {0, 1}


def other(number, **change):
    return [one | change if i == number else one for i, one in enumerate(RECORDS)]


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "with decoder layers"),
        (["{"], "line 1: no record"),
        (["[1]"], "line 1: no record"),
        (["[" * 100_000], "line 1: no record"),
        ([*RECORDS, json.dumps(RECORDS[0])[:50]], "line 6: no record"),
        (other(0, step=-1), "line 1: no record (Expected `int` >= 0"),
        (other(0, layer="3"), "line 1: no record (Expected `int`, got `str`"),
        (other(0, num_tokens=3), "line 1: no record (top_indices of shape (2, 2))"),
        (other(0, top_indices=[[1, 3], [1]]), "line 1: no record"),
        (other(0, top_indices=[[1, 3], [1, 2.5]]), "line 1: no record"),
        (other(0, top_indices=[[1, 3], [1, 1]]), "layer 3, position 1: expected experts below 4"),
        (other(0, top_indices=[[1, 4], [1, 2]]), "layer 3, position 0: expected experts below 4"),
        (other(0, top_indices=[[1, -1], [1, 2]]), "line 1: no record"),
        (other(0, logit_offset=1 << 50), "line 1: logits in bytes 1,125,899"),
        (other(0, logit_offset=-8), "line 1: no record"),
        (other(4, logit_offset=41), "line 5: logits in bytes 41 to 49, of 48"),
        (other(0, logit_shape=[2, 1 << 40]), "has n_experts|65535|< 65536"),
        (other(1, logit_shape=[2, 8]), "line 2: logits of (2, 8)"),
        (other(1, logit_shape=[1, 4]), "line 2: logits of (1, 4)"),
        (other(1, logit_bytes=8), "line 2: logits of (2, 4)"),
        (other(1, logit_shape=None), "line 1: the step that begins here"),
        (other(1, logit_offset=None), "line 2: logits of (2, 4) from None"),
        (other(1, block=None), "line 2: no record"),
        ([*RECORDS[:1], *RECORDS[3:]], "line 2: the step that begins here has layers [3, 5]"),
        (RECORDS[:-1], "line 4: the step that begins here has layers [3]"),
        (other(3, num_tokens=2, top_indices=[[0, 1]] * 2), "line 4: the step that begins here"),
        (other(3, topk=1, top_indices=[[1]]), "line 4: the step that begins here"),
    ],
)
def test_what_is_no_trace_is_refused_in_a_line_and_leaves_nothing(records, words, bring, tmp_path):
    code, _, err = bring(records)
    assert code == 1 and err.count("\n") == 1 and "trace" in err
    assert any(part in err for part in words.split("|")), err
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def fifo(folder):
    (folder / "logits_rank0.bin").unlink()
    os.mkfifo(folder / "logits_rank0.bin")


def link(folder):
    (folder / "logits_rank0.bin").unlink()
    (folder / "logits_rank0.bin").symlink_to("/etc/hostname")


def device(folder):
    (folder / "router_trace_rank1.jsonl").symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (fifo, "logits_rank0.bin: is not a file"),
        (link, "logits_rank0.bin: is a link to"),
        (device, "router_trace_rank1.jsonl: is a link to"),
        (lambda folder: (folder / "logits_rank0.bin").unlink(), "logits_rank0.bin: No such file"),
        (
            lambda folder: (folder / "logits_rank0.bin").write_bytes(b""),
            "of 0 bytes that there are",
        ),
    ],
)
def test_files_that_are_none_are_refused(more, words, bring):
    code, _, err = bring(more=more)
    assert code == 1 and words in err and err.count("\n") == 1, err


def test_logits_of_many_tokens_are_read_piece_by_piece(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("bhlog.analysis.engines.trace.MOST_VALUES", 64)
    monkeypatch.setattr("bhlog.analysis.engines.writing.MOST_VALUES", 4096)
    rng = np.random.default_rng(0)
    bits = rng.integers(0x3F00, 0x4040, (2, 50, 4), dtype=np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    top = np.argsort(-wide, axis=2, kind="stable")[..., :2]
    (tmp_path / "logits_rank0.bin").write_bytes(struct.pack("<400H", *bits.ravel()))
    lines = [record(0, i, top[i].tolist(), i * 400) for i in (0, 1)]
    (tmp_path / "router_trace_rank0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run_command(capsys, "megatron", tmp_path, "--out", tmp_path / "run")[0] == 0
    found = rows(tmp_path / "run", "logits", "experts")
    assert len(open_log(tmp_path / "run").shards) > 1
    assert [row[3] for row in found] == wide.reshape(100, 4).tolist()
    assert [row[4] for row in found] == top.reshape(100, 2).tolist()
