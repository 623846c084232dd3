"""The loss of each token against cross entropy of the model reading the sequence alone."""

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.capture.tiny import (
    batch,
    finishing,
    observed,
    past,
    plain_loss,
    read,
    real_tokens,
    tiny_model,
)


def close_to(found: dict[int, float | None], truth: list[float], known: Any) -> None:
    """nll from position 1 on against the truth, null where not known."""
    assert found[0] is None
    for position, value in enumerate(truth, start=1):
        if known(position):
            assert found[position] == pytest.approx(value, abs=2e-4), position
        else:
            assert found[position] is None, position


@pytest.mark.parametrize("left", [True, False])
def test_loss_of_a_plain_forward(model, run, left):
    ids, mask = batch([8, 3, 1], left=left)
    with observed(model, run):
        model(ids, attention_mask=mask)
    logged = read(run)
    for number, row in enumerate(real_tokens(ids, mask)):
        close_to(logged.nll[number], plain_loss(model, row), lambda position: True)


def test_loss_across_decode_steps(model, run):
    ids, mask, eos = finishing(model)
    with observed(model, run):
        model.generate(
            ids, attention_mask=mask, max_new_tokens=9, do_sample=False, eos_token_id=eos
        )
    logged = read(run)
    for number in range(4):  # generate asks the head for the prompt's last column alone
        prompt = int(mask[number].sum())
        truth = plain_loss(model, logged.sequence(number))
        close_to(logged.nll[number], truth, lambda position, prompt=prompt: position >= prompt)


@pytest.mark.parametrize(("kept", "known"), [(0, range(1, 8)), (3, range(6, 8)), (1, [])])
def test_loss_where_the_head_saw_the_last_columns(model, run, kept, known):
    ids, _ = batch([8])
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        model(ids, logits_to_keep=kept, **past(cache))
        model(torch.tensor([[7]]), **past(cache))
    logged = read(run)
    truth = plain_loss(model, [*ids[0].tolist(), 7])
    close_to(logged.nll[0], truth, lambda position: position in known or position == 8)


def test_loss_is_unknown_where_the_head_saw_chosen_columns(model, run):
    ids, _ = batch([6])
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        model(ids, logits_to_keep=torch.tensor([5, 0, 1]), **past(cache))
        model(torch.tensor([[7]]), **past(cache))
    assert set(read(run).nll[0].values()) == {None}


def test_loss_does_not_come_from_an_older_forward(model, run):
    """A forward of the base model alone passes the head by."""
    ids, _ = batch([6])
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        model(ids, **past(cache))
        model.model(ids[:, :2], **past(cache))
        model(ids[:, 3:5], **past(cache))
    logged = read(run)
    truth = plain_loss(model, [*ids[0].tolist(), *ids[0, :2].tolist(), *ids[0, 3:5].tolist()])
    close_to(logged.nll[0], truth, lambda position: position not in (6, 7, 8))


def test_loss_after_rejected_drafts(model, run):
    ids, _ = batch([5])
    helper = tiny_model(seed=7)
    helper.generation_config.num_assistant_tokens = 3
    helper.generation_config.assistant_confidence_threshold = 0.0
    with observed(model, run):
        model.generate(
            ids, max_new_tokens=12, do_sample=False, assistant_model=helper, eos_token_id=None
        )
    logged = read(run)
    truth = plain_loss(model, logged.sequence(0))
    close_to(logged.nll[0], truth, lambda position: position >= 5)


def test_loss_after_right_padding_is_unknown(model, run):
    ids, mask = batch([6, 3])
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        model(ids, attention_mask=mask, **past(cache))
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        model(torch.tensor([[7], [7]]), attention_mask=longer, **past(cache))
    logged = read(run)
    assert logged.nll[0][6] is not None
    assert logged.tokens[1] == {0: ids[1, 0], 1: ids[1, 1], 2: ids[1, 2], 3: 7}
    assert logged.nll[1][3] is None


def test_loss_in_bfloat16_is_taken_in_float32(run):
    model = tiny_model().to(torch.bfloat16)
    ids, _ = batch([9])
    with observed(model, run):
        logits = model(ids).logits[0].float()
    truth = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    close_to(read(run).nll[0], truth.tolist(), lambda position: True)


def test_the_heads_output_is_not_kept_alive(model, run):
    ids, mask = batch([8, 8])
    gc.collect()
    gc.disable()
    try:
        with observed(model, run):
            heads = []
            for _ in range(3):
                output = model(ids, attention_mask=mask)
                heads.append(weakref.ref(output.logits.untyped_storage()))
                del output
            assert [head() for head in heads] == [None] * 3
    finally:
        gc.enable()
