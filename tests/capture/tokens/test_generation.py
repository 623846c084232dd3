"""Identity through `generate`: each row of its output is found in the log, token by token."""

from typing import Any
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.observe import route
from tests.capture.tiny import (
    EOS,
    LAYERS,
    PAD,
    TRANSFORMERS_4,
    VOCABULARY,
    Logged,
    batch,
    check_logits,
    finishing,
    no_static_cache,
    observed,
    past,
    read,
    rows_of,
    tiny_model,
)

STATIC = pytest.param("static", marks=no_static_cache)


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


@pytest.mark.parametrize("cache", ["dynamic", STATIC])
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


@no_static_cache
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


@pytest.mark.parametrize("told", ["config", "argument", "list", STATIC, "pad is eos"])
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


@pytest.mark.parametrize("cache", [None, STATIC])
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
    # transformers 4 counts padding in the positions of all chunks but the last
    check_logits(model, logged, [0] if TRANSFORMERS_4 else None)


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


@pytest.mark.filterwarnings("ignore:p-values that rank a forward")
def test_rejected_drafts_are_counted_and_their_batches_not_replayed(model, run):
    """The routers saw them: an empirical p-value ranks them too."""
    pytest.importorskip("polars", reason="a replay is of the other half")
    from bhlog.analysis.replay.decide import decider_of
    from bhlog.analysis.run import open_log

    ids, _ = batch([6])
    helper = tiny_model(seed=7)
    rows = 0

    def count(module: Any, args: Any, output: Any) -> None:
        nonlocal rows
        rows += args[0].reshape(-1, args[0].shape[-1]).shape[0]

    handle = model.model.layers[0].mlp.gate.register_forward_hook(count)
    with torch.no_grad(), route(model, run, alpha=0.3, p_values="empirical"):
        model.generate(
            ids, max_new_tokens=20, do_sample=False, assistant_model=helper, eos_token_id=None
        )
    handle.remove()
    log = open_log(run)
    totals = log.manifest.totals
    assert totals.rejected == rows - totals.tokens > 0
    with pytest.raises(InvalidOption, match="drafts that were rejected"):
        decider_of(log, [BhOptions(alpha=0.3, p_values="empirical")])


def test_prompt_lookup_keeps_no_rejected_draft(model, run):
    ids = batch([6])[0].repeat(1, 3)
    with observed(model, run):
        output = model.generate(
            ids,
            max_new_tokens=25,
            do_sample=False,
            prompt_lookup_num_tokens=4,
            eos_token_id=VOCABULARY,  # never chosen
        )
    logged = read(run)
    assert fed(logged) in ([output[0].tolist()], [output[0, :-1].tolist()])
    check_logits(model, logged)


def test_a_cache_cut_back_to_an_earlier_point_starts_another_sequence(model, run):
    ids, mask = batch([5])
    cache = DynamicCache(config=model.config)
    with observed(model, run):
        first = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, **past(cache)
        )
        cache.crop(5 - cache.get_seq_length())
        model(torch.tensor([[7]]), **past(cache))
        model(torch.tensor([[8]]), **past(cache))
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
            ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **past(cache)
        )
        for turn in ([EOS, 11, 12], []):  # an end of sequence within a prompt, and nothing new
            text = torch.cat([text, torch.tensor([turn], dtype=torch.long)], dim=1)
            text = model.generate(text, max_new_tokens=4, do_sample=False, **past(cache))
    logged = read(run)
    assert fed(logged) == [text[0, :-1].tolist()]
    assert [logged.phase[0][p] for p in (3, 4, 7, 8, 10, 11, 12, 15, 16)] == [
        "prefill", "decode", "decode", "prefill", "prefill", "prefill", "decode", "prefill",
        "decode",
    ]  # fmt: skip
    check_logits(model, logged)


def test_a_phase_is_decode_where_chosen_tokens_continue_a_cache(model, run):
    ids, _ = batch([5])
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        model(ids, **past(cache))
        model(torch.tensor([[7, 8, 9]]), **past(cache))
        cache.crop(-1)
        model(torch.tensor([list(range(10, 20))]), **past(cache))  # given, after a cut too
        model(torch.tensor([[20]]), **past(cache))  # alone: a loop that chose it
        model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
    logged = read(run)
    phases = logged.phase[0]
    assert [phases[p] for p in sorted(phases)] == ["prefill"] * 17 + ["decode"]
    assert {phase for n in (1, 2, 3) for phase in logged.phase[n].values()} == {"prefill"}


def test_second_turn_after_rows_that_finished_early(model, run):
    ids, mask, eos = finishing(model)
    cache = DynamicCache(config=model.config)
    with observed(model, run):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=False,
            **past(cache),
            eos_token_id=eos,
        )
        more = torch.full((4, 3), 17)
        model(more, **past(cache))
        model(more[:, :1], **past(cache))
    expected = generated(output, mask, {eos})
    assert fed(read(run)) == [row + [17] * 4 for row in expected]


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


@pytest.mark.parametrize("use_cache", [True, False])
def test_an_end_is_kept_though_guidance_runs_the_model_in_between(model, run, use_cache):
    ids, mask, eos = finishing(model)
    with observed(model, run):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=eos,
            guidance_scale=1.01,
            use_cache=use_cache,
        )
    logged = read(run)
    expected = generated(output, mask, {eos})
    assert PAD not in {token for row in expected for token in row}
    assert PAD not in {token for row in logged.tokens.values() for token in row.values()}
    if not use_cache:
        return  # every forward reads its sequences anew
    found = fed(logged)
    assert len({len(row) for row in expected}) > 1
    assert all(row in found for row in expected)


@pytest.mark.skipif(TRANSFORMERS_4, reason="it always knows at once there")
def test_a_generation_that_knows_its_end_one_step_late(model, run, monkeypatch):
    """As on Apple's GPUs: a forward more, which is fed the last row's eos and padding."""
    from transformers.generation.utils import DeferredStopCheck

    monkeypatch.setattr(DeferredStopCheck, "is_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch, "Event", Mock())  # the CPU has no events
    ids, mask = batch([4, 4])

    def stop(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor([input_ids.shape[1] == 6, input_ids.shape[1] == 8])

    with observed(model, run):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=VOCABULARY,  # never chosen
            stopping_criteria=[stop],
        )
    logged = read(run)
    assert logged.manifest.totals.forwards == 5
    assert fed(logged) == [output[0, :6].tolist(), output[1, :8].tolist()]


def whole(run: Any) -> list[list[int]]:
    """Every sequence from its first token on: its own rows after those of the sequences it left."""
    rows = rows_of(run, "tokens")
    own: dict[int, dict[int, int]] = {}
    parent: dict[int, int | None] = {}
    for row in rows:
        own.setdefault(row["sequence"], {})[row["position"]] = row["token_id"]
        assert parent.setdefault(row["sequence"], row["parent"]) == row["parent"]

    def before(number: int | None, until: int) -> dict[int, int]:
        if number is None:
            return {}
        mine = {p: token for p, token in own[number].items() if p < until}
        return before(parent[number], min([until, *own[number]])) | mine

    texts = [before(number, 10**9) for number in sorted(own)]
    for text in texts:
        assert sorted(text) == list(range(len(text)))
    return [[text[p] for p in range(len(text))] for text in texts]


@pytest.mark.parametrize("cache", [None, STATIC])
def test_a_sequence_that_beams_returned_is_read_whole_through_its_parents(model, run, cache):
    ids, mask = batch([5, 3], left=True)
    with observed(model, run):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=9,
            num_beams=4,
            num_return_sequences=4,
            do_sample=False,
            cache_implementation=cache,
        )
    texts = whole(run)
    assert {row["parent"] for row in rows_of(run, "tokens")} != {None}
    returned = generated(output, mask.repeat_interleave(4, 0), {EOS})
    for row in returned:
        row = row[:-1] if row[-1] == EOS else row  # beam search does not feed it
        assert any(text[: len(row)] == row for text in texts)
    pytest.importorskip("duckdb", reason="the question is of the other half")
    from bhlog.analysis.database.question import find_question
    from bhlog.analysis.run import open_log

    question, found = find_question("whole_sequences"), dict[int, list[int]]()
    asked = open_log(run).sql(question.text, **question.values({}))
    for row in asked.pl().to_dicts():
        found.setdefault(row["sequence"], []).append(row["token_id"])
    assert list(found.values()) == texts


def test_forks_of_a_cache_by_hand_name_the_sequence_they_left(model, run):
    ids, _ = batch([4])
    with observed(model, run):
        cache = DynamicCache(config=model.config)
        model(ids, **past(cache))
        cache.batch_repeat_interleave(2)  # 0, and 1 that leaves it
        cache.reorder_cache(torch.tensor([1, 1]))  # 1, and 2 that leaves it: 1 has no row yet
        model(torch.tensor([[5], [6]]), **past(cache))
        model(torch.tensor([[7], [8]]), **past(cache))
        cache.crop(4 - cache.get_seq_length())  # back to the start: 3 and 4
        model(torch.tensor([[9], [10]]), **past(cache))
    parents = {row["sequence"]: row["parent"] for row in rows_of(run, "tokens")}
    assert parents == {0: None, 1: 0, 2: 0, 3: 1, 4: 2}
    start = ids[0].tolist()
    ends = [[], [5, 7], [6, 8], [9], [10]]
    assert whole(run) == [start + end for end in ends]


def test_decoding_one_token_at_a_time_by_ranks_is_told_once_to_reject_nothing(model, run):
    ids, _ = batch([6])
    few = "a forward of 1 row are at least 1: BH at alpha 0.9 rejects nothing"
    with (
        torch.no_grad(),
        route(model, run, alpha=0.9, p_values="empirical"),
        pytest.warns(UserWarning, match="p-values that rank") as told,
    ):
        model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert [few in str(w.message) for w in told] == [True]
    rows = pq.read_table(sorted((run / "routing").iterdir())[0]).to_pylist()
    decoded = [row["n_rejected"] for row in rows if row["position"] >= 6]
    assert len(decoded) == 4 * LAYERS and set(decoded) == {0}
