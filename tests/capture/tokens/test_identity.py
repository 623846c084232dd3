"""Who each row is: every logged token is followed back to what the model was fed and answered."""

import copy
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from bhlog.capture.contract.errors import UnknownIdentity
from bhlog.capture.tokens.identity import Tracker
from bhlog.capture.writing.writer import WriterOptions
from tests.capture.tiny import (
    CACHE,
    EOS,
    TRANSFORMERS_4,
    VOCABULARY,
    Logged,
    batch,
    check_logits,
    no_static_cache,
    observed,
    past,
    plain_logits,
    plain_loss,
    read,
    real_tokens,
)


def fed(logged: Logged) -> list[list[int | None]]:
    """Sequences of a run in order of their numbers."""
    return list(logged.sequences.values())


@pytest.mark.parametrize(
    ("lengths", "left"), [([6, 6], False), ([7, 3, 1], False), ([7, 3, 1], True), ([1], False)]
)
def test_plain_forward(model, run, lengths, left):
    ids, mask = batch(lengths, left=left)
    with observed(model, run):
        model(ids, attention_mask=mask)
    logged = read(run)
    assert fed(logged) == real_tokens(ids, mask)
    check_logits(model, logged)


def test_forwards_number_their_sequences_on(model, run):
    first, second = batch([4, 2]), batch([3, 5], seed=1)
    # without a mask the padding of the first batch is text, or so it seems
    with pytest.warns(UserWarning, match=r"end with id 0 \(2 tokens\)"), observed(model, run):
        model(first[0], attention_mask=first[1])
        model(second[0], attention_mask=second[1], use_cache=False)
        model(input_ids=first[0])
    logged = read(run)
    assert fed(logged) == [*real_tokens(*first), *real_tokens(*second), *first[0].tolist()]
    assert [set(f.values()) for f in logged.forward.values()] == [{0}] * 2 + [{1}] * 2 + [{2}] * 2


def test_mask_as_attention_takes_it(model, run):
    ids, mask = batch([6, 3], left=True)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    visible = causal & mask[:, None, None, :].bool()
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    opened_up = visible | ~visible.any(-1, keepdim=True)  # rows of padding, for some kernels
    with observed(model, run):
        for given in (visible, additive, opened_up):
            model(ids, attention_mask=given)
    assert fed(read(run)) == real_tokens(ids, mask) * 3


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["bool", "additive", "opened up", "half"])
def test_tokens_that_see_ahead_are_tokens(model, run, left, kind):
    """A prefix that attends both ways, and a whole text that does, with padding beside it."""
    ids, mask = batch([8, 5], left=left)
    real = mask.bool()
    prefix = torch.zeros(2, 8, dtype=torch.bool)
    for row, starts in enumerate((0, 3 if left else 0)):
        prefix[row, starts : starts + 3] = True
    both = prefix[:, :, None] & prefix[:, None, :]
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    image = causal.clone()
    image[5:, 5:] = True  # a block at the end that attends both ways, as of an image
    seen = [
        image & real[:, None, None, :],
        (causal | both)[:, None] & real[:, None, None, :],
        real[:, None, None, :].expand(2, 1, 8, 8),
    ]
    with observed(model, run):
        for visible in seen:
            if kind == "opened up" and left:  # rows on the right always have something to see
                visible = visible & real[:, None, :, None]
                visible = visible | ~visible.any(-1, keepdim=True)
            lowest = -1e4 if kind == "half" else torch.finfo(torch.float32).min
            model(
                ids, attention_mask=visible if kind == "bool" else torch.where(visible, 0.0, lowest)
            )
    assert fed(read(run)) == real_tokens(ids, mask) * 3


def test_a_bias_of_attention_hides_nothing(model, run):
    ids, mask = batch([6, 3], left=True)
    causal = torch.ones(6, 6, dtype=torch.bool).tril() & mask[:, None, None, :].bool()
    bias = -0.25 * (torch.arange(6)[:, None] - torch.arange(6)).abs()
    with observed(model, run):
        model(ids, attention_mask=torch.where(causal, bias, -torch.inf).nan_to_num(neginf=-1e9))
    assert fed(read(run)) == real_tokens(ids, mask)


def test_a_mask_that_packs_sequences_or_a_tree_is_refused(model, run):
    ids, _ = batch([8])
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    blocks = torch.block_diag(torch.ones(5, 5), torch.ones(3, 3)).bool() & causal
    tree = causal.clone()
    tree[6, 5] = tree[7, 5] = False  # another continuation of the token at 4
    with observed(model, run):
        for visible in (blocks, tree, torch.eye(8, dtype=torch.bool)):
            with pytest.raises(UnknownIdentity, match="one sequence per row"):
                model(ids, attention_mask=visible[None, None])
        window = causal.triu(-2)
        model(ids, attention_mask=window[None, None])
    assert fed(read(run)) == ids.tolist()


def test_mask_of_another_shape_is_refused(model, run):
    ids, _ = batch([6])
    with observed(model, run), pytest.raises(UnknownIdentity, match="one column per token"):
        model(ids, attention_mask=torch.ones(1, 5, dtype=torch.long))


def test_length_of_a_followed_static_cache_is_not_read_from_the_device(model, run, monkeypatch):
    ids, _ = batch([4])
    cache = StaticCache(config=model.config, max_cache_len=16)
    with observed(model, run):
        model(ids, **past(cache))
        forbidden = pytest.fail
        monkeypatch.setattr(Tensor, "__int__", lambda self: forbidden("waited for the device"))
        for _ in range(3):
            model(ids[:, :1], **past(cache))
        monkeypatch.undo()
    assert fed(read(run)) == [ids[0].tolist() + ids[0, :1].tolist() * 3]


def test_forked_beams_carry_their_logits(model, run):
    """Every beam's rows are what the model computes on that beam's whole prefix."""
    ids, _ = batch([4], left=True)
    seen: list[tuple[Tensor, Tensor]] = []
    with observed(model, run) as patcher:
        cache = DynamicCache(config=model.config)
        model(ids.repeat(3, 1), **past(cache))
        rows = ids.repeat(3, 1)
        rng = torch.Generator().manual_seed(0)
        for _ in range(5):
            parents = torch.randint(0, 3, (3,), generator=rng)
            cache.reorder_cache(parents)
            step = torch.randint(3, VOCABULARY, (3, 1), generator=rng)
            rows = torch.cat([rows[parents], step], dim=1)
            model(step, **past(cache))
            stream = patcher.tracker._streams[cache]
            seen.append((torch.from_numpy(stream.sequences.astype("int64")), rows))
    logged = read(run)

    for sequences, prefixes in seen:
        assert len(set(sequences.tolist())) == 3
        for number, prefix in zip(sequences.tolist(), prefixes.tolist(), strict=True):
            last = len(prefix) - 1
            assert logged.tokens[number][last] == prefix[-1]
            for layer, truth in plain_logits(model, prefix).items():
                found = torch.from_numpy(logged.logits[number, layer][last].copy())
                torch.testing.assert_close(found, truth[-1], atol=2e-4, rtol=0)


def test_an_eos_in_a_rejected_draft_ends_nothing(model, run):
    """A draft by hand: its eos is cut from the cache, and the row goes on."""
    ids, _ = batch([5])
    with observed(model, run):
        cache = model(ids, use_cache=True)[CACHE]
        model(ids[:, :1], **past(cache))
        model(torch.tensor([[5, EOS, 7]]), **past(cache))
        cache.crop(-2)
        model(torch.tensor([[8, 9]]), **past(cache))
        cache.crop(-1)
        model(torch.tensor([[10]]), **past(cache))
    logged = read(run)
    assert fed(logged) == [[*ids[0].tolist(), int(ids[0, 0]), 5, 8, 10]]
    check_logits(model, logged)


def test_manual_loop_with_one_buffer_for_the_next_token(model, run):
    ids, mask = batch([3, 5], left=True)
    fed_rows = real_tokens(ids, mask)
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        buffer, visible = ids.clone(), mask.bool()
        model(buffer, attention_mask=visible, **past(cache))
        buffer.zero_()
        visible.zero_()
        step = torch.zeros(2, 1, dtype=torch.long)
        for token in range(20, 30):
            step.fill_(token)
            model(step, **past(cache))
            step.zero_()
    assert fed(read(run)) == [row + list(range(20, 30)) for row in fed_rows]


CHUNKS = {
    "whole": [14],
    "prompt and turns": [4, 5, 5],
    "token by token": [4] + [1] * 10,
}


@pytest.mark.parametrize("chunks", CHUNKS)
def test_an_eos_in_a_text_is_text_however_it_is_fed_over_a_cache(model, run, chunks):
    text = [5, 6, 7, 8, 10, 11, EOS, 12, 13, 20, EOS, 21, 22, EOS]
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        start = 0
        for length in CHUNKS[chunks]:
            model(torch.tensor([text[start : start + length]]), **past(cache))
            start += length
    logged = read(run)
    assert fed(logged) == [text]
    check_logits(model, logged)


def test_options_on_a_cropped_prefix_keep_every_token_after_an_eos(model, run):
    prefix, first, second = [5, 6, 7, 8], [10, 11, EOS, 12, 13], [20, EOS, 21, 22, 23]
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        for part in (prefix, first):
            model(torch.tensor([part]), **past(cache))
        cache.crop(-5)
        model(torch.tensor([second]), **past(cache))
        for token in (24, EOS, 25):
            model(torch.tensor([[token]]), **past(cache))
    logged = read(run)
    assert logged.manifest.totals.tokens + logged.manifest.totals.rejected == 17
    assert [*second, 24, EOS, 25] == [
        token for number in sorted(logged.tokens) for p, token in logged.tokens[number].items()
        if logged.forward[number][p] > 1
    ]  # fmt: skip


def test_tuple_outputs_are_followed_and_have_a_loss(model, run):
    ids, _ = batch([4])
    with observed(model, run):
        output = model(ids, use_cache=True, return_dict=False)
        cache = next(part for part in output if isinstance(part, DynamicCache))
        model(torch.tensor([[9]]), **past(cache), return_dict=False)
    logged = read(run)
    whole = [*ids[0].tolist(), 9]
    assert fed(logged) == [whole]
    assert [logged.nll[0][p] for p in range(1, 5)] == pytest.approx(plain_loss(model, whole), 1e-4)


@pytest.mark.parametrize(
    "packing",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "attention_mask": torch.ones(1, 6)},
        pytest.param(
            {"cu_seq_lens_q": torch.tensor([0, 3, 6], dtype=torch.int32)},
            marks=pytest.mark.skipif(TRANSFORMERS_4, reason="OLMoE leaves it unread there"),
        ),
    ],
)
def test_packed_batches_are_refused(model, run, packing):
    ids, _ = batch([6])
    with observed(model, run), pytest.raises(UnknownIdentity, match="packed"):
        model(ids, **packing)
    assert read(run).tokens == {}


def test_positions_of_left_padding_are_not_packing(model, run):
    ids, mask = batch([6, 3], left=True)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with observed(model, run):
        model(ids, attention_mask=mask, position_ids=positions)
    assert fed(read(run)) == real_tokens(ids, mask)


def test_embeddings_alone_have_no_token_ids(model, run):
    ids, _ = batch([5])
    embeddings = model.get_input_embeddings()(ids).detach()
    with observed(model, run):
        cache = model(inputs_embeds=embeddings, use_cache=True)[CACHE]
        model(torch.tensor([[9]]), **past(cache))
        model(ids)
    logged = read(run)
    assert fed(logged) == [[None] * 5 + [9], ids[0].tolist()]
    nll = plain_loss(model, [*ids[0].tolist(), 9])
    assert logged.nll[0] == {0: None, 1: None, 2: None, 3: None, 4: None, 5: pytest.approx(nll[-1])}


def test_tuple_caches_are_refused(model, run):
    ids, _ = batch([5])
    with observed(model, run), pytest.raises(UnknownIdentity, match="Cache object"):
        model(ids, **past(((torch.zeros(1), torch.zeros(1)),)))


def test_a_mask_of_tokens_that_no_cache_holds_is_refused(model, run):
    ids, mask = batch([5, 3], left=True)
    with observed(model, run), pytest.raises(UnknownIdentity, match="no cache that holds"):
        model(ids[:, -1:], attention_mask=mask)
    assert read(run).tokens == {}


def test_a_cache_that_comes_out_but_did_not_go_in_is_refused(model, run):
    """Here a hook of someone else's hands it over unseen."""
    ids, _ = batch([5])

    def hand_over(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, **past(cache)}

    with observed(model, run):
        cache = model(ids, use_cache=True)[CACHE]
        handle = model.model.register_forward_pre_hook(hand_over, with_kwargs=True)
        with pytest.raises(UnknownIdentity, match="a cache of 6 columns"):
            model(ids[:, :1])
        handle.remove()
    assert fed(read(run)) == ids.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 2},
        pytest.param({"cache_implementation": "static"}, marks=no_static_cache),
    ],
)
def test_a_generation_whose_cache_is_not_found_is_refused(model, run, options, monkeypatch):
    monkeypatch.setattr("bhlog.capture.tokens.identity.find_cache", lambda values: None)
    ids, _ = batch([5, 5])
    with observed(model, run), pytest.raises(UnknownIdentity, match="cache"):
        model.generate(ids, max_new_tokens=3, do_sample=False, **options)


def test_tokens_that_generate_chose_after_tokens_in_no_cache_are_refused():
    tracker = Tracker()
    tracker.generation_begins()
    tracker.end(tracker.begin({"input_ids": torch.tensor([[5, 6, 7]])}), None)
    tracker.tokens_chosen(torch.tensor([False]))
    with pytest.raises(UnknownIdentity, match="feeds 1 tokens a row after 3"):
        tracker.begin({"input_ids": torch.tensor([[8]])})


def test_two_caches_at_once_are_refused():
    one, other = DynamicCache(), DynamicCache()
    ids = torch.tensor([[5]])
    with pytest.raises(UnknownIdentity, match="2 caches"):
        Tracker().begin({"input_ids": ids, **past(one), "another": other})


def test_tokens_of_several_requests_in_one_row_are_refused():
    """As continuous batching feeds them: here a token each of two, at positions that rise."""
    with pytest.raises(UnknownIdentity, match="packed"):
        Tracker().begin(
            {
                "input_ids": torch.tensor([[5, 6]]),
                "position_ids": torch.tensor([[3, 8]]),
                "cu_seq_lens_q": torch.tensor([0, 1, 2], dtype=torch.int32),
            }
        )


def test_cache_filled_before_observing_starts_late(model, run):
    ids, mask = batch([3, 5], left=True)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, **past(cache))
    with observed(model, run):
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        model(torch.tensor([[9], [8]]), attention_mask=longer, **past(cache))
    assert dict(read(run).tokens) == {0: {3: 9}, 1: {5: 8}}


def test_a_forward_that_fails_leaves_no_trace(model, run):
    ids, _ = batch([4, 4])

    class Boom(RuntimeError):
        pass

    def boom(module: Any, args: Any) -> None:
        raise Boom

    with observed(model, run):
        cache = DynamicCache(config=model.config)
        model(ids, **past(cache))
        handle = model.model.layers[0].register_forward_pre_hook(boom)
        with pytest.raises(Boom):
            model(ids[:, :1], **past(cache))
        handle.remove()
        model(torch.tensor([[9], [9]]), **past(cache))
    logged = read(run)
    assert fed(logged) == [[*row, 9] for row in ids.tolist()]
    assert logged.manifest.totals.forwards == 2
    check_logits(model, logged)


def test_copied_cache_is_a_cache_of_its_own(model, run):
    """The prompt once, then several continuations, each from a copy."""
    ids, _ = batch([5])
    with observed(model, run):
        prompt = DynamicCache(config=model.config)
        model(ids, **past(prompt))
        before = prompt.layers[0].keys.clone()
        copies = [copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))]
        for i, mine in enumerate(copies):
            mine.batch_repeat_interleave(2)
            mine.reorder_cache(torch.tensor([1, 0]))
            model(torch.tensor([[9 + i], [19 + i]]), **past(mine))
            mine.crop(-1)
            assert mine.get_seq_length() == 5
        torch.save(prompt, io.BytesIO())
        assert torch.equal(prompt.layers[0].keys, before)
    logged = read(run)
    assert logged.sequence(0) == ids[0].tolist()
    continued = [tokens for number, tokens in logged.tokens.items() if number]
    assert continued == [{5: 9}, {5: 19}, {5: 10}, {5: 20}]


def test_repeated_and_selected_rows_keep_their_identity(model, run):
    ids, _ = batch([4, 4])
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        model(ids, **past(cache))
        cache.batch_repeat_interleave(2)
        model(torch.tensor([[5], [6], [7], [8]]), **past(cache))
        cache.batch_select_indices(torch.tensor([3, 0]))
        model(torch.tensor([[9], [10]]), **past(cache))
    logged = read(run)
    assert logged.sequence(0) == [*ids[0].tolist(), 5, 10]
    assert logged.sequence(1) == [*ids[1].tolist(), 7]
    assert (logged.tokens[2], logged.tokens[3]) == ({4: 6}, {4: 8, 5: 9})


def test_following_a_cache_does_not_keep_it_alive(model, run):
    ids, _ = batch([4])
    gc.collect()
    gc.disable()
    try:
        with observed(model, run):
            cache = DynamicCache(config=model.config)
            model(ids, **past(cache))
            gone = weakref.ref(cache)
            del cache
            assert gone() is None
    finally:
        gc.enable()


def test_nothing_is_left_on_cache_or_model(model, run):
    ids, _ = batch([4])
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=9)]
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with observed(model, run):
        for cache in caches:
            model(ids, **past(cache))
        caches[1].reset()
    for cache in caches:
        assert not set(vars(cache)) & {"crop", "reset", "reorder_cache", "batch_select_indices"}
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_threads_with_streams_of_their_own(model, run):
    texts = [batch([5], seed=seed)[0] for seed in range(4)]

    def speak(ids: Tensor) -> None:
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids, **past(cache))
            for token in range(20, 26):
                model(torch.tensor([[token]]), **past(cache))

    with observed(model, run, options=WriterOptions(shard_rows=20)):
        threads = [threading.Thread(target=speak, args=(ids,)) for ids in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    logged = read(run)
    assert sorted(fed(logged)) == sorted([*ids[0].tolist(), *range(20, 26)] for ids in texts)
    check_logits(model, logged)
