"""Logits by layer in .npy files, written by hand from the format's definition; arrays in Python."""

import os

import numpy as np
import pytest

import bhlog
from bhlog.analysis.run import Run, open_log
from bhlog.analysis.verify.verification import verify
from bhlog.capture.contract.errors import CorruptTrace, InvalidOption, RunExists
from tests.analysis.engines.traces import npy, rows, run_command
from tests.synthetic import native_decisions

HALVES = (1.0, -2.0, 0.5, 0.0, 3.0, 3.0)
LAYERS = {
    0: npy("<f2", (2, 3), *HALVES, code="e"),
    7: npy("<f4", (2, 3), 1.5, 0.1, float("nan"), 2.0, -1.0, float("-inf"), code="f"),
    12: npy("<f8", (2, 3), 0.1, 2.0, 1e300, 0.5, 0.25, -0.5, code="d"),
}


@pytest.fixture
def bring(tmp_path, capsys):
    def call(layers=LAYERS, *options, more=None):
        folder = tmp_path / "logits"
        folder.mkdir()
        for layer, data in layers.items():
            (folder / f"router_logits_L{layer}.npy").write_bytes(data)
        (folder / "README").write_text("other files are let be")
        if more is not None:
            more(folder)
        options = options or ("--top-k", "2")
        return run_command(capsys, "numpy", folder, "--out", tmp_path / "run", *options)

    return call


def test_files_by_layer_are_a_run(bring, tmp_path):
    code, out, err = bring()
    assert (code, err) == (0, "")
    assert "2 tokens, 6 rows, 3 layers, top 2 of 3 experts, with logits" in out
    assert out.endswith("2 values rounded\n")  # 0.1 and 1e300 are no float32
    found = rows(tmp_path / "run", "logits", "experts")
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert found == [
        (0, 0, 0, [1, -2, 0.5], [0, 2]),
        (0, 0, 1, [0, 3, 3], [1, 2]),
        (7, 0, 0, [1.5, float(np.float32(0.1)), nan], [0, 1]),
        (7, 0, 1, [2, -1, float("-inf")], [0, 1]),
        (12, 0, 0, [float(np.float32(0.1)), 2, float("inf")], [1, 0]),
        (12, 0, 1, [0.5, 0.25, -0.5], [0, 1]),
    ]
    log = open_log(tmp_path / "run")
    assert {finding.status for finding in verify(log)} == {"ok"}
    assert log.manifest.totals.nonfinite == 3 and log.manifest.options["values_rounded"] == 2


def test_the_model_makes_weights_as_it_is_told(bring, tmp_path):
    options = ("--top-k", "2", "--scoring", "sigmoid", "--norm-topk-prob", "--model", "mine")
    assert bring({0: LAYERS[0]}, *options)[0] == 0
    (_, _, _, weights), _ = rows(tmp_path / "run", "weights")
    scores = 1 / (1 + np.exp(-np.array([1.0, 0.5])))
    assert weights == pytest.approx((scores / scores.sum()).tolist(), rel=1e-6)
    model = open_log(tmp_path / "run").manifest.model
    assert (model.name, model.scoring, model.norm_topk_prob) == ("mine", "sigmoid", True)


def header(text):
    data = text.encode()
    return b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no header of a .npy file"),
        (b"\x93NUMPY", "no header of a .npy file"),
        (b"\x93NUMPY\x09\x00" + LAYERS[0][8:], "no header of a .npy file"),
        (b"\x93NUMPY\x01\x09" + LAYERS[0][8:], "no header of a .npy file"),
        (b"PK\x03\x04" + LAYERS[0], "no header of a .npy file"),
        (b"\x80\x04K\x01.", "no header of a .npy file"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }\n"), "object (2, 3)"),
        (header("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }\n"), "in C order"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (2, -3), }\n"), "(2, -3)"),
        (
            header("{'descr': '<f4', 'fortran_order': False, 'shape': (9" + "9" * 30 + ", 3), }\n"),
            "",
        ),
        (
            header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000), }\n"),
            "0 bytes",
        ),
        (header("__import__('os').system('false')\n"), "no header of a .npy file"),
        (header("(" * 3000 + "\n"), "no header of a .npy file"),
        (b"\x93NUMPY\x01\x00\xff\xff" + b" " * 70_000, "no header of a .npy file"),
        (LAYERS[0][:-1], "it is cut off or damaged"),
        (LAYERS[0] + b"\x00", "it is cut off or damaged"),
        (npy("<i4", (2, 3), 1, 2, 3, 4, 5, 6, code="i"), "int32 (2, 3)"),
        (npy("<f2", (6,), *HALVES, code="e"), "expected (tokens, experts)"),
        (npy("<f2", (3, 2), *HALVES, code="e"), "as many at each layer"),
        (npy("<f2", (1, 2, 3), *HALVES, code="e"), "expected (tokens, experts)"),
    ],
)
def test_what_is_no_array_of_logits_is_refused(data, words, bring, tmp_path):
    code, _, err = bring(LAYERS | {7: data})
    assert code == 1 and words in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["logits"]


def out_of_it(folder):
    (folder / "router_logits_L7.npy").unlink()
    (folder / "router_logits_L7.npy").symlink_to("/etc/hostname")


def fifo(folder):
    (folder / "router_logits_L7.npy").unlink()
    os.mkfifo(folder / "router_logits_L7.npy")


@pytest.mark.parametrize(
    ("layers", "options", "more", "words"),
    [
        ({}, (), None, "no file router_logits_L0.npy"),
        (LAYERS, (), out_of_it, "is a link to"),
        (LAYERS, (), fifo, "is not a file"),
        (LAYERS, ("--n-experts", "4"), None, "--n-experts says 4"),
        (LAYERS, ("--layers", "0-2", "--top-k", "2"), None, "--layers says (0, 1, 2)"),
        (LAYERS, ("--top-k", "4"), None, "top 4 of 3 experts"),
        (LAYERS, ("--model", "x"), None, "give --top-k"),
        ({0: npy("<f2", (0, 3), code="e")}, (), None, "no tokens to write"),
        ({99999: LAYERS[0]}, (), None, "65535|65536"),
    ],
)
def test_folders_that_do_not_fit_are_refused(layers, options, more, words, bring, tmp_path):
    code, _, err = bring(layers, *options, more=more)
    assert code == 1 and any(part in err for part in words.split("|")), err
    assert err.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["logits"]


def test_a_folder_that_is_there_is_left_as_it_is(bring, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes").write_text("mine")
    code, _, err = bring()
    assert code == 1 and "is there already" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes"]
    assert {path.name for path in tmp_path.iterdir()} == {"logits", "run"}


# Arrays in Python


def test_arrays_are_a_run_whose_choice_is_the_largest_logits(tmp_path):
    logits = np.random.default_rng(3).normal(size=(2, 40, 8)).astype(np.float32)
    run = bhlog.write_run(tmp_path / "run", logits, top_k=3, layers=(1, 4), model="mine")
    assert isinstance(run, Run) and run.layers == (1, 4)
    found = rows(tmp_path / "run", "logits", "experts")
    for i in range(2):
        expected = native_decisions(logits[i], 3).order.tolist()
        mine = [row for row in found if row[0] == (1, 4)[i]]
        assert [row[4] for row in mine] == expected
        assert [row[3] for row in mine] == logits[i].tolist()
    assert set(run.verify(replay=True)["status"]) == {"ok"}
    assert run.manifest.options["engine"] == "python"


def test_texts_forwards_and_ids_are_kept(tmp_path):
    run = bhlog.write_run(
        tmp_path / "run",
        experts={2: [[1, 0], [2, 1], [0, 2]], 5: [[0, 1], [1, 2], [2, 0]]},
        weights={2: [[0.5, 0.25]] * 3, 5: [[1, 0]] * 3},
        n_experts=3,
        sequence=[4, 9, 4],
        forward=[0, 0, 1],
        decode=[False, False, True],
        token_id=[7, -1, 5],
        expert_bytes={2: 10, 5: 20},
        engine="mine",
    )
    found = rows(tmp_path / "run", "phase", "forward", "token_id", "experts", "weights")
    assert found[:3] == [
        (2, 4, 0, "prefill", 0, 7, [1, 0], [0.5, 0.25]),
        (2, 4, 1, "decode", 1, 5, [0, 2], [0.5, 0.25]),
        (2, 9, 0, "prefill", 0, None, [2, 1], [0.5, 0.25]),
    ]
    assert run.manifest.token_ids and run.expert_bytes == {2: 10, 5: 20}
    assert run.cache("25B").height == 4


def test_experts_beside_logits_are_put_in_order_and_keep_their_weights(tmp_path):
    logits, experts = [[[0, 2, 2, 1]]], [[[3, 2, 1]]]
    bhlog.write_run(tmp_path / "run", logits, experts=experts, weights=[[[0.25, 0.5, 1]]])
    assert rows(tmp_path / "run", "experts", "weights") == [(0, 0, 0, [1, 2, 3], [1, 0.5, 0.25])]


L, T, E = 2, 64, 16


def test_a_strided_view_that_was_read_as_contiguous_is_refused(tmp_path):
    order = np.argsort(np.random.default_rng(0).random((L, T, E)), axis=2)
    view = order[:, :, :4]
    misread = order.reshape(L, -1)[:, : T * 4].reshape(L, T, 4)
    bhlog.write_run(tmp_path / "right", experts=view, n_experts=E)
    with pytest.raises(CorruptTrace, match="a view of the order of all experts"):
        bhlog.write_run(tmp_path / "run", experts=misread, n_experts=E)
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


def test_few_rows_may_have_each_expert_by_chance(tmp_path):
    bhlog.write_run(tmp_path / "run", experts=[[[0], [1], [1], [0]]], n_experts=2)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, InvalidOption, "expected logits or experts"),
        ({"experts": [[[0, 1]]], "n_experts": 3, "token": [1]}, InvalidOption, "no column token"),
        ({"experts": [[[0, 1]]]}, InvalidOption, "give --n-experts"),
        ({"experts": [[[0.0, 1.0]]], "n_experts": 3}, CorruptTrace, "whole numbers"),
        ({"experts": [[[0, 1]]], "n_experts": 3, "sequence": [-1]}, CorruptTrace, "sequence"),
        ({"experts": [[[0, 1]]], "n_experts": 3, "sequence": [0, 1]}, InvalidOption, r"\(2,\)"),
        ({"experts": [[[0, 1]]], "n_experts": 3, "position": [0.5]}, CorruptTrace, "position"),
        ({"experts": [[[0, 1]]], "n_experts": 3, "token_id": [1 << 40]}, CorruptTrace, "token_id"),
        ({"experts": [[[-1, 1]]], "n_experts": 3}, CorruptTrace, "unused slots at the end"),
        ({"experts": [[[0, 1]]], "weights": [[[1]]], "n_experts": 3}, CorruptTrace, "as many"),
        (
            {"experts": {0: [[0, 1]]}, "weights": {1: [[1, 1]]}, "n_experts": 3},
            InvalidOption,
            "same",
        ),
        ({"experts": [[[0, 1]]], "layers": (3, 4), "n_experts": 3}, InvalidOption, "layers"),
        ({"logits": [[[0, 1]]], "experts": [[[0, 3]]]}, CorruptTrace, "below 2"),
        ({"logits": [[[0, 1]]], "experts": [[[0, -1]]]}, CorruptTrace, "an expert in each slot"),
    ],
)
def test_arrays_that_are_no_run_are_refused(given, error, words, tmp_path):
    with pytest.raises(error, match=words):
        bhlog.write_run(tmp_path / "run", **given)
    assert not [*tmp_path.iterdir()]


def test_an_import_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("bhlog.analysis.engines.writing.write_card", stopped)
    with pytest.raises(KeyboardInterrupt):
        bhlog.write_run(tmp_path / "run", experts=[[[0, 1]]], n_experts=3)
    assert not [*tmp_path.iterdir()]


def test_a_run_is_not_written_over(tmp_path):
    bhlog.write_run(tmp_path / "run", experts=[[[0, 1]]], n_experts=3)
    with pytest.raises(RunExists):
        bhlog.write_run(tmp_path / "run", experts=[[[0, 1]]], n_experts=3)
