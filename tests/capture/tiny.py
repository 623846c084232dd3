"""A tiny random OLMoE, and the slow way to know what a model was fed and what it answered."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from bhlog.capture.contract.manifest import Manifest
from bhlog.capture.observe import observe

LAYERS, EXPERTS, TOP_K, VOCABULARY = 3, 8, 2, 40
PAD, EOS = 0, 2
TRANSFORMERS_4 = transformers.__version__.startswith("4.")  # make test-transformers4
no_static_cache = pytest.mark.skipif(
    TRANSFORMERS_4, reason="OLMoE cannot generate with a static cache there"
)
# what this version of transformers calls the cache, as an argument and in outputs
CACHE = "cache" if "cache" in signature(OlmoeForCausalLM.forward).parameters else "past_key_values"


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    """A random OLMoE whose routers and head prefer something."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=1,
        **changes,
    )
    model = OlmoeForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.4 if "gate.weight" in name else 0.25)
    return model


def past(cache: Any) -> dict[str, Any]:
    """The cache as an argument of a model."""
    return {CACHE: cache}


def batch(lengths: list[int], *, left: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, S) token ids without special tokens, and their mask."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=rng)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if left else slice(0, length)] = 1
    return ids.masked_fill(mask == 0, PAD), mask


@dataclass
class Logged:
    """A run as plain Python: per sequence its tokens, and per layer its logits.

    It is read by pyarrow alone: a machine with a GPU may lack the packages of analysis.

    Attributes:
        manifest: its run.json.
        tokens: by sequence, {position: token id}.
        logits: by (sequence, layer), {position: (E,) logits}.
        nll: by sequence, {position: loss or None}.
        phase, forward: by sequence, {position: ...}.
    """

    manifest: Manifest
    tokens: dict[int, dict[int, int | None]] = field(default_factory=lambda: defaultdict(dict))
    logits: dict[tuple[int, int], dict[int, np.ndarray]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    nll: dict[int, dict[int, float | None]] = field(default_factory=lambda: defaultdict(dict))
    phase: dict[int, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    forward: dict[int, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))

    def sequence(self, number: int) -> list[int | None]:
        """Token ids of a sequence, which must have every position from 0 on."""
        tokens = self.tokens[number]
        assert sorted(tokens) == list(range(len(tokens))), f"sequence {number} has gaps: {tokens}"
        return [tokens[position] for position in range(len(tokens))]

    @property
    def sequences(self) -> dict[int, list[int | None]]:
        """sequence() of each."""
        return {number: self.sequence(number) for number in sorted(self.tokens)}


def read(run: Path, *, closed: bool = True) -> Logged:
    """Everything in a run; no (sequence, position) may appear twice, none at one layer alone.

    A run that was not closed may not have counted its rows yet.
    """
    logged = Logged(Manifest.from_json((run / "run.json").read_bytes(), str(run)))
    for row in rows_of(run, "tokens"):
        number, position = row["sequence"], row["position"]
        assert position not in logged.tokens[number], f"{number}, {position} is there twice"
        logged.tokens[number][position] = row["token_id"]
        logged.nll[number][position] = row["nll"]
        logged.phase[number][position] = row["phase"]
        logged.forward[number][position] = row["forward"]
    for row in rows_of(run, "routing"):
        number, position = row["sequence"], row["position"]
        at_layer = logged.logits[number, row["layer"]]
        assert position not in at_layer, f"{number}, {position} is there twice"
        at_layer[position] = np.array(row["logits"], dtype=np.float32)
        assert row["token_id"] == logged.tokens[number][position]
        assert row["forward"] == logged.forward[number][position]
    layers, totals = logged.manifest.model.layers, logged.manifest.totals
    for layer in layers:
        for number, tokens in logged.tokens.items():
            assert set(logged.logits[number, layer]) == set(tokens), f"layer {layer} differs"
    if not closed:
        return logged
    assert totals.tokens == sum(map(len, logged.tokens.values()))
    assert totals.rows == totals.tokens * len(layers)
    return logged


def rows_of(run: Path, folder: str) -> list[dict[str, Any]]:
    """Rows of the shards in `routing` or `tokens`, in order."""
    files = sorted((run / folder).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def plain_logits(model: Any, tokens: list[int]) -> dict[int, Tensor]:
    """Router logits of each layer, (T, E), when the model reads one sequence alone."""
    found: dict[int, Tensor] = {}
    handles = [
        layer.mlp.gate.register_forward_hook(
            lambda module, args, output, number=number: found.update(
                {number: (output[0] if isinstance(output, tuple) else output).float()}
            )
        )
        for number, layer in enumerate(model.model.layers)
    ]
    try:
        with torch.no_grad():
            model(torch.tensor([tokens]))
    finally:
        for handle in handles:
            handle.remove()
    return found


def plain_loss(model: Any, tokens: list[int]) -> list[float]:
    """Loss of tokens 1.. of a sequence read alone, in nats."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].float()
    return torch.nn.functional.cross_entropy(
        logits[:-1], torch.tensor(tokens[1:], dtype=torch.long), reduction="none"
    ).tolist()


def check_logits(model: Any, logged: Logged, numbers: list[int] | None = None) -> None:
    """The logits logged for each sequence are those of the model reading it alone.

    Up to the rounding of other batch shapes and of attention over a cache: a row of another token
    or position is off by about 1.
    """
    for number in sorted(logged.tokens) if numbers is None else numbers:
        expected = plain_logits(model, logged.sequence(number))
        for layer, truth in expected.items():
            found = logged.logits[number, layer]
            stacked = np.stack([found[position] for position in range(len(found))])
            np.testing.assert_allclose(stacked, truth.numpy(), atol=2e-4)


@contextmanager
def observed(model: Any, run: Path, **options: Any) -> Iterator[Any]:
    """observe() without gradients."""
    with torch.no_grad(), observe(model, run, **options) as patcher:
        yield patcher


def real_tokens(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """Each row's tokens without padding."""
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def ends_of(output: Tensor, width: int) -> int:
    """A token that ends some rows of a greedy output early, and not all at once."""
    answers = [row[width:-1].tolist() for row in output]
    for token in {t for answer in answers for t in answer} - {PAD}:
        at = {a.index(token) if token in a else None for a in answers}
        if len(at) > 1 and any(i is not None and i < 4 for i in at):
            return token
    raise AssertionError("no such token")


def finishing(model: Any) -> tuple[Tensor, Tensor, int]:
    ids, mask = batch([5, 9, 3, 4], left=True, seed=3)
    with torch.no_grad():
        output = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    return ids, mask, ends_of(output, ids.shape[1])
