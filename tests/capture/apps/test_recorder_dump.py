"""What SGLang's recorder dumps: a small dump of its own structure, and what is none."""

import pickle

import numpy as np
import pytest
import torch

from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify
from tests.analysis.engines.traces import rows, run_command

# 6 physical experts of 4 logical ones; layer 0 has no router, and two of eight slots are used
MAP = torch.tensor([[0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2], [0, 1, 2, 3, 3, 3]])
NONE = [-1] * 8


def slots(*experts):
    return [*experts, *[-1] * (8 - len(experts))]


PREFILL = {
    "forward_pass_id": 4,
    "rank": 0,
    "gatherer_key": "primary",
    "input_ids": [11, 12, 21, 0],
    "positions": [0, 1, 7, 0],
    "extend_seq_lens": [2, 1, 1],
    "forward_mode": 1,
    "topk_ids_of_layer": torch.tensor(
        [
            [NONE, NONE, NONE, NONE],
            [slots(0, 1), slots(4, 5), slots(2, 3), NONE],  # the last row is padding
            [slots(4, 0), slots(5, 1), slots(2, 3), NONE],
        ],
        dtype=torch.int32,
    ),
    "misc_objects": [],
}
DECODE = PREFILL | {
    "forward_pass_id": 5,
    "input_ids": [13, 22],
    "positions": [2, 8],
    "extend_seq_lens": None,
    "forward_mode": 2,
    "topk_ids_of_layer": torch.tensor(
        [[NONE, NONE], [slots(0, 3), slots(1, 2)], [slots(0, 1), slots(1, 0)]], dtype=torch.int32
    ),
}
DUMP = {"records": [PREFILL, DECODE], "last_physical_to_logical_map": MAP}


@pytest.fixture
def bring(tmp_path, capsys):
    def call(dump, *options):
        path = tmp_path / "expert_distribution_recorder_1.0_0.pt"
        if isinstance(dump, bytes):
            path.write_bytes(dump)
        else:
            torch.save(dump, path)
        return run_command(capsys, "sglang", path, "--out", tmp_path / "run", *options)

    return call


def test_physical_experts_become_logical_ones(bring, tmp_path):
    code, out, err = bring(DUMP)
    assert (code, err) == (0, "")
    assert "5 tokens, 10 rows, 2 layers, top 2 of 4 experts, no logits\n1 rows left out" in out
    assert rows(tmp_path / "run", "phase", "forward", "token_id", "experts") == [
        (1, 0, 0, "prefill", 0, 11, [3, 2]),
        (1, 0, 1, "prefill", 0, 12, [3, 2]),
        (1, 1, 7, "prefill", 0, 21, [1, 0]),
        (1, 3, 2, "decode", 1, 13, [3, 0]),
        (1, 4, 8, "decode", 1, 22, [2, 1]),
        (2, 0, 0, "prefill", 0, 11, [3, 0]),
        (2, 0, 1, "prefill", 0, 12, [3, 1]),
        (2, 1, 7, "prefill", 0, 21, [2, 3]),
        (2, 3, 2, "decode", 1, 13, [0, 1]),
        (2, 4, 8, "decode", 1, 22, [1, 0]),
    ]
    assert {finding.status for finding in verify(open_log(tmp_path / "run"))} == {"ok"}


def with_record(**change):
    return DUMP | {"records": [PREFILL | change, DECODE]}


ONE = PREFILL["topk_ids_of_layer"]


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("dump", "words"),
    [
        (b"", "is no dump"),
        (b"PK\x03\x04", "is no dump"),
        (pickle.dumps({"records": []}), "is no dump"),
        ({"records": [Evil()]}, "is no dump"),
        ([1], "is no dump"),
        ({"records": []}, "is no dump"),
        (DUMP | {"records": []}, "at `$.layers`"),
        (DUMP | {"last_physical_to_logical_map": MAP[:2]}, "their map (2, 6)"),
        (DUMP | {"last_physical_to_logical_map": MAP - 1}, "is no dump"),
        (DUMP | {"last_physical_to_logical_map": MAP.double()}, "is no dump"),
        (with_record(topk_ids_of_layer=ONE + 3), "physical experts below 6"),
        (with_record(topk_ids_of_layer=ONE[0]), "is no dump"),
        (with_record(topk_ids_of_layer=ONE.clamp(max=0)), "expected experts below 4, each once"),
        (with_record(topk_ids_of_layer=torch.where(ONE == 1, -1, ONE)), "record 0: some tokens"),
        (with_record(positions=[0]), "position of shape (1,) for 4 tokens"),
        (with_record(positions=[-5, 1, 7, 0]), "position"),
        (with_record(extend_seq_lens=[1 << 40]), "is no dump"),
        (with_record(extend_seq_lens=[9]), "extend_seq_lens of 9 tokens, there are 4"),
        (with_record(input_ids=["x"] * 4), "token_id"),
    ],
)
def test_what_is_no_dump_is_refused_in_a_line(dump, words, bring, tmp_path):
    code, out, err = bring(dump)
    assert code == 1 and out == "" and err.count("\n") == 1
    assert any(part in err for part in words.split("|")), err
    assert not (tmp_path / "run").exists()


def test_experts_are_those_of_a_plain_reading(bring, tmp_path):
    rng = np.random.default_rng(0)
    physical = np.argsort(rng.random((3, 30, 6)), axis=2)[:, :, :1]
    record = PREFILL | {
        "input_ids": list(range(30)),
        "positions": list(range(30)),
        "extend_seq_lens": [30],
        "topk_ids_of_layer": torch.tensor(physical),
    }
    assert bring(DUMP | {"records": [record]})[0] == 0
    for layer, _, position, experts in rows(tmp_path / "run", "experts"):
        assert experts == [MAP[layer, physical[layer, position, 0]]]
