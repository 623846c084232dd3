"""Which routers bhlog knows: one row per router family.

A row of `_ROWS` is all that a family of transformers takes, and `register` adds one from outside.

The rows follow the routers' sources in transformers 5.24. The experts that a family's own routing
takes may depend on more than the logits (a bias learned for balance, groups of experts, a table
by token): BH takes the largest logits, and only the weights follow the family's own formula.
"""

from dataclasses import dataclass
from typing import Literal

from bhlog.capture.contract.errors import InvalidOption

Scoring = Literal["softmax", "sigmoid", "function", "config"]


@dataclass(frozen=True)
class Family:
    """How the routers of a family turn logits into weights.

    Attributes:
        router: the router's class, or the name of a class of transformers' own; its forward returns
            (logits, weights, indices, ...).
        name: what people call the models.
        scoring: how a logit becomes a score: over all experts by softmax, alone by sigmoid or by
            the router's own score_fn, or as its expert_selection_fn says ("config"). None when BH
            cannot route the family, see why_not.
        over: whether a softmax runs over all experts, or over the chosen ones alone, whose
            weights then sum to 1.
        wide: whether scores are computed in float32, not in the dtype of the logits.
        normalize: whether the chosen weights are made to sum to 1: always, never, or as the
            router's norm_topk_prob says.
        eps: added to the sum that weights are divided by.
        floor: the router's attribute with the smallest such sum, if any.
        scale: the router's attribute that scales the weights, if any.
        n_experts, top_k: the router's attributes of those names, dots allowed.
        logits: the router's submodule whose output is the raw logits, where the router itself
            returns something else in their place.
        sentinel: whether the index n_experts may stand for an unused slot in every experts
            implementation; otherwise unused slots hold experts of weight 0, which are computed.
        loops: whether some layers run loop_num_passes times in a forward; the later passes are
            layers of their own, numbered as in the cache: on from num_hidden_layers.
        why_not: why BH cannot route it.
    """

    router: str | type
    name: str
    scoring: Scoring | None = "softmax"
    over: Literal["all", "chosen"] = "all"
    wide: bool = True
    normalize: Literal["always", "never", "config"] = "config"
    eps: float = 0.0
    floor: str | None = None
    scale: str | None = None
    n_experts: str = "num_experts"
    top_k: str = "top_k"
    logits: str | None = None
    sentinel: bool = True
    loops: bool = False
    why_not: str = ""


def _chosen(router: str, name: str, *, wide: bool = True, sentinel: bool = True) -> Family:
    """Softmax over the logits of the chosen experts."""
    return Family(router, name, over="chosen", wide=wide, normalize="always", sentinel=sentinel)


def _deepseek(router: str, name: str, *, sentinel: bool = True) -> Family:
    """Sigmoid in float32, divided by the sum if so configured, then scaled."""
    return Family(
        router,
        name,
        scoring="sigmoid",
        eps=1e-20,
        scale="routed_scaling_factor",
        sentinel=sentinel,
    )


def _greedy(router: str, name: str) -> Family:
    """Softmax over all experts, scaled and never normalized."""
    return Family(router, name, normalize="never", scale="routed_scaling_factor")


def _observed(router: str, name: str, why_not: str, **changes: str | bool) -> Family:
    """A family that is observed only."""
    return Family(router, name, scoring=None, why_not=why_not, **changes)  # type: ignore[arg-type]


_ROWS = (
    # softmax over all experts
    Family("OlmoeTopKRouter", "OLMoE"),
    Family("FlexOlmoTopKRouter", "FlexOlmo"),
    Family("LaraMiniTopKRouter", "Lara Mini"),
    Family("MellumTopKRouter", "Mellum"),
    Family("Qwen2MoeTopKRouter", "Qwen2-MoE"),
    Family("Qwen3MoeTopKRouter", "Qwen3-MoE"),
    Family("Qwen3NextTopKRouter", "Qwen3-Next"),
    Family("Qwen3OmniMoeThinkerTextTopKRouter", "Qwen3-Omni thinker"),
    Family("Qwen3OmniMoeTalkerTextTopKRouter", "Qwen3-Omni talker"),
    Family("Qwen4ExpTextTopKRouter", "Qwen4-Exp"),
    Family("MixtralTopKRouter", "Mixtral", normalize="always"),
    Family("MiniMaxTopKRouter", "MiniMax", normalize="always"),
    Family("HunYuanMoEV1Gate", "HunYuan", normalize="always"),
    Family("Qwen3_5MoeTopKRouter", "Qwen3.5-MoE", normalize="always"),
    Family("Qwen3VLMoeTextTopKRouter", "Qwen3-VL-MoE", normalize="always"),
    Family("JambaTopKRouter", "Jamba", normalize="never"),
    Family("Ernie4_5_MoeTopKRouter", "Ernie 4.5", normalize="always", floor="norm_min"),
    _greedy("DeepseekV2TopkRouter", "DeepSeek-V2"),
    _greedy("DeepseekOcr2TextTopkRouter", "DeepSeek-OCR-2"),
    _greedy("UnlimitedOcrTextTopkRouter", "Unlimited-OCR"),
    Family(
        "LongcatFlashTopkRouter",
        "LongCat-Flash",
        normalize="never",
        scale="routed_scaling_factor",
        n_experts="n_routed_experts",  # experts that do nothing are counted here alone
        sentinel=False,
    ),
    Family("Mistral4TopkRouter", "Mistral 4", wide=False, eps=1e-20, scale="routed_scaling_factor"),
    Family(
        "MistralLarge4TextTopkRouter",
        "Mistral Large 4",
        normalize="always",
        eps=1e-20,
        scale="routed_scaling_factor",
    ),
    # softmax over the chosen experts
    _chosen("AriaTextTopKRouter", "Aria", wide=False),
    _chosen("GptOssTopKRouter", "gpt-oss", wide=False, sentinel=False),
    _chosen("GraniteMoeTopKRouter", "Granite MoE"),
    _chosen("GraniteMoeHybridTopKRouter", "Granite MoE hybrid"),
    _chosen("GraniteMoeSharedTopKRouter", "Granite MoE shared"),
    _chosen("GraniteMoeSWATopKRouter", "Granite MoE SWA"),
    Family("Cohere2MoeTopKRouter", "Cohere2 MoE", scoring="config", over="chosen"),
    # sigmoid of each logit
    _deepseek("DeepseekV3TopkRouter", "DeepSeek-V3"),
    _deepseek("DeepseekV32TopkRouter", "DeepSeek-V3.2"),
    _deepseek("Glm4MoeTopkRouter", "GLM-4 MoE"),
    _deepseek("Glm4MoeLiteTopkRouter", "GLM-4 MoE lite"),
    _deepseek("Glm4vMoeTextTopkRouter", "GLM-4V MoE"),
    _deepseek("Glm5NextTextTopkRouter", "GLM-5 Next"),
    _deepseek("GlmMoeDsaTopkRouter", "GLM MoE DSA"),
    _deepseek("AXK1TopkRouter", "A.X K1"),
    _deepseek("AXK2TopkRouter", "A.X K2"),
    _deepseek("BailingHybridTopkRouter", "Bailing hybrid"),
    _deepseek("Dots1TopkRouter", "dots.llm1"),
    _deepseek("Dots3NoteTextTopkRouter", "Dots3 Note"),
    _deepseek("ExaoneMoeTopkRouter", "EXAONE MoE"),
    _deepseek("HYV4TopkRouter", "Hunyuan V4"),
    _deepseek("HYV4VLTopkRouter", "Hunyuan V4 VL"),
    _deepseek("KimiLinearTopkRouter", "Kimi Linear"),
    _deepseek("MiMoV2FlashTopkRouter", "MiMo-V2-Flash"),
    _deepseek("NemotronHTopkRouter", "Nemotron-H", sentinel=False),
    _deepseek("SolarOpenTopkRouter", "Solar Open"),
    Family(
        "AfmoeTokenChoiceRouter",
        "AFMoE",
        scoring="sigmoid",
        normalize="always",
        eps=1e-20,
        scale="route_scale",
    ),
    Family("BeamTopKRouter", "Beam", scoring="sigmoid", eps=1e-20),
    Family("FlintTopKRouter", "Flint", scoring="sigmoid"),
    Family(
        "HYV3TopKRouter",
        "Hunyuan V3",
        scoring="sigmoid",
        normalize="always",
        eps=1e-20,
        scale="router_scaling_factor",
    ),
    Family("Kolibri1TopKRouter", "Kolibri", scoring="sigmoid"),
    Family("LagunaTopKRouter", "Laguna", scoring="sigmoid", normalize="always"),
    Family(
        "Lfm2MoeTopKRouter",
        "LFM2 MoE",
        scoring="sigmoid",
        wide=False,
        eps=1e-6,
        scale="routed_scaling_factor",
    ),
    Family("MiniMaxM2TopKRouter", "MiniMax-M2", scoring="sigmoid", normalize="always"),
    Family("MiniMaxM3VLTopKRouter", "MiniMax-M3", scoring="sigmoid", normalize="always"),
    Family(
        "MuseSparkTopkRouter",
        "Muse Spark",
        scoring="sigmoid",
        normalize="always",
        eps=1e-15,
        scale="routed_scaling_factor",
    ),
    Family("Step3p7TopKRouter", "Step 3.7", scoring="sigmoid", normalize="always"),
    # a score of their own
    Family(
        "DeepseekV4TopKRouter",
        "DeepSeek-V4",
        scoring="function",
        wide=False,
        normalize="always",
        eps=1e-20,
        scale="routed_scaling_factor",
    ),
    Family(
        "Inkling2TopKRouter",
        "Inkling 2",
        scoring="function",
        normalize="always",
        eps=1e-20,
        scale="routed_scaling_factor",
    ),
    # observed only
    _observed(
        "DeepseekV4HashRouter",
        "DeepSeek-V4 with hash layers",
        "its first layers choose experts by token id, not by logit",
    ),
    _observed(
        "Gemma4TextRouter",
        "Gemma 4",
        "a learned scale per expert multiplies its weights",
        n_experts="config.num_experts",
        top_k="config.top_k_experts",
        logits="proj",  # the router returns probabilities in place of logits
    ),
    _observed(
        "InklingTopkRouter", "Inkling", "its weights are normalized together with shared experts"
    ),
    _observed(
        "Inkling2LoopTopKRouter",
        "Inkling 2 Loop",
        "its middle layers run several times for a token",
        loops=True,
    ),
    _observed("PhimoeTopKRouter", "Phi-MoE", "SparseMixer gives weights to two experts only"),
    _observed(
        "ZayaRouter",
        "Zaya",
        "it takes one expert, which may be none",
        n_experts="num_router_classes",  # the last class stands for no expert
    ),
)

FAMILIES: dict[str, Family] = {str(family.router): family for family in _ROWS}

# By class, what `register` added.
REGISTERED: dict[type, Family] = {}


def register(family: Family) -> Family:
    """Have routers of a class of your own observed and routed, from now on in this process.

    The row says how the class makes weights of logits; where that cannot be said, `scoring=None`
    with a `why_not` observes it alone. Registering a class again replaces its row.

    Returns:
        The family.

    Raises:
        InvalidOption: its router is not a class, or it can neither be routed nor says why not.

    >>> class MyRouter: ...  # an nn.Module that returns (logits, weights, indices)
    >>> register(Family(MyRouter, "mine", scoring="sigmoid", normalize="always")).name
    'mine'
    """
    if not isinstance(family.router, type):
        raise InvalidOption(
            f"family '{family.name}': router is {family.router!r}; expected the router's class, "
            "since a name alone stands for a class of transformers"
        )
    if family.scoring is None and not family.why_not:
        raise InvalidOption(
            f"family '{family.name}': give scoring= how a logit becomes a score, or why_not= the "
            "reason for which BH cannot route it"
        )
    REGISTERED[family.router] = family
    return family


def family_of(kind: type, named: dict[str, Family]) -> Family | None:
    """The row of a class: what is registered for it, or transformers' own class of a name.

    A class without a forward of its own has its parent's row. A class of another package that is
    called like one of transformers is not that class, and has none.
    """
    for parent in kind.__mro__:
        row = REGISTERED.get(parent)
        if row is None and parent.__module__.startswith("transformers.models."):
            row = named.get(parent.__name__)
        if row is not None:
            same = getattr(kind, "forward", None) is getattr(parent, "forward", None)
            return row if same else None
    return None


# Blocks of transformers 4 whose gate is a plain linear layer; see bhlog.capture.routers.blocks4.
BLOCKS: dict[str, Family] = {
    "MixtralSparseMoeBlock": FAMILIES["MixtralTopKRouter"],
    "OlmoeSparseMoeBlock": FAMILIES["OlmoeTopKRouter"],
    "Qwen2MoeSparseMoeBlock": FAMILIES["Qwen2MoeTopKRouter"],
    "Qwen3MoeSparseMoeBlock": FAMILIES["Qwen3MoeTopKRouter"],
}

# Routers of transformers that bhlog cannot read, and why.
UNREADABLE: dict[str, str] = {
    "DbrxRouter": "DBRX: its router returns logits alone, the block chooses",
    "DiffusionGemmaTextRouter": "DiffusionGemma: it fills blocks of text, not token by token",
    "Dots3NoteVisionTopKRouter": "Dots3 Note's vision tower: its rows are image patches",
    "Ernie4_5_VLMoeMoeTopKRouter": "Ernie 4.5 VL: text and image tokens have routers of their own",
    "JetMoeTopKGating": "JetMoE: its router returns tokens grouped by expert",
    "Llama4Router": "Llama 4: its router returns scores and logits, not the chosen experts",
    "NllbMoeTop2Router": "NLLB-MoE: an encoder and decoder, with a capacity per expert",
    "OpenAIPrivacyFilterTopKRouter": "OpenAI privacy filter: it labels tokens, it predicts none",
    "SwitchTransformersTop1Router": "Switch: an encoder and decoder, with a capacity per expert",
}
