"""Blocks made by hand, whose every row can be told from its numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from bhlog.analysis.log import logits_of
from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify
from bhlog.capture.contract.manifest import ModelInfo, Routing
from bhlog.capture.writing.buffer import Texts
from bhlog.capture.writing.stage import Staged
from bhlog.capture.writing.writer import Block, RunWriter, WriterOptions

LAYERS, EXPERTS, TOP_K = (1, 4), 6, 2
INFO = ModelInfo("hand", "HandMade", None, LAYERS, EXPERTS, TOP_K, False)


def logit(layer: int, sequence: int, position: int) -> np.ndarray:
    """(E,) float32, exact in bfloat16, all different."""
    base = layer + sequence % 13 + position % 7
    return (np.arange(EXPERTS, dtype=np.float32) * 8 + base) / 4


def make_block(
    number: int,
    tokens: int = 10,
    *,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    n_selected: bool = False,
    **changes: Any,
) -> Block:
    """Sequence and forward `number`: positions 0.., then `padding` columns that do not count."""
    R = tokens + padding
    position = torch.arange(R)
    logits = np.stack([[logit(layer, number, int(p)) for p in position] for layer in LAYERS])
    experts = torch.tensor([EXPERTS - 1, EXPERTS - 2], dtype=torch.int16).repeat(len(LAYERS), R, 1)
    tensors = {
        "logits": torch.from_numpy(logits).to(dtype),
        "experts": experts,
        "weights": torch.tensor([0.5, 0.25]).repeat(len(LAYERS), R, 1).to(dtype),
        "position": position,
        "keep": position < tokens,
        "token_id": position + 100 * number,
        "nll": torch.where(position == 0, torch.nan, position / 8),
    }
    if n_selected:
        tensors["n_selected"] = (position % 3).to(torch.int16).repeat(len(LAYERS), 1)
        tensors["n_rejected"] = (position % 5).to(torch.int16).repeat(len(LAYERS), 1)
    tensors = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
    return Block(
        staged=Staged(tensors, sum(t.numel() * t.element_size() for t in tensors.values())),
        layers=LAYERS,
        sequence=np.full(R, number, dtype=np.uint32),
        forward=np.full(R, number, dtype=np.uint32),
        phase=np.zeros(R, dtype=np.int8),
        texts={"source": Texts(np.zeros(R, dtype=np.int32), (f"text {number % 3}",))},
    )


def writer(run: Path | str, *, resume: bool = False, rank: int = 0, **options: Any) -> RunWriter:
    return RunWriter(
        run, INFO, Routing(), options=WriterOptions(**options), resume=resume, rank=rank
    )


def check_run(run: Path | str) -> list[tuple[int, int]]:
    """Everything sealed reads, pairs up and is right; returns its (sequence, position)."""
    log = open_log(run)
    assert log.shards == log.token_shards
    tokens = [(row["sequence"], row["position"]) for row in log.tokens().to_pylist()]
    assert len(set(tokens)) == len(tokens)
    for layer in LAYERS:
        rows = []
        for batch in log.batches(["sequence", "position", "logits"], layers=[layer]):
            logits = logits_of(batch)
            for i, row in enumerate(batch.select([0, 1]).to_pylist()):
                rows.append((row["sequence"], row["position"]))
                np.testing.assert_array_equal(logits[i], logit(layer, *rows[-1]))
        assert rows == tokens
    return tokens


def no_errors(run: Path) -> None:
    """Assert that a run verifies."""
    findings = [finding for finding in verify(open_log(run)) if finding.status == "error"]
    assert findings == []
