"""Ways in which people run models: each is logged right, or refused in one line."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import OlmoeForCausalLM

from bhlog.capture.contract.errors import UnknownIdentity, UnsupportedModel
from bhlog.capture.observe import observe
from tests.capture.tiny import (
    CACHE,
    EOS,
    LAYERS,
    PAD,
    TRANSFORMERS_4,
    VOCABULARY,
    batch,
    check_logits,
    finishing,
    observed,
    past,
    plain_loss,
    read,
    real_tokens,
    tiny_model,
)
from tests.synthetic import normal_kde

KDE = normal_kde(range(LAYERS))
needs_router = pytest.mark.skipif(TRANSFORMERS_4, reason="its OLMoE has no router module")


class Head(nn.Module):
    """Answers of n numbers a token beside the language model's own, of which it makes no model."""

    def __init__(self, model: Any, n: int) -> None:
        super().__init__()
        self.pretrained_model = model
        self.value = nn.Linear(model.config.hidden_size, n)

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> tuple[Tensor, ...]:
        output = self.pretrained_model(
            input_ids, attention_mask=attention_mask, output_hidden_states=True
        )
        return self.value(output.hidden_states[-1]), output.logits


@pytest.mark.parametrize("n", [1, 2, VOCABULARY + 6])
def test_loss_is_of_the_vocabularys_head_beside_another(n, run):
    model = Head(tiny_model(), n).eval()
    ids, mask = batch([6, 4])
    with observed(model, run):
        model(ids, attention_mask=mask)
    logged = read(run)
    assert list(logged.sequences.values()) == real_tokens(ids, mask)
    for number, row in enumerate(real_tokens(ids, mask)):
        truth = plain_loss(model.pretrained_model, row)
        assert [logged.nll[number][p] for p in range(1, len(row))] == pytest.approx(truth, 1e-3)


@pytest.mark.parametrize("n", [2, 70])
def test_a_head_that_is_no_vocabulary_has_no_loss(n, run):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=16, moe_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_experts=8, num_experts_per_tok=2, num_labels=n, pad_token_id=PAD,
    )  # fmt: skip
    model = transformers.Qwen3MoeForTokenClassification(config).eval()
    ids, mask = batch([6, 4])
    with observed(model, run):
        assert model(ids, attention_mask=mask).logits.shape[2] == n
    logged = read(run)
    assert list(logged.sequences.values()) == real_tokens(ids, mask)
    assert {nll for losses in logged.nll.values() for nll in losses.values()} == {None}


class Wrapper(nn.Module):
    """As DistributedDataParallel: the model in `module`, without its config."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap", [Wrapper, nn.DataParallel, nn.Sequential, lambda m: Wrapper(Wrapper(m))]
)
def test_a_model_in_a_wrapper_without_config_is_observed(wrap, run):
    model = tiny_model()
    wrapped = wrap(model)
    ids, _ = batch([6, 6])
    with observed(wrapped, run):
        wrapped(ids)
        model.generate(ids, max_new_tokens=2, do_sample=False)
    logged = read(run)
    assert [tokens[:6] for tokens in logged.sequences.values()] == ids.tolist() * 2
    assert logged.manifest.model.class_name == "OlmoeForCausalLM"
    assert logged.nll[0][1] is not None
    check_logits(model, logged)


@pytest.mark.parametrize("name", ["generate_batch", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused_before_it_starts(model, run, name):
    if not hasattr(model, name):
        pytest.skip(f"this version of transformers has no {name}")
    with (
        observed(model, run),
        pytest.raises(UnknownIdentity, match=f"{name} packs .* one|{name} packs"),
    ):
        getattr(model, name)([[5, 6, 7]])
    assert name not in vars(model)


def test_drafts_of_the_first_layers_are_refused_and_leave_the_model_whole(model, run):
    ids, _ = batch([5])
    with torch.no_grad():
        before = model(ids).logits
    with observed(model, run), pytest.raises(UnknownIdentity, match="assistant_early_exit"):
        model.generate(ids, max_new_tokens=4, do_sample=False, assistant_early_exit=2)
    assert model.config.num_hidden_layers == LAYERS
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_a_generation_that_is_interrupted_leaves_the_settings_as_they_were(model, run, monkeypatch):
    """Libraries change them for a while, and an error of ours may come between."""
    ids, _ = batch([5])
    settings = [copy.deepcopy(vars(c)) for c in (model.config, model.generation_config)]

    def stop(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        model.config.num_hidden_layers = LAYERS - 1
        model.generation_config.max_length = 1
        return torch.zeros(1, dtype=torch.bool)

    with observed(model, run), pytest.raises(UnknownIdentity, match="did not run"):
        model.generate(ids, max_new_tokens=4, do_sample=False, stopping_criteria=[stop])
    assert [vars(c) for c in (model.config, model.generation_config)] == settings


@pytest.mark.parametrize("of", ["5.0.0", "5.1.0.dev0", "5.5.4"])
def test_versions_whose_routers_return_probabilities_are_refused(model, of, run, monkeypatch):
    monkeypatch.setattr("bhlog.capture.routers.search.version", lambda name: of)
    with pytest.raises(UnsupportedModel, match=f"{of}: its routers return probabilities.* 5.6 on"):
        observe(model, run).__enter__()
    assert not run.exists()


def test_a_mask_that_numbers_sequences_in_a_row_is_refused(model, run):
    ids, _ = batch([7])
    with observed(model, run), pytest.raises(UnknownIdentity, match="other numbers than 0 and 1"):
        model(ids, attention_mask=torch.tensor([[1, 1, 1, 2, 2, 2, 0]]))
    assert read(run).sequences == {}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_a_model_inside_a_transform_of_torch_func_is_refused(model, run, transform):
    ids, _ = batch([6, 6])
    embeds = model.get_input_embeddings()(ids).detach()

    def first(row: Tensor) -> Tensor:
        return model(inputs_embeds=row[None], use_cache=False).logits[0]

    with observed(model, run) as patcher:
        with pytest.raises(UnknownIdentity, match=r"inside a transform of torch\.func"):
            if transform == "vmap":
                torch.func.vmap(first)(embeds)
            else:
                torch.func.grad(lambda row: first(row).sum())(embeds[0])
        with patcher.paused():
            torch.func.grad(lambda row: first(row).sum())(embeds[0])
        model(ids)
    assert list(read(run).sequences.values()) == ids.tolist()


def test_hooks_that_somebody_takes_off_are_missed(model, run):
    ids, _ = batch([6])
    with pytest.warns(UserWarning, match="taken off the model inside"), observed(model, run):
        model(ids)
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        model(ids)
    assert list(read(run).sequences.values()) == ids.tolist()


@needs_router
@pytest.mark.parametrize("layers", [[1], range(LAYERS)])
def test_a_router_that_is_exchanged_inside_the_block_is_missed(run, layers):
    """All of them too, as get_peft_model(modules_to_save=["gate"]) does inside."""
    model, other = tiny_model(), tiny_model(seed=1)
    ids, _ = batch([6])
    with observed(model, run):
        model(ids)
        for layer in layers:
            model.model.layers[layer].mlp.gate = other.model.layers[layer].mlp.gate
        with pytest.raises(UnknownIdentity, match=r"the routers of layers .* did not run"):
            model(ids)
    assert list(read(run).sequences.values()) == ids.tolist()


def test_arguments_by_position_are_known_where_a_forward_was_replaced(run):
    model = tiny_model()
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    ids, mask = batch([6, 4])
    with observed(model.model, run):
        model.model(ids, mask)
    assert list(read(run).sequences.values()) == real_tokens(ids, mask)


@pytest.mark.parametrize("which", ["whole", "inner"])
def test_rows_are_the_same_whichever_module_is_observed(which, run):
    model = tiny_model()
    ids, mask, eos = finishing(model)
    observed_model = model if which == "whole" else model.model
    with observed(observed_model, run):
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=eos
        )
    assert "generate" not in vars(model)
    rows = []
    for row, keep in zip(output, mask, strict=True):
        answer = row[ids.shape[1] : -1].tolist()
        end = answer.index(eos) + 1 if eos in answer else None
        rows.append(row[: ids.shape[1]][keep.bool()].tolist() + answer[:end])
    assert list(read(run).sequences.values()) == rows


class Seeing(nn.Module):
    """A model of images and text: it embeds, and hands embeddings alone to the model inside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.language_model = model

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        embed = self.language_model.get_input_embeddings()
        shown = torch.where(input_ids < VOCABULARY, input_ids, 3)  # an image stands here
        return self.language_model(
            inputs_embeds=embed(shown), attention_mask=attention_mask, **kwargs
        )


@pytest.mark.parametrize("by", ["position", "name"])
def test_ids_come_from_the_model_that_has_them(run, by):
    model = tiny_model()
    seeing = Seeing(model).eval()
    ids, mask = batch([6, 4])
    ids[0, 3] = VOCABULARY + 5
    with observed(seeing, run):
        if by == "position":
            cache = seeing(ids, mask, use_cache=True)[CACHE]
        else:
            cache = seeing(input_ids=ids, attention_mask=mask, use_cache=True)[CACHE]
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        seeing(torch.tensor([[7], [8]]), longer, **past(cache))
        embeds = model.get_input_embeddings()(ids[1:, :4])
        model(inputs_embeds=embeds)  # alone: nobody has its ids
    logged = read(run)
    rows = real_tokens(ids, mask)
    assert list(logged.sequences.values()) == [[*rows[0], 7], [*rows[1], 8], [None] * 4]
    truth = plain_loss(model, [token if token < VOCABULARY else 3 for token in [*rows[0], 7]])
    found = [logged.nll[0][p] for p in range(1, 7)]
    assert found[2] is None  # no id of the vocabulary
    assert [*found[:2], *found[3:]] == pytest.approx([*truth[:2], *truth[3:]], 1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of what transformers does in a forward
@pytest.mark.parametrize("strict", [False, True])
def test_an_export_inside_the_block_is_not_a_forward(run, strict):
    model = tiny_model().to(torch.bfloat16)  # float32 has no grouped product without values
    ids, mask = batch([6, 6])
    with observed(model, run):
        model(ids)
        given = {"attention_mask": mask, "use_cache": False}
        exported = torch.export.export(model, (ids,), given, strict=strict)
        model(ids)
    with torch.no_grad():
        found = exported.module()(ids, **given).logits
        torch.testing.assert_close(found, model(ids).logits, atol=0.05, rtol=0.05)  # bfloat16
    logged = read(run)
    assert list(logged.sequences.values()) == ids.tolist() * 2
    assert logged.manifest.error is None


@needs_router  # its experts ask for values
def test_a_forward_without_values_is_not_a_forward(run):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = tiny_model().to(torch.bfloat16)
    ids, _ = batch([6])
    with observed(model, run):
        model(ids)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            model(mode.from_tensor(ids))
        model(ids)
    assert list(read(run).sequences.values()) == ids.tolist() * 2


def test_every_kind_of_head_class_is_named_in_the_manifest(model, run):
    with observe(model, run):
        pass
    assert read(run).manifest.model.class_name == OlmoeForCausalLM.__name__
    assert EOS != PAD
