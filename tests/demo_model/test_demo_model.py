import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, OlmoeForCausalLM

import bhlog.capture.demo
from bhlog.capture.apps.demo.corpus import Page, held_out_documents, training_documents
from tests.demo_model.evaluate import SEPARATOR, Measurement, evaluate, recorded_routing
from tests.demo_model.train import (
    Batches,
    Optimizer,
    Options,
    balance_loss,
    gradient,
    learning_rate_factor,
    new_model,
)
from tests.demo_model.trigram import SYMBOLS, Trigram

pytestmark = pytest.mark.slow

FOLDER = Path(bhlog.capture.demo.__file__).parent
EXCERPT = {"docs": "import", "code": "shlex.py"}  # about 10 kB each


@pytest.fixture(scope="module")
def training() -> list[Page]:
    return training_documents()


@pytest.fixture(scope="module")
def excerpt() -> dict[str, Page]:
    by_name = {document.name: document for document in held_out_documents()}
    return {source: by_name[name] for source, name in EXCERPT.items()}


@pytest.fixture(scope="module")
def model() -> OlmoeForCausalLM:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def measured(model, excerpt) -> dict[str, Measurement]:
    return {
        source: evaluate(model, [document], window=512, batch=8)
        for source, document in excerpt.items()
    }


def test_training_and_held_out_documents_are_disjoint_and_both_sources_are_in_both(training):
    held_out = held_out_documents()
    for part in (training, held_out):
        assert {document.source for document in part} == {"docs", "code"}
    assert not {d.name for d in training} & {d.name for d in held_out}


def test_next_to_no_held_out_line_is_in_the_training_text(training):
    def long_lines(documents):
        lines = (line.strip() for d in documents for line in d.text.splitlines())
        return [line for line in lines if len(line) >= 40]

    known = set(long_lines(training))
    held_out = long_lines(held_out_documents())
    # Import lines, licence lines and the like are common to many modules.
    assert np.mean([line in known for line in held_out]) < 0.02


def test_documents_come_in_a_fixed_order(training):
    order = [(d.source == "code", d.name) for d in training]
    assert order == sorted(order)


def test_shipped_model_has_olmoe_proportions_and_little_weight(model):
    assert (FOLDER / "model.safetensors").stat().st_size <= 8_000_000
    assert 3e6 < sum(weight.numel() for weight in model.parameters()) < 4e6
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok) == (64, 8)
    assert config.norm_topk_prob is False


def test_shipped_file_is_bfloat16_with_one_tensor_per_expert_as_transformers_4_reads_it():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.0.mlp.experts.0.gate_proj.weight")
    assert weight.dtype == torch.bfloat16
    assert weight.shape == (32, 128)


@pytest.mark.parametrize("source", EXCERPT)
def test_shipped_model_predicts_held_out_text_far_better_than_a_trigram(
    source, training, excerpt, measured
):
    of_source = [d.text.encode() for d in training if d.source == source]
    nats = Trigram(of_source).nats(excerpt[source].text.encode()).mean()
    assert measured[source].nats_per_byte < 0.7 * nats


def test_every_expert_works_on_held_out_text(measured):
    load = (measured["docs"].load + measured["code"].load) / 2
    assert (load * load.shape[1]).min() > 0.1


def test_code_and_docs_use_the_experts_differently(measured):
    distance = (measured["docs"].load - measured["code"].load).abs().sum(-1) / 2
    assert distance.min() > 0.1  # two halves of the code alone: 0.03


def test_separator_has_learnt_an_embedding(model):
    # As torch's padding token it would stay zero, and all its router logits tie.
    assert model.get_input_embeddings().weight[SEPARATOR].abs().max() > 0


def test_evaluate_counts_each_byte_once_and_no_padding(model, excerpt):
    text = excerpt["code"].text[:300]  # two pieces of different length
    got = evaluate(model, [Page("code", "x", text)], window=200)
    nats, load = [], torch.zeros_like(got.load)
    for piece in (text[:200], text[200:]):
        ids = torch.tensor([[SEPARATOR, *piece.encode()]])
        with torch.no_grad(), recorded_routing(model) as record:
            logits = model(ids[:, :-1]).logits[0]
        nats.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
        for layer, (_, experts) in enumerate(record):
            load[layer] += torch.bincount(experts.flatten(), minlength=64)
    # float32 sums in another order
    assert got.nats_per_byte == pytest.approx(torch.cat(nats).mean().item(), rel=1e-5)
    torch.testing.assert_close(got.load, load / load.sum(-1, keepdim=True))


def test_trigram_is_witten_bell_and_its_probabilities_sum_to_one():
    text = b"abracadabra abracadabra"
    symbols = [256, 256, *text]

    def probability(context: tuple[int, ...], byte: int) -> float:
        followers = [
            symbols[i]
            for i in range(2, len(symbols))
            if tuple(symbols[i - len(context) : i]) == context
        ]
        shorter = probability(context[1:], byte) if context else 1 / SYMBOLS
        n, different = len(followers), len(set(followers))
        return (followers.count(byte) + different * shorter) / (n + different) if n else shorter

    trigram = Trigram([text])
    for byte in range(256):
        nats = trigram.nats(b"zab" + bytes([byte]))  # known context, and "za" is an unknown one
        assert np.exp(-nats[3]) == pytest.approx(probability((*b"ab",), byte))
        assert np.exp(-nats[2]) == pytest.approx(probability((*b"za",), ord("b")))
    assert sum(probability((*b"ab",), symbol) for symbol in range(SYMBOLS)) == pytest.approx(1)


def test_same_seed_gives_the_same_batches_and_half_begin_with_a_separator(training):
    options = Options(batch=32, window=64)
    first, again = (Batches(training[:60], options, "cpu").next() for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (32, 65)
    assert (first[::2, 0] == SEPARATOR).all()


def test_balance_loss_is_one_if_all_experts_work_alike_and_more_if_not():
    logits = torch.eye(8) * 3
    assert balance_loss(logits, logits.topk(1).indices) == pytest.approx(1)
    logits[:, 0] += 5
    assert balance_loss(logits, logits.topk(1).indices) > 2


def test_learning_rate_rises_to_its_peak_and_falls_to_a_hundredth():
    factors = [learning_rate_factor(step, 1000) for step in range(1001)]
    assert np.argmax(factors) == 19  # the 20th update of 1000
    assert factors[0] < 0.1
    assert factors[-1] == pytest.approx(0.01)


def test_a_few_training_steps_lower_the_loss(training):
    options = Options(steps=8, batch=2, window=32, dropout=0.0, experts="eager")
    model = new_model(options)
    optimizer = Optimizer(model, options)
    batch = Batches(training[:60], options, "cpu").next()
    losses = []
    for _ in range(5):
        losses.append(gradient(model, batch, options)[0].item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
