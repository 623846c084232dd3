"""Which models bhlog knows: one row per router family."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from capture.errors import UnsupportedModel
from capture.manifest import ModelInfo


@dataclass(frozen=True)
class Family:
    """How the routers of a family turn logits into weights.

    Attributes:
        router: class name of the router; its forward returns (logits, weights, indices).
        scoring: how a logit becomes a score over all experts; None when BH routing is not
            supported and the family can only be observed.
        normalize: whether the chosen weights are made to sum to 1: always, never, or as the
            router's norm_topk_prob says.
        scale: name of the router's attribute that scales the weights, if any.
        sentinel: whether the index n_experts skips an unused slot in every experts implementation.
    """

    router: str
    scoring: Literal["softmax", "sigmoid"] | None = "softmax"
    normalize: Literal["always", "never", "config"] = "config"
    scale: str | None = None
    sentinel: bool = True


FAMILIES: dict[str, Family] = {family.router: family for family in (Family("OlmoeTopKRouter"),)}


@dataclass(frozen=True, eq=False)
class Router:
    """A router found in a model.

    Attributes:
        layer: decoder layer it belongs to, from 0.
        module: the router itself.
        family: its row in the registry.
        experts: module that computes the experts beside it, if there is one.
    """

    layer: int
    module: nn.Module
    family: Family
    experts: nn.Module | None

    @property
    def n_experts(self) -> int:
        """Experts it chooses from."""
        return int(self.module.num_experts)  # type: ignore[arg-type]

    @property
    def top_k(self) -> int:
        """Experts per token under its own routing."""
        return int(self.module.top_k)  # type: ignore[arg-type]

    @property
    def norm_topk_prob(self) -> bool:
        """Whether it makes the chosen weights sum to 1."""
        if self.family.normalize == "config":
            return bool(self.module.norm_topk_prob)
        return self.family.normalize == "always"

    @property
    def scale(self) -> float:
        """Factor on its weights."""
        return 1.0 if self.family.scale is None else float(getattr(self.module, self.family.scale))

    def scores(self, keys: Tensor, temperature: float) -> Tensor:
        """(T, E) float32 score of every expert; 0 for non-finite logits.

        Args:
            keys: (T, E) float32, non-finite logits as -inf.
        """
        scaled = keys if temperature == 1.0 else keys / temperature
        if self.family.scoring == "sigmoid":
            return scaled.sigmoid()
        return scaled.softmax(dim=-1).nan_to_num(nan=0.0)


def find_routers(model: nn.Module) -> tuple[Router, ...]:
    """Routers of a model, by rising layer.

    Raises:
        UnsupportedModel: it has none, or they differ in their number of experts.
    """
    routers: list[Router] = []
    for name, parent in model.named_modules():
        for child in parent.children():
            family = FAMILIES.get(type(child).__name__)
            if family is not None:
                experts = getattr(parent, "experts", None)
                layer = _layer_index(name, len(routers))
                routers.append(Router(layer, child, family, experts))
    if not routers:
        raise UnsupportedModel(
            f"{type(model).__name__} has no router that bhlog knows; supported routers: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if len({(r.n_experts, r.top_k) for r in routers}) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__}: its routers differ in experts or top-k "
            f"({', '.join(f'layer {r.layer}: {r.n_experts} top {r.top_k}' for r in routers)})"
        )
    return tuple(sorted(routers, key=lambda r: r.layer))


def model_info(model: nn.Module, routers: Iterable[Router]) -> ModelInfo:
    """What the manifest says of a model."""
    routers = tuple(routers)
    first = routers[0]
    config: Any = model.config
    return ModelInfo(
        name=str(getattr(config, "_name_or_path", "") or type(model).__name__),
        class_name=type(model).__name__,
        revision=getattr(config, "_commit_hash", None),
        layers=tuple(r.layer for r in routers),
        n_experts=first.n_experts,
        top_k=first.top_k,
        norm_topk_prob=first.norm_topk_prob,
        scoring=first.family.scoring or "unknown",
        scale=first.scale,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def _layer_index(name: str, default: int) -> int:
    """The last number in a dotted module name: model.layers.3.mlp is layer 3."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[-1]) if numbers else default
