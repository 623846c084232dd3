"""How well the demonstration model predicts a text, and which of its experts do the work."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OlmoeForCausalLM

from bhlog.capture.apps.demo.corpus import Page

SEPARATOR = 256  # the one token that is no byte: it stands before every document


@dataclass(frozen=True, eq=False)  # tensors have no single truth value
class Measurement:
    """A model's loss and routing on some documents.

    Attributes:
        nats_per_byte: mean loss of a byte.
        load: (layers, E) float64 on the CPU, each expert's share of a layer's work; rows sum to 1.
    """

    nats_per_byte: float
    load: Tensor


def evaluate(
    model: OlmoeForCausalLM, documents: Iterable[Page], *, window: int, batch: int = 64
) -> Measurement:
    """Measure a model on documents cut into pieces of `window` bytes, read one by one.

    A separator leads each piece and nothing carries over from the piece before: a byte is
    predicted from `window` / 2 others on average. The model is left in the mode it came in.
    """
    pieces = []
    for document in documents:
        data = document.text.encode()
        for start in range(0, len(data), window):
            pieces.append(torch.tensor([SEPARATOR, *data[start : start + window]]))
    was_training = model.training
    model.train(False)
    nats, n_bytes = 0.0, 0
    layers, E = model.config.num_hidden_layers, model.config.num_experts
    load = torch.zeros(layers, E, dtype=torch.float64)
    with torch.no_grad(), recorded_routing(model) as record:
        for start in range(0, len(pieces), batch):
            rows = pieces[start : start + batch]
            tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
            tokens = tokens.to(model.device)
            real = tokens[:, 1:] >= 0
            record.clear()
            losses = token_losses(model, tokens.clamp(min=0))
            nats += losses[real].double().sum().item()
            n_bytes += int(real.sum())
            for layer, (_, experts) in enumerate(record):
                load[layer] += experts[real.flatten()].flatten().bincount(minlength=E).cpu()
    model.train(was_training)
    return Measurement(nats / n_bytes, load / load.sum(-1, keepdim=True))


def token_losses(model: OlmoeForCausalLM, tokens: Tensor) -> Tensor:
    """Nats of each token after the first: (batch, length) ids give (batch, length - 1) float32."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1)


@contextmanager
def recorded_routing(model: OlmoeForCausalLM) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect each router's logits (T, E) and chosen experts (T, k), layer after layer."""
    record: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.mlp.gate.register_forward_hook(
            lambda router, inputs, output: record.append((output[0], output[2]))
        )
        for layer in model.model.layers
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
