"""Train the demonstration model: a tiny OLMoE over bytes, from nothing but Python's own text.

    python -m tests.demo_model.train --out FOLDER

writes config.json, model.safetensors (bfloat16) and MODEL_CARD.md. Minutes on a GPU; a CPU is
good for a few steps only. The same seed gives the same first weights and the same batches, but a
GPU's sums are not reproducible to the last bit, and so neither is the outcome.
"""

import argparse
import hashlib
import math
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from textwrap import fill

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import OlmoeConfig, OlmoeForCausalLM

from bhlog.capture.apps.demo.corpus import Page, held_out_documents, training_documents
from tests.demo_model.evaluate import SEPARATOR, evaluate, recorded_routing, token_losses
from tests.demo_model.trigram import Trigram

# Training documents that give no gradient: the weights kept are those that predict these best.
VALIDATION = frozenset(
    {"execmodel", "calls", "bdb.py", "fileinput.py", "mailbox.py", "netrc.py", "trace.py"}
)


@dataclass(frozen=True)
class Options:
    """How to train.

    Attributes:
        steps: updates of the weights.
        batch: windows of text per step.
        window: tokens per window.
        learning_rate: its peak; learning_rate_factor says what comes before and after.
        weight_decay: of AdamW, on matrices.
        docs_share: share of the windows that come from `docs`, which is a thirtieth of the text.
        dropout: of the embeddings and of what each attention and each expert layer adds. Without
            it the validation loss rises again before half of the steps are done.
        balance: weight of the load-balancing loss.
        seed: of the first weights, the batches and the dropout.
        experts: transformers' experts implementation.
    """

    steps: int = 7000
    batch: int = 32
    window: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    docs_share: float = 1 / 16
    dropout: float = 0.1
    balance: float = 0.01
    seed: int = 0
    experts: str = "grouped_mm"


def new_model(options: Options) -> OlmoeForCausalLM:
    """A model with random weights in bfloat16."""
    config = OlmoeConfig(
        vocab_size=264,  # 257 in use; kernels like multiples of 8
        hidden_size=128,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        max_position_embeddings=1024,
        initializer_range=0.06,
        bos_token_id=SEPARATOR,
        eos_token_id=SEPARATOR,
        pad_token_id=None,
    )
    torch.manual_seed(options.seed)
    model: OlmoeForCausalLM = OlmoeForCausalLM._from_config(  # type: ignore[no-untyped-call]
        config,
        dtype=torch.bfloat16,
        attn_implementation="sdpa",
        experts_implementation=options.experts,
    )
    # Only now: an embedding built with a padding token gives that token no gradient.
    model.config.pad_token_id = SEPARATOR
    add_dropout(model, options.dropout)
    return model


def add_dropout(model: OlmoeForCausalLM, p: float) -> None:
    """Drop part of what enters the residual stream, in training only; OLMoE has no such option."""
    modules: list[nn.Module] = [model.model.embed_tokens]
    for layer in model.model.layers:
        modules += [layer.self_attn.o_proj, layer.mlp]
    for module in modules:
        module.register_forward_hook(
            lambda module, inputs, output: F.dropout(output, p, module.training)
        )


def of_source(documents: Iterable[Page], source: str) -> list[Page]:
    return [document for document in documents if document.source == source]


class Batches:
    """Random windows of the training text, the same for the same seed on every device."""

    def __init__(self, documents: list[Page], options: Options, device: str) -> None:
        self.options = options
        self.docs = _line(of_source(documents, "docs")).to(device)
        self.code = _line(of_source(documents, "code")).to(device)
        self.generator = torch.Generator().manual_seed(options.seed)

    def next(self) -> Tensor:
        """Draw (batch, window + 1) token ids, int64."""
        n_docs = round(self.options.batch * self.options.docs_share)
        docs = self._windows(self.docs, n_docs)
        batch = torch.cat([docs, self._windows(self.code, self.options.batch - n_docs)])
        # Who feeds the model cuts text into pieces led by a separator: half the windows are such.
        batch[::2, 0] = SEPARATOR
        return batch

    def _windows(self, line: Tensor, n: int) -> Tensor:
        window = self.options.window
        start = torch.randint(len(line) - window, (n, 1), generator=self.generator)
        return line[(start + torch.arange(window + 1)).to(line.device)].long()


def _line(documents: list[Page]) -> Tensor:
    """All documents as one line of token ids, int16, a separator before each."""
    separator = np.array([SEPARATOR], np.int16)
    texts = (np.frombuffer(document.text.encode(), np.uint8) for document in documents)
    return torch.from_numpy(np.concatenate([part for text in texts for part in (separator, text)]))


def balance_loss(logits: Tensor, experts: Tensor) -> Tensor:
    """E * sum of share times mean probability over one layer's experts; 1 if all work alike.

    transformers adds the layers up first, so that an expert idle in one layer is made good by its
    namesake in another; taken layer by layer, the loss leaves no such gap.

    Reference:
        Fedus, Zoph and Shazeer (2022), J. Mach. Learn. Res. 23(120), eq. (4).
    """
    E = logits.shape[-1]
    # Not bincount, which makes a GPU wait for the CPU.
    share = torch.histc(experts.float(), bins=E, min=0, max=E - 1) / experts.numel()
    return E * (share * logits.float().softmax(-1).mean(0)).sum()


def learning_rate_factor(step: int, steps: int) -> float:
    """1 at the peak, reached after 2 % of the steps; a cosine falls from there to 0.01."""
    warm_up = 0.02 * steps
    progress = max(0.0, (step - warm_up) / (steps - warm_up))
    return min((step + 1) / warm_up, 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


class Optimizer:
    """AdamW on float32 copies of the model's bfloat16 weights.

    bfloat16 alone would lose small updates; and so the weights measured are those that ship.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.weights: list[Tensor] = list(model.parameters())
        self.masters = [weight.detach().float().clone() for weight in self.weights]
        matrices = [master for master in self.masters if master.ndim > 1]
        scales = [master for master in self.masters if master.ndim == 1]
        self.adam = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": options.weight_decay},
                {"params": scales, "weight_decay": 0.0},
            ],
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam, lambda step: learning_rate_factor(step, options.steps)
        )

    def step(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.adam.step()
        self.schedule.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def gradient(model: OlmoeForCausalLM, batch: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Leave a batch's gradient in the weights; return its loss per token and balance loss."""
    with recorded_routing(model) as record:
        loss = token_losses(model, batch).mean()
    balance = torch.stack([balance_loss(*routing) for routing in record]).mean()
    torch.autograd.backward(loss + options.balance * balance)
    return loss, balance


def train(options: Options, documents: list[Page], folder: Path, device: str) -> int:
    """Train a new model and leave in the folder the weights with the least validation loss.

    Returns:
        The step at which those weights were reached.
    """
    model = new_model(options)
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    optimizer = Optimizer(model, options)
    batches = Batches([d for d in documents if d.name not in VALIDATION], options, device)
    validation = [
        [d for d in of_source(documents, source) if d.name in VALIDATION]
        for source in ("docs", "code")
    ]
    best_loss, best_step = math.inf, 0
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        loss, balance = gradient(model, batches.next(), options)
        optimizer.step()
        if step % max(1, options.steps // 40) == 0:
            docs, code = (
                evaluate(model, part, window=options.window).nats_per_byte for part in validation
            )
            print(
                f"step {step} of {options.steps}, {time.perf_counter() - start:.0f} s: "
                f"training {loss:.3f}, balance {balance:.3f}, "
                f"validation docs {docs:.4f} code {code:.4f} nats per byte",
                file=sys.stderr,
                flush=True,
            )
            if docs + code < best_loss:
                best_loss, best_step = docs + code, step
                model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # it only repeats config.json
    return best_step


def model_card(options: Options, documents: list[Page], folder: Path, *, made: str) -> str:
    """Measure the weights in the folder on the held-out text and describe them.

    Args:
        documents: the training text.
        made: one paragraph on where and how the training ran.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = OlmoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    model.to(device)  # type: ignore[arg-type]  # as in train
    everything = Trigram(d.text.encode() for d in documents)
    losses = []
    loads = []
    for source in ("docs", "code"):
        held_out = of_source(held_out_documents(), source)
        alone = Trigram(d.text.encode() for d in of_source(documents, source))
        measured = evaluate(model, held_out, window=options.window)
        loads.append(measured.load)
        trigrams = [
            np.concatenate([trigram.nats(d.text.encode()) for d in held_out])
            for trigram in (everything, alone)
        ]
        least = min(nats.mean() for nats in trigrams)
        losses.append(
            f"| {source} | {len(trigrams[0]):,} | {measured.nats_per_byte:.3f} "
            f"| {trigrams[0].mean():.3f} | {trigrams[1].mean():.3f} "
            f"| {1 - measured.nats_per_byte / least:.0%} |"
        )
    E = loads[0].shape[1]
    routing = []
    for layer, (docs, code) in enumerate(zip(*loads, strict=True)):
        both = E * (docs + code) / 2  # 1: as much as an even share
        distance = (docs - code).abs().sum() / 2
        routing.append(
            f"| {layer} | {both.min():.2f} | {both.max():.2f} | {int((both < 0.1).sum())} "
            f"| {distance:.2f} |"
        )
    command = "".join(
        f" --{field.name.replace('_', '-')} {getattr(options, field.name)}"
        for field in fields(Options)
        if getattr(options, field.name) != field.default
    )
    text = "".join(d.text for d in documents).encode()
    sizes = [sum(len(d.text.encode()) for d in of_source(documents, s)) for s in ("docs", "code")]
    return CARD.format(
        parameters=sum(weight.numel() for weight in model.parameters()),
        command=command,
        made=fill(made, 100),
        losses="\n".join(losses),
        routing="\n".join(routing),
        window=options.window,
        python=platform.python_version(),
        docs=sizes[0],
        code=sizes[1],
        sha256=hashlib.sha256(text).hexdigest(),
    )


CARD = """\
# The demonstration model

A tiny OLMoE (`OlmoeForCausalLM`: 4 layers, hidden size 128, 64 experts of width 32 per layer, top
8, `norm_topk_prob=False`, {parameters:,} parameters in bfloat16) for the demo and tests. It reads
bytes: a token id is a byte of UTF-8 text, and id 256 stands before each document. It is built like
the real OLMoE and its routers have learnt something; it is of no other use.

## Data

`capture/demo/corpus.py`: the reference documentation in `pydoc_data.topics` (`docs`) and the
standard library's own modules (`code`), nothing else. Training part, under Python {python}:
{docs:,} bytes of docs and {code:,} bytes of code; all texts joined in order have the sha256
`{sha256}`.
A few of these documents (`VALIDATION` in `capture/demo/train.py`) gave no gradient and chose the
weights to keep. The held-out part, a fixed list of topics and modules, was used for nothing but the
tables below.

## Training

    python -m tests.demo_model.train{command} --out FOLDER

{made}

## Loss on the held-out part

Nats per byte, in pieces of {window} bytes read one by one. Beside it an interpolated byte trigram
model (Witten-Bell, `capture/demo/trigram.py`) counted on the same training text, all of it or
that source's alone; the last column is how far the model is below the better of the two.

| source | bytes | model | trigram, all text | trigram, same source | below trigram |
|---|---|---|---|---|---|
{losses}

## Experts

Each expert's share of the work on the held-out part (docs and code weighted alike) as a multiple of
the even share, 1/64; how many experts do less than a tenth of that; and how differently docs and
code use the experts: the total variation distance between their shares, 0 if alike, 1 if disjoint.

| layer | least | most | below a tenth | docs against code |
|---|---|---|---|---|
{routing}

## Licence

The weights were made from Python's documentation and sources, copyright Python Software Foundation,
which are under the PSF License Version 2 (https://docs.python.org/3/license.html). They come with
no warranty.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.demo_model.train",
        description="Train the demonstration model on Python's own documentation and sources.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    for field in fields(Options):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default)
    arguments = vars(parser.parse_args())
    folder = arguments.pop("out")
    options = Options(**arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    documents = training_documents()
    start = time.perf_counter()
    best_step = train(options, documents, folder, device)
    minutes = (time.perf_counter() - start) / 60
    made = (
        f"{options.steps:,} steps of {options.batch} windows of {options.window} tokens, "
        f"{options.steps * options.batch * options.window / 1e6:,.0f} million in all, "
        f"{minutes:.1f} minutes on "
        f"{torch.cuda.get_device_name() if device == 'cuda' else 'a CPU'} with "
        f"torch {torch.__version__} and transformers {transformers.__version__}; the weights kept "
        f"are those after step {best_step:,}."
    )
    card = model_card(options, documents, folder, made=made)
    (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
