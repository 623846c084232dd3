"""The recorder: what routers return is kept as it was, whole forwards or nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

import bhlog
from bhlog.capture.contract.errors import UnknownIdentity
from bhlog.capture.routers.search import find_routers
from bhlog.capture.writing.writer import WriterOptions
from tests.capture.tiny import (
    CACHE,
    EXPERTS,
    LAYERS,
    batch,
    check_logits,
    observed,
    past,
    read,
    real_tokens,
    rows_of,
    tiny_model,
)


def test_what_a_router_returned_may_be_overwritten_afterwards(model, run):
    """As kernels with fixed output buffers do."""
    ids, mask = batch([4, 4])
    returned: list[Tensor] = []
    with observed(model, run):
        handles = [
            router.module.register_forward_hook(lambda m, a, output: returned.extend(output))
            for router in find_routers(model)
        ]
        cache = model(ids, attention_mask=mask, use_cache=True)[CACHE]
        for step in (5, 6):
            for tensor in returned:
                tensor.zero_()
            returned.clear()
            model(torch.full((2, 1), step), **past(cache))
        for tensor in returned:
            tensor.zero_()
    for handle in handles:
        handle.remove()
    logged = read(run)
    assert list(logged.sequences.values()) == [[*row, 5, 6] for row in real_tokens(ids, mask)]
    check_logits(model, logged)


def test_small_forwards_leave_together(model, run, monkeypatch):
    blocks: list[int] = []
    from bhlog.capture.writing.writer import RunWriter

    submit = RunWriter.submit

    def counted(writer: RunWriter, block: Any) -> None:
        blocks.append(len(block.sequence))
        submit(writer, block)

    monkeypatch.setattr(RunWriter, "submit", counted)
    ids, mask = batch([5, 5])
    with observed(model, run):
        model.generate(ids, attention_mask=mask, max_new_tokens=50, min_new_tokens=50)
    assert len(blocks) == 1
    assert len(read(run).tokens[0]) == 54


def test_forwards_of_unlike_columns_do_not_mix(model, run):
    """With a head and without, with token ids and without, with weights in another dtype."""
    ids, _ = batch([4])
    embeddings = model.get_input_embeddings()(ids).detach()
    with observed(model, run):
        model(ids)
        model.model(ids)
        model(inputs_embeds=embeddings)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids)
        model(ids)
    logged = read(run)
    assert [len(tokens) for tokens in logged.tokens.values()] == [4] * 5
    assert [logged.nll[n][1] is None for n in range(5)] == [False, True, True, False, False]
    check_logits(model, logged, [0, 1, 4])


def test_sampling_takes_the_same_tokens_at_every_layer(model, run):
    ids, mask = batch([9, 4], left=True)
    with observed(model, run, options=WriterOptions(sample_every=3)):
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    logged = read(run)
    assert sorted(logged.tokens[0]) == [0, 3, 6, 9, 12]
    assert sorted(logged.tokens[1]) == [0, 3, 6]
    assert logged.tokens[0][12] == output[0, 12]
    totals = logged.manifest.totals
    assert (totals.tokens, totals.sampled_out) == (8, 14 + 9 - 8)


def test_a_router_that_did_not_run_is_an_error(model, run):
    ids, _ = batch([4])
    with observed(model, run), pytest.raises(UnknownIdentity, match=r"layers \[2\] did not run"):
        depth, model.config.num_hidden_layers = model.config.num_hidden_layers, LAYERS - 1
        try:
            model(ids)
        finally:
            model.config.num_hidden_layers = depth
    assert read(run).tokens == {}


def test_a_router_that_saw_other_rows_is_an_error(model, run):
    ids, _ = batch([4])
    block = model.model.layers[0].mlp

    def twice(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.cat([args[0], args[0]]),)

    with observed(model, run):
        handle = block.gate.register_forward_pre_hook(twice)
        try:
            with pytest.raises(UnknownIdentity, match="saw 8 rows"):
                model(ids)
        finally:
            handle.remove()


def test_a_router_that_ran_twice_is_an_error(model, run):
    ids, _ = batch([4])
    first = model.model.layers[0].mlp

    def again(module: Any, args: Any, output: Any) -> None:
        module.gate(args[0].flatten(0, 1))

    with observed(model, run):
        handle = first.register_forward_hook(again)
        try:
            with pytest.raises(UnknownIdentity, match=r"layer 0 ran 2 times in forward 0"):
                model(ids)
        finally:
            handle.remove()
    assert read(run).tokens == {}


def test_routers_outside_a_forward_are_not_logged(model, run):
    with observed(model, run):
        model.model.layers[0].mlp(torch.randn(1, 3, 32))
        model(torch.tensor([[5, 6]]))
    assert list(read(run).sequences.values()) == [[5, 6]]


def test_sources_follow_their_sequences(model, run):
    ids, mask = batch([3, 4], left=True)
    with observed(model, run) as patcher:
        patcher.name_sources(["a", "b"])
        model.generate(ids, attention_mask=mask, max_new_tokens=3, num_beams=3, do_sample=False)
        model(ids, attention_mask=mask)
        patcher.name_sources(["c", "d"])
        model(ids, attention_mask=mask)
    sources: dict[int, set[str | None]] = {}
    for row in rows_of(run, "tokens"):
        sources.setdefault(row["sequence"], set()).add(row["source"])
    prompts = [sources[n] for n in range(6)]
    assert prompts == [{"a"}] * 3 + [{"b"}] * 3
    assert list(sources.values())[-4:] == [{None}, {None}, {"c"}, {"d"}]
    assert all(names in ({"a"}, {"b"}) for n, names in list(sources.items())[6:-4])


def test_ids_of_the_callers_follow_their_sequences(model, run):
    ids, mask = batch([3, 4], left=True)
    with observed(model, run) as patcher:
        patcher.name_sources(["docs", "docs"])
        patcher.name_sequences(["q-1", ""])
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        model(ids, attention_mask=mask)
    rows = {(row["sequence"], row["sample_id"], row["source"]) for row in rows_of(run, "tokens")}
    assert rows == {(0, "q-1", "docs"), (1, None, "docs"), (2, None, None), (3, None, None)}
    asked = "SELECT sequence, count(*) FROM tokens WHERE sample_id = 'q-1' GROUP BY ALL"
    assert bhlog.open_log(run).sql(asked).fetchall() == [
        (0, 5)
    ]  # 3 that went in, and 2 of the 3 new ones


def test_native_rows_name_their_experts_by_falling_logit_ties_to_the_lower(run):
    model = tiny_model()
    with torch.no_grad():
        for router in find_routers(model):
            router.module.weight[1::2] = router.module.weight[::2]  # every logit twice
    with observed(model, run):
        model(batch([8, 8])[0])
    for row in rows_of(run, "routing"):
        keys = [(-row["logits"][e], e) for e in row["experts"]]
        assert keys == sorted(keys)
        assert len(set(row["experts"])) == 2 and max(row["experts"]) < EXPERTS
