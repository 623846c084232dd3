"""Tiny random models of every router family in the transformers library, from their configs.

`python -m tests.capture.families` writes the table of families into capture/routers/README.md.
"""

import copy
import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from bhlog.capture.routers.registry import FAMILIES, UNREADABLE

README = Path(__file__).parents[2] / "capture" / "routers" / "README.md"
MARKERS = "<!-- families -->\n", "<!-- /families -->"
VOCABULARY, EXPERTS, TOP_K = 64, 8, 2

# Values for every config that has the field.
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 0,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "global_head_dim": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "dense_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "router_hidden_size": 16,
}

LINEAR = ["linear_attention", "full_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SPARSE = ["dense", "sparse", "sparse"]

# Values for one package of transformers.models, or for one router.
SPECIAL: dict[str, dict[str, Any]] = {
    "DeepseekV4TopKRouter": {"mlp_layer_types": ["moe"] * 3},
    "Qwen3OmniMoeTalkerTextTopKRouter": {"shared_expert_intermediate_size": 16},
    "hy_v4_vl": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "inkling2_loop": {
        "num_hidden_layers": 3,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid"],
    },
    "bailing_hybrid": {"layer_types": LINEAR},
    "beam": {"mlp_layer_types": SPARSE},
    "deepseek_ocr2": {"mlp_layer_types": SPARSE},
    "dots3_note": {"shared_experts_intermediate_size": 16},
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"head_dim": 64, "rope_parameters": ROPE | {"mrope_section": [4, 6, 6]}},
    "glm5_next": {
        "index_topk": 16,
        "qk_rope_head_dim": 0,
        "layer_types": LINEAR,
        "mlp_layer_types": SPARSE,
    },
    "granitemoehybrid": {"layer_types": LINEAR},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 1,
        "expert_layer_offset": 0,
    },
    "kimi_linear": {"layer_types": LINEAR},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "full_attention"],
        "num_dense_layers": 1,
    },
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 16,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 2,
    },
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {
        "rope_parameters": ROPE
        | {
            "partial_rotary_factor": 0.5,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }
    },
    "muse_spark": {"output_multiplier": 1.0},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_groups": 2,
    },
    "qwen3_5_moe": {"layer_types": LINEAR},
    "qwen3_next": {"layer_types": LINEAR},
    "qwen4_exp": {
        "layer_types": LINEAR,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "step3p7": {"mlp_layer_types": SPARSE},
    "zaya": {"num_experts_per_tok": 1},
}


@cache
def packages() -> dict[str, str]:
    """Package of transformers.models by the name of a class it defines."""
    root = Path(transformers.__file__).parent / "models"
    return {
        name: path.parent.name
        for path in sorted(root.glob("*/modeling_*.py"))
        for name in re.findall(r"^class (\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def model_class(router: str) -> Any:
    """The class to build for a router: with a head where the library has one over text alone."""
    package = packages()[router]
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, PreTrainedModel) and c.__module__ == module.__name__
    ]
    part = "Talker" if "Talker" in router else "Thinker" if "Thinker" in router else ""
    for ending in ("ForCausalLM", "TextModel"):
        for found in classes:
            if found.__name__.endswith(part + ending):
                return found
    for found in classes:
        if found.__name__.endswith(part + "Model"):
            return found
    raise LookupError(router)


def build(router: str, **changes: Any) -> Any:
    """A tiny random model with that router."""
    found = model_class(router)
    config_class = found.config_class
    if "text_config" in getattr(config_class, "sub_configs", {}):
        config_class = config_class.sub_configs["text_config"]
    default = config_class()
    fields = default.to_dict()
    known = {*fields, *getattr(config_class, "attribute_map", {})}
    values = {name: value for name, value in SMALL.items() if name in known}
    for name, value in fields.items():  # lists with an entry per layer
        if isinstance(value, list) and len(value) == getattr(default, "num_hidden_layers", 0):
            values[name] = None if name.endswith("types") else value[: SMALL["num_hidden_layers"]]
    torch.manual_seed(0)
    special = SPECIAL.get(router, SPECIAL.get(packages()[router], {}))
    config = config_class(**values | special | changes)
    config._experts_implementation = "eager"
    model = found(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.25)
        elif "norm" not in name and weight.numel():
            nn.init.normal_(weight, std=0.05)
    for name, bias in model.named_buffers():
        if name.endswith(("correction_bias", "expert_bias")):  # moves the choice, not the weights
            nn.init.normal_(bias, std=0.1)
    return model


def narrow(model: Any) -> Any:
    """A copy in bfloat16, but for what the library keeps in float32 when it loads one."""
    narrowed = copy.deepcopy(model).to(torch.bfloat16)
    wide = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in (*narrowed.named_parameters(), *narrowed.named_buffers()):
        if any(part in name for part in wide):
            tensor.data = tensor.data.float()
    return narrowed


def inputs(model: Any) -> dict[str, Tensor]:
    """A batch of (2, 6) tokens; the second row is padded on the right."""
    rng = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    if "Talker" in type(model).__name__:  # reads what the thinker says, not token ids
        embeds = torch.randn(2, 6, model.config.hidden_size, generator=rng)
        return {"inputs_embeds": embeds.to(model.dtype), "attention_mask": mask}
    ids = torch.randint(3, VOCABULARY, (2, 6), generator=rng) * mask
    return {"input_ids": ids, "attention_mask": mask}


def output(model: Any, **changes: Any) -> Tensor:
    """(2, 6, ...) what the model answers: its head's logits, or hidden states without a head."""
    with torch.no_grad():
        answer = model(**inputs(model) | changes)
    return answer.logits if "logits" in answer else answer.last_hidden_state


def table() -> str:
    """The table of families, in Markdown, after a line that counts them."""
    rows = [
        (family.name, router, "yes", "no" if family.why_not else "yes", family.why_not)
        for router, family in FAMILIES.items()
    ]
    for router, text in UNREADABLE.items():
        name, why_not = text.split(": ", 1)
        rows.append((name, router, "no", "no", why_not))
    rows.sort(key=lambda row: row[0].casefold())
    head = ("model", "router", "observed", "routed", "why not")
    lines = [head, ("---",) * len(head), *((n, f"`{r}`", *rest) for n, r, *rest in rows)]
    routed = sum(not family.why_not for family in FAMILIES.values())
    counts = f"{len(FAMILIES)} families are observed, {routed} of them routed.\n\n"
    return counts + "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def readme_table() -> str:
    """What the README has between its markers."""
    start, end = MARKERS
    return README.read_text(encoding="utf-8").split(start)[1].split(end)[0]


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(readme_table(), table()), encoding="utf-8")
