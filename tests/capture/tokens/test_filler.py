"""Padding that no attention mask names: as evaluation harnesses feed it."""

import warnings

import pytest
import torch
from torch import Tensor

from bhlog.capture.observe import route
from tests.capture.tiny import EOS, PAD, batch, check_logits, observed, past, read, real_tokens

FILLERS = {"pad": PAD, "bos": 1, "eos": EOS, "other": 39}


def harness(
    lengths: list[int], filler: int, *, left: bool = False
) -> tuple[Tensor, list[list[int]]]:
    """Rows side by side and filled up, and the tokens in them; none is filler."""
    ids, mask = batch(lengths, left=left)
    ids = ids.masked_fill(ids == 39, 38)
    return ids.masked_fill(mask == 0, filler), real_tokens(ids, mask)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("filler", FILLERS.values(), ids=FILLERS)
def test_padding_that_the_caller_names_is_not_logged(model, run, filler, left):
    ids, rows = harness([7, 3, 5, 1], filler, left=left)
    with observed(model, run, pad_token_id=filler):
        model(ids)
        model(ids, use_cache=False)
    logged = read(run)
    assert list(logged.sequences.values()) == rows * 2
    if not left:  # the model itself counts padding on the left
        check_logits(model, logged)


def test_padding_in_a_loop_of_the_callers_is_not_logged(model, run):
    steps = torch.tensor([[5, EOS, PAD, PAD], [5, PAD, 7, 8]])  # at the end of a chunk it pads
    with observed(model, run, pad_token_id=PAD):
        ids, _ = batch([3, 3])
        cache = model(ids, use_cache=True)[
            "past_key_values" if "past_key_values" in past(0) else "cache"
        ]
        model(steps[:, :2], **past(cache))
        model(steps[:, 2:], **past(cache))
    first, second = ids.tolist()
    assert list(read(run).sequences.values()) == [[*first, 5, EOS], [*second, 5, 7, 8]]


def test_a_mask_says_more_than_a_named_padding(model, run):
    ids, mask = batch([5, 3])
    ids[0, 4] = ids[1, 2] = PAD  # text, as the mask says
    with observed(model, run, pad_token_id=PAD):
        model(ids, attention_mask=mask)
    assert list(read(run).sequences.values()) == real_tokens(ids, mask)


@pytest.mark.parametrize("filler", FILLERS.values(), ids=FILLERS)
def test_one_warning_says_what_may_be_filler(model, run, filler):
    lengths = [7, 3, 5, 2]
    ids, _ = harness(lengths, filler)
    with (
        pytest.warns(UserWarning, match=rf"rows that .* with id {filler} \(") as found,
        observed(model, run),
    ):
        for _ in range(2):
            model(ids)
    assert len(found) == 1 and "pad_token_id=" in str(found[0].message)
    assert read(run).manifest.totals.tokens == 2 * ids.numel()
    n = 2 * sum(7 - length for length in lengths)
    assert f"({n} tokens)" in str(found[0].message)


def test_a_trial_of_batch_sizes_is_warned_of_or_paused(model, run, tmp_path):
    ids, _ = batch([6, 6])
    trial = torch.ones(4, 32, dtype=torch.long)
    with (
        pytest.warns(UserWarning, match=r"some are id 1 alone \(128 tokens\)"),
        observed(model, run),
    ):
        model(trial)
        model(ids)
    with observed(model, tmp_path / "paused") as patcher:
        with patcher.paused():
            model(trial)
            cache = model(ids, use_cache=True)
        model(ids)
        del cache
    logged = read(tmp_path / "paused")
    assert list(logged.sequences.values()) == ids.tolist()
    assert logged.manifest.totals.forwards == 1


def test_text_alone_is_no_filler(model, run):
    ids, mask = batch([9, 4, 6])
    text, _ = batch([12] * 6, seed=3)
    text[0, -2:] = 7  # ends with an id twice, as text may
    with warnings.catch_warnings(), observed(model, run):
        warnings.simplefilter("error")
        model(ids, attention_mask=mask)
        model(text)
        model.generate(ids[:, :3], max_new_tokens=3, do_sample=False)


def test_padding_can_be_named_for_routing(model, run):
    ids, rows = harness([7, 3], PAD)
    with torch.no_grad(), route(model, run, alpha=0.3, p_values="empirical", pad_token_id=PAD):
        model(ids)
    assert list(read(run).sequences.values()) == rows
