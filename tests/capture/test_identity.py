"""Who each row is: every logged token is followed back to what the model was fed and answered."""

import copy
import gc
import io
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from capture.errors import UnknownIdentity
from capture.writer import WriterOptions
from tests.capture.tiny import (
    EOS,
    PAD,
    VOCABULARY,
    Logged,
    batch,
    check_logits,
    observed,
    plain_logits,
    plain_loss,
    read,
    real_tokens,
    tiny_model,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def generated(output: Tensor, mask: Tensor, eos: set[int] = frozenset()) -> list[list[int]]:
    """What each row of a generation was fed: prompt and answer, but the last token, up to eos."""
    rows = []
    width, repeats = mask.shape[1], len(output) // len(mask)
    for i, row in enumerate(output):
        prompt = row[:width][mask[i // repeats].bool()].tolist()
        answer = row[width:-1].tolist()
        ends = [j + 1 for j, token in enumerate(answer) if token in eos]
        rows.append(prompt + answer[: min(ends, default=None)])
    return rows


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
    with observed(model, run):
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


def test_mask_of_another_shape_is_refused(model, run):
    ids, _ = batch([6])
    with observed(model, run), pytest.raises(UnknownIdentity, match="one column per token"):
        model(ids, attention_mask=torch.ones(1, 5, dtype=torch.long))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("lengths", [[5, 5], [2, 7, 4]])
def test_greedy_generation(model, run, cache, lengths):
    ids, mask = batch(lengths, left=True)
    with observed(model, run):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            cache_implementation=cache if cache == "static" else None,
        )
    logged = read(run)
    assert fed(logged) == generated(output, mask)
    assert logged.phase[0] == {
        i: "prefill" if i < lengths[0] else "decode" for i in range(lengths[0] + 7)
    }
    check_logits(model, logged)


def test_static_cache_used_again_starts_new_sequences(model, run):
    first, second = batch([5, 3], left=True), batch([2, 5], left=True, seed=1)
    with observed(model, run):
        outputs = [
            model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=4,
                do_sample=False,
                cache_implementation="static",
            )
            for ids, mask in (first, second)
        ]
    logged = read(run)
    assert fed(logged) == [
        row for output, given in zip(outputs, (first, second), strict=True)
        for row in generated(output, given[1])
    ]  # fmt: skip
    check_logits(model, logged)


def test_length_of_a_followed_static_cache_is_not_read_from_the_device(model, run, monkeypatch):
    ids, _ = batch([4])
    cache = StaticCache(config=model.config, max_cache_len=16)
    with observed(model, run):
        model(ids, past_key_values=cache)
        forbidden = pytest.fail
        monkeypatch.setattr(Tensor, "__int__", lambda self: forbidden("waited for the device"))
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)
        monkeypatch.undo()
    assert fed(read(run)) == [ids[0].tolist() + ids[0, :1].tolist() * 3]


def test_sampled_returns(model, run):
    ids, mask = batch([3, 6], left=True)
    torch.manual_seed(1)
    with observed(model, run):
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=7, do_sample=True, num_return_sequences=3
        )
    logged = read(run)
    assert fed(logged) == generated(output, mask, {EOS})
    check_logits(model, logged)


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


@pytest.mark.parametrize("told", ["config", "argument", "list", "static", "pad is eos"])
def test_rows_that_finish_early_end_with_their_eos(model, run, told, monkeypatch):
    ids, mask, eos = finishing(model)
    options: dict[str, Any] = {}
    if told == "config":
        monkeypatch.setattr(model.generation_config, "eos_token_id", eos)
    else:
        options["eos_token_id"] = [eos, EOS] if told == "list" else eos
    if told == "static":
        options["cache_implementation"] = "static"
    if told == "pad is eos":
        options["pad_token_id"] = eos
    with observed(model, run):
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **options
        )
    logged = read(run)
    expected = generated(output, mask, {eos, EOS} if told == "list" else {eos})
    assert len({len(row) - int(m.sum()) for row, m in zip(expected, mask, strict=True)}) > 1
    assert fed(logged) == expected
    check_logits(model, logged)


def test_eos_that_generation_ignores_does_not_end_a_sequence(model, run, monkeypatch):
    ids, mask, eos = finishing(model)
    monkeypatch.setattr(model.config, "eos_token_id", eos)
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    with observed(model, run):
        output = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert fed(read(run)) == generated(output, mask)


def test_rows_that_another_criterion_stops(model, run):
    ids, mask = batch([4, 4])

    def stop_first_row(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] == 7, False])

    with observed(model, run):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            stopping_criteria=[stop_first_row],
        )
    assert output[0, 7:].tolist() == [PAD] * 5
    assert fed(read(run)) == [output[0, :7].tolist(), output[1, :-1].tolist()]


def test_padding_is_dropped_when_generating_without_a_cache(model, run):
    ids, mask, eos = finishing(model)
    with observed(model, run):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            use_cache=False,
            eos_token_id=eos,
        )
        model(*batch([15, 15, 15, 15]))
    logged = read(run)
    whole = generated(output, mask, {eos})
    steps = output.shape[1] - ids.shape[1]
    for step in range(steps):  # every forward reads its sequences anew
        for row in range(4):
            sequence = logged.sequence(4 * step + row)
            assert sequence == whole[row][: int(mask[row].sum()) + step]
    assert [len(logged.sequence(4 * steps + row)) for row in range(4)] == [15] * 4
    check_logits(model, logged)


def chains(logged: Logged, wanted: list[int]) -> bool:
    """Whether sequences of a run, each starting where the one before forked, spell `wanted`."""
    pieces = [sorted(tokens.items()) for tokens in logged.tokens.values()]
    reached = {0}
    for position, token in enumerate(wanted):
        starts = {p[0][0] for p in pieces if dict(p).get(position) == token}
        if not starts:
            return False
        reached |= starts
    return 0 in reached


@pytest.mark.parametrize("cache", [None, "static"])
def test_beam_search(model, run, cache):
    ids, mask = batch([5, 3], left=True)
    with observed(model, run):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            num_beams=3,
            num_return_sequences=2,
            do_sample=False,
            cache_implementation=cache,
        )
    logged = read(run)  # which finds duplicates
    for row in generated(output, mask.repeat_interleave(2, 0), {EOS}):
        assert chains(logged, row)
    for tokens in logged.tokens.values():  # a fork starts later, but has no gap
        assert sorted(tokens) == list(range(min(tokens), max(tokens) + 1))


def test_forked_beams_carry_their_logits(model, run):
    """Every beam's rows are what the model computes on that beam's whole prefix."""
    ids, _ = batch([4], left=True)
    seen: list[tuple[Tensor, Tensor]] = []
    with observed(model, run) as patcher:
        cache = DynamicCache(config=model.config)
        model(ids.repeat(3, 1), past_key_values=cache)
        rows = ids.repeat(3, 1)
        rng = torch.Generator().manual_seed(0)
        for _ in range(5):
            parents = torch.randint(0, 3, (3,), generator=rng)
            cache.reorder_cache(parents)
            step = torch.randint(3, VOCABULARY, (3, 1), generator=rng)
            rows = torch.cat([rows[parents], step], dim=1)
            model(step, past_key_values=cache)
            stream = patcher.tracker._place.stream
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


@pytest.mark.parametrize("chunk", [1, 2, 4, 100])
def test_chunked_prefill(model, run, chunk):
    ids, mask = batch([9, 5], left=True)
    ids[0, 3] = ids[0, 8] = EOS  # within a prompt it ends nothing
    with observed(model, run):
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=False, prefill_chunk_size=chunk
        )
    logged = read(run)
    assert fed(logged) == generated(output, mask)
    prefill = [p for p, phase in logged.phase[0].items() if phase == "prefill"]
    assert sorted(prefill) == list(range(9))
    check_logits(model, logged)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("sample", [False, True])
def test_assisted_decoding_keeps_no_rejected_draft(model, run, same, sample):
    """The same model drafts well, so all drafts are accepted at times; another one badly."""
    ids, _ = batch([6])
    helper = tiny_model(seed=0 if same else 7)
    helper.generation_config.num_assistant_tokens = 4
    helper.generation_config.assistant_confidence_threshold = 0.0
    torch.manual_seed(0)
    with observed(model, run):
        output = model.generate(
            ids, max_new_tokens=20, do_sample=sample, assistant_model=helper, eos_token_id=None
        )
    logged = read(run)
    assert fed(logged) in ([output[0].tolist()], [output[0, :-1].tolist()])
    assert {f for f, p in zip(logged.forward[0].values(), logged.phase[0].values(), strict=True)
            if p == "prefill"} == {0}  # fmt: skip
    check_logits(model, logged)


def test_prompt_lookup_keeps_no_rejected_draft(model, run):
    ids = batch([6])[0].repeat(1, 3)
    with observed(model, run):
        output = model.generate(
            ids, max_new_tokens=25, do_sample=False, prompt_lookup_num_tokens=4, eos_token_id=None
        )
    logged = read(run)
    assert fed(logged) in ([output[0].tolist()], [output[0, :-1].tolist()])
    check_logits(model, logged)


def test_an_eos_in_a_rejected_draft_ends_nothing(model, run):
    """A draft by hand: its eos is cut from the cache, and the row goes on."""
    ids, _ = batch([5])
    with observed(model, run):
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cache)
        model(torch.tensor([[5, EOS, 7]]), past_key_values=cache)
        cache.crop(-2)
        model(torch.tensor([[8, 9]]), past_key_values=cache)
        cache.crop(-1)
        model(torch.tensor([[10]]), past_key_values=cache)
    logged = read(run)
    assert fed(logged) == [[*ids[0].tolist(), int(ids[0, 0]), 5, 8, 10]]
    check_logits(model, logged)


def test_a_cache_cut_back_to_an_earlier_point_starts_another_sequence(model, run):
    ids, mask = batch([5])
    cache = DynamicCache(config=model.config)
    with observed(model, run):
        first = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, past_key_values=cache
        )
        cache.crop(5 - cache.get_seq_length())
        model(torch.tensor([[7]]), past_key_values=cache)
        model(torch.tensor([[8]]), past_key_values=cache)
    logged = read(run)
    assert logged.sequence(0) == first[0, :-1].tolist()
    assert logged.tokens[1] == {5: 7, 6: 8}


def test_pipeline(model, run):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", padding_side="left"
    )
    texts = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13"]
    speak = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    with observed(model, run):
        answers = speak(texts, max_new_tokens=6, do_sample=False, batch_size=2, return_tensors=True)
    whole = [answer[0]["generated_token_ids"] for answer in answers]
    found = fed(read(run))
    for text, sequence, answer in zip(texts, found, whole, strict=True):
        answer = [token for token in answer if token != PAD]
        assert answer[: len(sequence)] == sequence
        assert len(sequence) == len(text.split()) + 5 or sequence[-1] == EOS


def test_chat_of_several_turns_continues_its_sequence(model, run):
    ids, mask = batch([4])
    cache = DynamicCache(config=model.config)
    with observed(model, run):
        text = model.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=False, past_key_values=cache
        )
        for turn in ([EOS, 11, 12], []):  # an end of sequence within a prompt, and nothing new
            text = torch.cat([text, torch.tensor([turn], dtype=torch.long)], dim=1)
            text = model.generate(text, max_new_tokens=4, do_sample=False, past_key_values=cache)
    logged = read(run)
    assert fed(logged) == [text[0, :-1].tolist()]
    assert [logged.phase[0][p] for p in (3, 4, 7, 8, 10, 11, 12, 15, 16)] == [
        "prefill", "decode", "decode", "prefill", "prefill", "prefill", "decode", "prefill",
        "decode",
    ]  # fmt: skip
    check_logits(model, logged)


def test_second_turn_after_rows_that_finished_early(model, run):
    ids, mask, eos = finishing(model)
    cache = DynamicCache(config=model.config)
    with observed(model, run):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            past_key_values=cache,
            eos_token_id=eos,
        )
        more = torch.full((4, 3), 17)
        model(more, past_key_values=cache)
        model(more[:, :1], past_key_values=cache)
    expected = generated(output, mask, {eos})
    assert fed(read(run)) == [row + [17] * 4 for row in expected]


def test_manual_loop_with_one_buffer_for_the_next_token(model, run):
    ids, mask = batch([3, 5], left=True)
    fed_rows = real_tokens(ids, mask)
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        buffer, visible = ids.clone(), mask.bool()
        model(buffer, attention_mask=visible, past_key_values=cache)
        buffer.zero_()
        visible.zero_()
        step = torch.zeros(2, 1, dtype=torch.long)
        for token in range(20, 30):
            step.fill_(token)
            model(step, past_key_values=cache)
            step.zero_()
    assert fed(read(run)) == [row + list(range(20, 30)) for row in fed_rows]


def test_manual_loop_ends_at_the_configured_eos(model, run):
    ids, _ = batch([3, 3])
    steps = torch.tensor([[5, EOS, PAD, PAD], [5, 6, 7, 8]])
    with observed(model, run):
        cache = model(ids, use_cache=True).past_key_values
        for column in range(4):
            model(steps[:, column : column + 1], past_key_values=cache)
    first, second = ids.tolist()
    assert fed(read(run)) == [[*first, 5, EOS], [*second, 5, 6, 7, 8]]


def test_tuple_outputs_are_followed_and_have_a_loss(model, run):
    ids, _ = batch([4])
    with observed(model, run):
        output = model(ids, use_cache=True, return_dict=False)
        cache = next(part for part in output if isinstance(part, DynamicCache))
        model(torch.tensor([[9]]), past_key_values=cache, return_dict=False)
    logged = read(run)
    whole = [*ids[0].tolist(), 9]
    assert fed(logged) == [whole]
    assert [logged.nll[0][p] for p in range(1, 5)] == pytest.approx(plain_loss(model, whole), 1e-4)


@pytest.mark.parametrize(
    "packing",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "attention_mask": torch.ones(1, 6)},
        {"cu_seq_lens_q": torch.tensor([0, 3, 6], dtype=torch.int32)},
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
        cache = model(inputs_embeds=embeddings, use_cache=True).past_key_values
        model(torch.tensor([[9]]), past_key_values=cache)
        model(ids)
    logged = read(run)
    assert fed(logged) == [[None] * 5 + [9], ids[0].tolist()]
    nll = plain_loss(model, [*ids[0].tolist(), 9])
    assert logged.nll[0] == {0: None, 1: None, 2: None, 3: None, 4: None, 5: pytest.approx(nll[-1])}


def test_tuple_caches_are_refused(model, run):
    ids, _ = batch([5])
    with observed(model, run), pytest.raises(UnknownIdentity, match="Cache object"):
        model(ids, past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_cache_filled_before_observing_starts_late(model, run):
    ids, mask = batch([3, 5], left=True)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    with observed(model, run):
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        model(torch.tensor([[9], [8]]), attention_mask=longer, past_key_values=cache)
    assert dict(read(run).tokens) == {0: {3: 9}, 1: {5: 8}}


def test_a_forward_that_fails_leaves_no_trace(model, run):
    ids, _ = batch([4, 4])

    class Boom(RuntimeError):
        pass

    def boom(module: Any, args: Any) -> None:
        raise Boom

    with observed(model, run):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        handle = model.model.layers[0].register_forward_pre_hook(boom)
        with pytest.raises(Boom):
            model(ids[:, :1], past_key_values=cache)
        handle.remove()
        model(torch.tensor([[9], [9]]), past_key_values=cache)
    logged = read(run)
    assert fed(logged) == [[*row, 9] for row in ids.tolist()]
    assert logged.log.manifest.totals.forwards == 2
    check_logits(model, logged)


def test_a_generation_that_fails_leaves_no_trace_in_the_next_forward(model, run):
    ids, mask, eos = finishing(model)

    def fail(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] == ids.shape[1] + 4:
            raise RuntimeError("stop here")
        return torch.zeros(len(input_ids), dtype=torch.bool)

    whole, _ = batch([ids.shape[1] + 4] * 4, seed=9)
    with observed(model, run):
        for use_cache in (True, False):
            with pytest.raises(RuntimeError, match="stop here"):
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=12,
                    do_sample=False,
                    eos_token_id=eos,
                    stopping_criteria=[fail],
                    use_cache=use_cache,
                )
            model(whole)
    sequences = fed(read(run))
    assert sequences[4:8] == whole.tolist()
    assert sequences[-4:] == whole.tolist()


def test_copied_cache_is_a_cache_of_its_own(model, run):
    """The prompt once, then several continuations, each from a copy."""
    ids, _ = batch([5])
    with observed(model, run):
        prompt = DynamicCache(config=model.config)
        model(ids, past_key_values=prompt)
        before = prompt.layers[0].keys.clone()
        copies = [copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))]
        for i, mine in enumerate(copies):
            mine.batch_repeat_interleave(2)
            mine.reorder_cache(torch.tensor([1, 0]))
            model(torch.tensor([[9 + i], [19 + i]]), past_key_values=mine)
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
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        model(torch.tensor([[5], [6], [7], [8]]), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([3, 0]))
        model(torch.tensor([[9], [10]]), past_key_values=cache)
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
            model(ids, past_key_values=cache)
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
            model(ids, past_key_values=cache)
        caches[1].reset()
    for cache in caches:
        assert not set(vars(cache)) & {"crop", "reset", "reorder_cache", "batch_select_indices"}
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_threads_with_streams_of_their_own(model, run):
    texts = [batch([5], seed=seed)[0] for seed in range(4)]

    def speak(ids: Tensor) -> None:
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache)
            for token in range(20, 26):
                model(torch.tensor([[token]]), past_key_values=cache)

    with observed(model, run, options=WriterOptions(shard_rows=20)):
        threads = [threading.Thread(target=speak, args=(ids,)) for ids in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    logged = read(run)
    assert sorted(fed(logged)) == sorted([*ids[0].tolist(), *range(20, 26)] for ids in texts)
    check_logits(model, logged)


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
        model(ids, logits_to_keep=kept, past_key_values=cache)
        model(torch.tensor([[7]]), past_key_values=cache)
    logged = read(run)
    truth = plain_loss(model, [*ids[0].tolist(), 7])
    close_to(logged.nll[0], truth, lambda position: position in known or position == 8)


def test_loss_is_unknown_where_the_head_saw_chosen_columns(model, run):
    ids, _ = batch([6])
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        model(ids, logits_to_keep=torch.tensor([5, 0, 1]), past_key_values=cache)
        model(torch.tensor([[7]]), past_key_values=cache)
    assert set(read(run).nll[0].values()) == {None}


def test_loss_does_not_come_from_an_older_forward(model, run):
    """A forward of the base model alone passes the head by."""
    ids, _ = batch([6])
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        model.model(ids[:, :2], past_key_values=cache)
        model(ids[:, 3:5], past_key_values=cache)
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
        model(ids, attention_mask=mask, past_key_values=cache)
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        model(torch.tensor([[7], [7]]), attention_mask=longer, past_key_values=cache)
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
