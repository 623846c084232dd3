"""The routed experts that vLLM and SGLang return, written by hand from their definitions."""

import json
import os
import struct

import pytest

from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify
from tests.analysis.engines.traces import base64_of, npy, rows, run_command

# (tokens, layers, k) = (3, 2, 2); the first token's keys were cached
EXPERTS = (-1, -1, -1, -1, 3, 0, 1, 2, 2, 3, 0, 1)
SHORT = npy("<i2", (3, 2, 2), *EXPERTS, code="h")
# what numpy.save writes of np.array([[[5]]], dtype=np.int16), as base64
SAVED = (
    "k05VTVBZAQB2AHsnZGVzY3InOiAnPGkyJywgJ2ZvcnRyYW5fb3JkZXInOiBGYWxzZSwgJ3NoYXBlJzogKDEsIDEsID"
    "EpLCB9ICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgIAoFAA=="
)
E = ("--n-experts", "4")


def chat(experts=SHORT, **more):
    choice = {"index": 0, "token_ids": [21, 22], "routed_experts": base64_of(experts)}
    usage = {"prompt_tokens": 2, "completion_tokens": 2, "prompt_tokens_details": None}
    return {"model": "org/moe", "choices": [choice | more.pop("choice", {})], "usage": usage,
            "prompt_routed_experts": None, "prompt_token_ids": [11, 12]} | more  # fmt: skip


@pytest.fixture
def bring(tmp_path, capsys):
    """Imports a file of answers, of one on each line unless it is text or bytes already."""

    def call(format, answers, *options, name="answers.jsonl"):
        text = "\n".join(map(json.dumps, answers)) if isinstance(answers, list) else answers
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return run_command(capsys, format, path, "--out", tmp_path / "run", *options)

    return call


def test_an_answer_of_vllm_is_its_prompt_and_what_was_decoded_but_the_last(bring, tmp_path):
    code, out, err = bring("vllm", [chat(), chat(prompt_token_ids=None)], *E)
    assert (code, err) == (0, "")
    assert "4 tokens, 8 rows, 2 layers, top 2 of 4 experts, no logits" in out
    assert out.endswith("2 cached tokens left out\n")
    columns = ("phase", "forward", "token_id", "experts", "weights")
    assert rows(tmp_path / "run", *columns)[:4] == [
        (0, 0, 1, "prefill", 0, 12, [3, 0], [0.5, 0.5]),
        (0, 0, 2, "decode", 1, 21, [2, 3], [0.5, 0.5]),
        (0, 1, 1, "prefill", 2, None, [3, 0], [0.5, 0.5]),
        (0, 1, 2, "decode", 3, None, [2, 3], [0.5, 0.5]),
    ]
    log = open_log(tmp_path / "run")
    assert log.manifest.model.name == "org/moe" and log.manifest.options["engine"] == "vllm"
    assert {finding.status for finding in verify(log)} == {"ok"}


def test_what_numpy_saved_is_read(bring, tmp_path):
    answer = {"choices": [{"routed_experts": SAVED}]}
    assert bring("vllm", [answer], "--n-experts", "6")[0] == 0
    assert rows(tmp_path / "run", "experts") == [(0, 0, 0, [5])]


def test_a_prompt_of_its_own_stands_before_the_answer(bring, tmp_path):
    prompt = npy("|u1", (2, 2, 2), 0, 1, 2, 3, 1, 0, 3, 2, code="B")
    gen = npy("|u1", (1, 2, 2), 2, 1, 0, 3, code="B")
    answer = json.dumps(chat(gen, prompt_routed_experts=base64_of(prompt)), indent=1)
    assert bring("vllm", answer, *E)[0] == 0
    found = rows(tmp_path / "run", "phase", "token_id", "experts")
    assert found[:3] == [
        (0, 0, 0, "prefill", 11, [0, 1]),
        (0, 0, 1, "prefill", 12, [1, 0]),
        (0, 0, 2, "decode", 21, [2, 1]),
    ]


def test_an_object_in_place_of_the_file_has_its_shape(bring, tmp_path):
    data = struct.pack("<4H", 1, 0, 3, 2)
    packed = {"data": base64_of(data), "shape": [1, 2, 2], "dtype": "uint16", "start": 1}
    answer = [chat(choice={"routed_experts": packed})]
    assert bring("vllm", json.dumps(answer), *E)[0] == 0
    assert rows(tmp_path / "run", "phase", "experts") == [
        (0, 0, 1, "prefill", [1, 0]),
        (1, 0, 1, "prefill", [3, 2]),
    ]


def test_older_arrays_of_all_layers_give_those_that_are_named(bring, tmp_path):
    data = npy("<i4", (1, 3, 2), 0, 0, 1, 0, 3, 2, code="i")
    code, _, err = bring("vllm", data, *E, name="routed.npy")
    assert code == 1 and "layer 0, position 0: expected experts below 4, each once" in err
    assert bring("vllm", data, *E, "--layers", "1-2", name="routed.npy")[0] == 0
    assert rows(tmp_path / "run", "experts") == [(1, 0, 0, [1, 0]), (2, 0, 0, [3, 2])]


def test_answers_without_experts_are_passed_over(bring, tmp_path):
    nothing = chat(choice={"routed_experts": None})
    assert bring("vllm", [nothing, chat(), nothing], *E)[0] == 0
    assert len(rows(tmp_path / "run")) == 4
    (tmp_path / "run/run.json").unlink()
    code, _, err = bring("vllm", [nothing], *E)
    assert code == 1 and "no answer in it has routed_experts" in err


def cut(text):
    return chat(choice={"routed_experts": text})


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (b"", "no answer in it has routed_experts"),
        (b"\x00\xff", "line 1: is no answer"),
        (b"[" * 100_000, "line 1: is no answer"),
        (b"[3]", "line 1: is no answer"),
        ([chat(), 3], "line 2: is no answer"),
        ([chat(), {"choices": 3}], "line 2: is no answer"),
        ([chat(prompt_token_ids=["x"])], "line 1: is no answer"),
        ([chat(usage={"prompt_tokens": -1})], "line 1: is no answer"),
        ([cut(SAVED[:-2])], "line 1: routed_experts"),
        ([cut(SAVED[:-8])], "cut off or damaged"),
        ([cut("..." + SAVED)], "line 1: routed_experts"),
        ([cut("")], "no header of a .npy file"),
        ([cut(base64_of(b"\x80\x04K\x01."))], "no header of a .npy file"),
        ([chat(npy("<i2", (12,), *EXPERTS, code="h"))], "expected (tokens, layers, k)"),
        ([chat(npy("<f2", (3, 2, 2), *[1.0] * 12, code="e"))], "float16 (3, 2, 2)"),
        ([chat(), chat(npy("<i2", (2, 3, 2), *range(12), code="h"))], "unlike the first"),
        ([chat(npy("<i2", (1, 2, 2), 4, 0, 1, 2, code="h"))], "expected experts below 4"),
        ([chat(npy("<i2", (1, 2, 2), 0, 0, 1, 2, code="h"))], "each once"),
        (
            [chat(npy("<i2", (1, 2, 2), 0, -1, 1, -1, code="h"))],
            "line 1: some tokens lack some of their experts",
        ),
        (
            [chat(npy("<i2", (1, 2, 2), -1, -1, 1, 0, code="h"))],
            "line 1: some tokens lack some of their experts",
        ),
        ([chat(npy("<i2", (1, 2, 2), -2, 0, 1, 0, code="h"))], "expected experts below 4"),
        ([cut({"data": "", "shape": [1 << 31, 1 << 31, 2], "dtype": "int16"})], "0 bytes are no"),
        ([cut({"data": "AAA=", "shape": [1, 1, 1], "dtype": "O"})], "line 1: is no answer"),
        ([chat(npy("<i2", (3, 2, 2), *[-1] * 12, code="h"))], "no tokens to write"),
    ],
)
def test_what_vllm_did_not_send_is_refused_in_a_line(answers, words, bring, tmp_path):
    code, _, err = bring("vllm", answers, *E)
    assert code == 1 and err.count("\n") == 1 and words in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_a_fifo_is_no_file_of_answers(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = run_command(capsys, "vllm", tmp_path / "pipe", "--out", tmp_path / "run", *E)
    assert code == 1 and "pipe: is not a file" in err


# SGLang

RAW = struct.pack("<12i", 0, 0, 3, 1, 0, 0, 1, 2, 0, 0, 2, 0)  # (3, 2, 2), layer 0 is dense
K = ("--top-k", "2")


def generated(data=RAW, **meta):
    counts = {"prompt_tokens": 2, "completion_tokens": 2, "routed_experts": base64_of(data)}
    return {"text": "x", "output_ids": [5, 6], "meta_info": counts | meta}


def test_sglangs_bytes_are_cut_by_the_counts_beside_them(bring, tmp_path):
    code, out, err = bring("sglang", [generated()], *E, *K, "--layers", "1")
    assert (code, err) == (0, "") and "3 tokens, 3 rows" in out
    assert rows(tmp_path / "run", "phase", "forward", "experts") == [
        (1, 0, 0, "prefill", 0, [3, 1]),
        (1, 0, 1, "prefill", 0, [1, 2]),
        (1, 0, 2, "decode", 1, [2, 0]),
    ]
    assert open_log(tmp_path / "run").manifest.options["engine"] == "sglang"


@pytest.mark.parametrize("inside", ["sgl_ext", "meta_info"])
def test_choices_of_sglang_have_their_experts_beside_them(inside, bring, tmp_path):
    found = {"routed_experts": base64_of(RAW[16:]), "routed_experts_start_len": 1}
    answer = {
        "model": "org/moe",
        "choices": [{"index": 0, inside: found}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 2},
    }
    if inside == "sgl_ext":
        answer |= {"meta_info": {"routed_experts_start_len": 1}}
    assert bring("sglang", [answer], *E, *K, "--layers", "1")[0] == 0
    assert rows(tmp_path / "run", "phase", "experts") == [
        (1, 0, 1, "prefill", [1, 2]),
        (1, 0, 2, "decode", [2, 0]),
    ]


def test_without_counts_the_layers_tell_the_tokens(bring, tmp_path):
    answer = {
        "meta_info": {"routed_experts": base64_of(struct.pack("<8i", 0, 1, 2, 3, 3, 2, 1, 0))}
    }
    assert bring("sglang", [answer], *E, *K, "--layers", "4,9")[0] == 0
    assert rows(tmp_path / "run", "experts") == [
        (4, 0, 0, [0, 1]),
        (4, 0, 1, [3, 2]),
        (9, 0, 0, [2, 3]),
        (9, 0, 1, [1, 0]),
    ]


@pytest.mark.parametrize(
    ("answers", "options", "words"),
    [
        ([generated()], (*E, "--layers", "1"), "give --top-k"),
        ([generated()], K, "give --n-experts"),
        ([generated(RAW[:-1])], (*E, *K), "47 bytes are no int32 of 3 tokens"),
        ([generated(RAW[:-4])], (*E, *K), "44 bytes are no int32 of 3 tokens"),
        ([generated(RAW, prompt_tokens=3)], (*E, *K), "48 bytes are no int32 of 4 tokens"),
        ([generated(RAW, routed_experts_start_len=9)], (*E, *K), "no int32 of -6 tokens"),
        ([generated(RAW, prompt_tokens=1 << 40)], (*E, *K), "line 1: is no answer"),
        ([generated(RAW, routed_experts="####")], (*E, *K), "line 1: routed_experts"),
        ([generated(RAW)], (*E, *K), "layer 0, position 0: expected experts below 4"),
        ([generated(RAW)], (*E, *K, "--layers", "1-3"), "expected 3 layers, or all"),
        ([generated(b"")], (*E, *K), "no answer in it has routed_experts"),
        ([{"text": "x"}], (*E, *K), "no answer in it has routed_experts"),
    ],
)
def test_what_sglang_did_not_send_is_refused_in_a_line(answers, options, words, bring, tmp_path):
    code, _, err = bring("sglang", answers, *options)
    assert code == 1 and err.count("\n") == 1 and words in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
