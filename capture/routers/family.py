"""The routers found in a model, and how each turns logits into weights."""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, reduce
from importlib.metadata import version
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from bhlog.capture.changes import Changes
from bhlog.capture.contract.errors import UnsupportedModel
from bhlog.capture.contract.manifest import ModelInfo
from bhlog.capture.routers.blocks4 import GatedBlock
from bhlog.capture.routers.registry import BLOCKS, FAMILIES, UNREADABLE, Family, family_of
from bhlog.capture.routers.routing import Weighing

_ROUTER_NAMES = ("Router", "Gating", "TopKGate", "MoEGate")  # how their classes are called
_FEW = 6  # families that a message names


@dataclass(frozen=True, eq=False)
class Router:
    """A router found in a model.

    Attributes:
        layer: decoder layer it belongs to, from 0.
        module: the router itself.
        family: its row in the registry.
        experts: module that computes the experts beside it, if there is one.
        block: under transformers 4, the block that chooses by the logits of `module`, its gate.
        again: the layers that it is in later passes of the same forward, see Family.loops.
    """

    layer: int
    module: nn.Module
    family: Family
    experts: nn.Module | None
    block: nn.Module | None = None
    again: tuple[int, ...] = ()

    @cached_property
    def n_experts(self) -> int:
        """Experts it chooses from."""
        return int(self._attribute(self.family.n_experts))

    @cached_property
    def top_k(self) -> int:
        """Experts per token under its own routing."""
        return int(self._attribute(self.family.top_k))

    @property
    def scoring(self) -> str | None:
        """How a logit becomes a score; None where BH cannot route."""
        if self.family.scoring == "config":
            return str(self._attribute("expert_selection_fn"))
        return self.family.scoring

    @property
    def norm_topk_prob(self) -> bool:
        """Whether it makes the chosen weights sum to 1."""
        if self.scoring == "softmax" and self.family.over == "chosen":
            return True
        if self.family.normalize == "config":
            return bool(getattr(self._owner, "norm_topk_prob", False))
        return self.family.normalize == "always"

    @property
    def scale(self) -> float:
        """Factor on its weights."""
        return 1.0 if self.family.scale is None else float(self._attribute(self.family.scale))

    @property
    def floor(self) -> float:
        """Smallest sum that weights are divided by."""
        return 0.0 if self.family.floor is None else float(self._attribute(self.family.floor))

    def weighing(self, renormalize: bool) -> Weighing:
        """How it makes weights of scores.

        Args:
            renormalize: whether weights are made to sum to 1.
        """
        return Weighing(
            renormalize,
            over_chosen=self.over_chosen(renormalize),
            eps=self.family.eps,
            floor=self.floor,
            scale=self.scale,
        )

    def over_chosen(self, renormalize: bool) -> bool:
        """Whether its weights are a softmax over the chosen experts' logits alone."""
        return renormalize and self.scoring == "softmax" and self.family.over == "chosen"

    def scores(
        self, keys: Tensor, temperature: float, dtype: torch.dtype, *, renormalize: bool
    ) -> Tensor:
        """(T, E) what experts are weighed by: their scores, or logits if over_chosen.

        Args:
            keys: (T, E) float32, non-finite logits as -inf.
            temperature: divides them first.
            dtype: of the logits, in which some families compute their scores.
            renormalize: whether weights are made to sum to 1.
        """
        scaled = keys if temperature == 1.0 else keys / temperature
        if not self.family.wide:
            scaled = scaled.to(dtype)
        if self.over_chosen(renormalize):
            return scaled
        if self.scoring == "softmax":
            return scaled.softmax(dim=-1).nan_to_num(nan=0.0)
        if self.scoring == "sigmoid":
            return scaled.sigmoid()
        function: Any = self.module.score_fn
        return torch.where(keys.isfinite(), function(scaled), 0.0)

    def attach(self, changes: Changes, hook: Callable[..., Any], *, steer: bool) -> None:
        """Call hook(module, args, (logits, weights, indices, ...)) whenever the router has run.

        Args:
            changes: what is put on the model.
            hook: a forward hook.
            steer: whether what it returns takes the place of the router's output.
        """
        if self.block is not None:
            block = GatedBlock(self.block, self.module, self.top_k, self.norm_topk_prob)
            block.attach(changes, hook, steer=steer)
            return
        if self.family.logits is None:
            changes.after_forward(self.module, hook, last=not steer, exported=steer)
            return
        raw: list[Tensor] = []

        def keep_raw(module: nn.Module, args: Any, output: Tensor) -> None:
            raw[:] = [output]

        def with_raw(module: nn.Module, args: Any, output: Any) -> None:
            hook(module, args, (raw.pop(), *output[1:]))

        changes.after_forward(self.module.get_submodule(self.family.logits), keep_raw, last=True)
        changes.after_forward(self.module, with_raw, last=True)

    def triple(self, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(T, E) logits, (T, top_k) weights and (T, top_k) indices in what the router returned.

        Raises:
            UnsupportedModel: it returned something else, as in another version of transformers.
        """
        found = output[:3] if isinstance(output, tuple) else (output,)
        if len(found) == 3:
            logits, weights, experts = found
            # no loop: this runs at every layer of every decoded token
            if (
                isinstance(logits, Tensor)
                and isinstance(weights, Tensor)
                and isinstance(experts, Tensor)
                and logits.dim() == 2
                and logits.shape[1] == self.n_experts
                and weights.shape == experts.shape
            ):
                return logits, weights, experts
        shapes = ", ".join(str(tuple(getattr(t, "shape", ()))) for t in found)
        raise UnsupportedModel(
            f"layer {self.layer}: {type(self.module).__name__} returned {shapes}, expected logits "
            f"(T, {self.n_experts}), weights and indices (T, {self.top_k}); is transformers "
            f"{version('transformers')} one that bhlog supports?"
        )

    @property
    def _owner(self) -> nn.Module:
        return self.module if self.block is None else self.block

    def _attribute(self, path: str) -> Any:
        try:
            return reduce(getattr, path.split("."), self._owner)
        except AttributeError as error:
            raise UnsupportedModel(
                f"layer {self.layer}: {type(self._owner).__name__} has no {path}, by which family "
                f"{self.family.name} is read; is transformers {version('transformers')} one that "
                "bhlog supports?"
            ) from error


def find_routers(model: nn.Module, *, allow_missing_layers: bool = False) -> tuple[Router, ...]:
    """Routers of a model, by rising layer.

    A layer has several where a wrapper holds them and runs the one that is active, as PEFT does.

    Args:
        allow_missing_layers: leave out routers that bhlog does not know, if it knows others.

    Raises:
        UnsupportedModel: it has none, or some that are not known, or they differ in their number of
            experts, or a layer has several that are no alternatives.
    """
    found = dict(_known_routers(model))
    if not found:
        raise UnsupportedModel(
            f"{type(model).__name__} has no router that bhlog knows{_suspect(model)}. "
            f"{_nearest(model)}"
        )
    if not allow_missing_layers and (unknown := _unknown_routers(model, found)):
        others = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
        raise UnsupportedModel(
            f"{type(model).__name__}: bhlog does not know {unknown[0]}{others}, whose rows would "
            "be missing. Register its class (bhlog.capture.routers.registry.register), or leave it "
            "out with allow_missing_layers=True (--allow-missing-layers)"
        )
    _require_alternatives(model, found)
    routers = found.values()
    if len({(r.n_experts, r.top_k) for r in routers}) > 1:
        raise UnsupportedModel(
            f"{type(model).__name__}: its routers differ in experts or top-k "
            f"({', '.join(f'layer {r.layer}: {r.n_experts} top {r.top_k}' for r in routers)})"
        )
    return tuple(sorted(routers, key=lambda r: r.layer))


def _known_routers(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """Routers of known families by name."""
    routers_known, blocks_known = (FAMILIES, {}) if _version() >= 5 else ({}, BLOCKS)
    config: Any = None
    count = 0
    for name, parent in model.named_modules():
        config = getattr(parent, "config", config)
        layer = _layer_index(name, count)
        gate = getattr(parent, "gate", None)
        block = family_of(type(parent), blocks_known)
        if block is not None and gate is not None:
            count += 1
            yield _joined(name, "gate"), Router(layer, gate, block, None, block=parent)
            continue
        for child_name, child in parent.named_children():
            family = family_of(type(child), routers_known)
            if family is not None:
                count += 1
                again = _later_passes(layer, config) if family.loops else ()
                experts = getattr(parent, "experts", None)
                full_name = _joined(name, child_name)
                yield full_name, Router(layer, child, family, experts, again=again)


def _unknown_routers(model: nn.Module, found: Collection[str]) -> list[str]:
    """Modules that stand where other layers have a known router, or are called like one."""
    places = {_place(name) for name in found}
    holders = {_place(_parent(name)) for name in found}
    unknown: dict[str, str] = {}
    without: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(_within(known, name) or _within(name, known) for known in (*found, *unknown)):
            continue
        kind = type(module).__name__
        described = f"a {type(module).__module__}.{kind}"
        if _place(name) in places or kind.endswith(_ROUTER_NAMES) or kind in UNREADABLE:
            unknown[name] = f"{name}, {described}"
        elif _place(name) in holders and hasattr(module, "experts"):
            without[name] = f"the router in {name}, {described}"
    others = [
        words for name, words in without.items() if not any(_within(u, name) for u in unknown)
    ]
    return [*unknown.values(), *others]


def _require_alternatives(model: nn.Module, found: dict[str, Router]) -> None:
    """Raise if routers of one layer are not all that a wrapper has, which runs one of them."""
    by_layer: dict[int, list[str]] = {}
    for name, router in found.items():
        by_layer.setdefault(router.layer, []).append(name)
    for layer, names in by_layer.items():
        if len(names) == 1:
            continue
        paths = [name.split(".") for name in names]
        same = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
        wrapper = model.get_submodule(".".join(parts[0] for parts in same))
        weights = {id(p) for p in wrapper.parameters()}
        theirs = {id(p) for name in names for p in found[name].module.parameters()}
        if weights != theirs or isinstance(wrapper, nn.ModuleList | nn.ModuleDict):
            raise UnsupportedModel(
                f"{type(model).__name__}: layer {layer} has the routers {', '.join(names)}; a row "
                "is one token at one layer: observe the part of the model that has one of them"
            )


def supported() -> list[str]:
    """Names of the families that can be observed under the installed transformers."""
    known = FAMILIES if _version() >= 5 else BLOCKS
    return sorted({family.name for family in known.values()}, key=str.casefold)


def model_info(model: nn.Module, routers: Iterable[Router]) -> ModelInfo:
    """What the manifest says of a model."""
    routers = tuple(routers)
    first = routers[0]
    config: Any = getattr(model, "config", None)
    return ModelInfo(
        name=str(getattr(config, "_name_or_path", "") or type(model).__name__),
        class_name=type(model).__name__,
        revision=getattr(config, "_commit_hash", None),
        layers=tuple(sorted({layer for r in routers for layer in (r.layer, *r.again)})),
        n_experts=first.n_experts,
        top_k=first.top_k,
        norm_topk_prob=first.norm_topk_prob,
        scoring=first.scoring or "unknown",
        scale=first.scale,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
    )


def _later_passes(layer: int, config: Any) -> tuple[int, ...]:
    """What a layer is called in the passes of a forward after the first, none if it has one."""
    start, end = config.loop_layer_index_start, config.loop_layer_index_end
    if not start <= layer < end:
        return ()
    first = config.num_hidden_layers + layer - start
    return tuple(first + (end - start) * i for i in range(config.loop_num_passes - 1))


def _version() -> int:
    """Of transformers: some routers of 4 have names of 5 but return other things."""
    return int(version("transformers").split(".")[0])


def _suspect(model: nn.Module) -> str:
    """Where the model's router may be, for the message that it is not known."""
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ in UNREADABLE:
            return f" (its {name} is a {kind.__name__}; {UNREADABLE[kind.__name__]})"
        named = kind.__name__ in FAMILIES or kind.__name__ in BLOCKS
        if named and not kind.__module__.startswith("transformers.models."):
            return (
                f" (its {name} is a {kind.__module__}.{kind.__name__}: the name of a class of "
                "transformers', but not that class)"
            )
        if kind.__name__.endswith(_ROUTER_NAMES):
            return f" (its {name} is a {kind.__name__})"
    return ""


def _nearest(model: nn.Module) -> str:
    """Which families it may be like, and what can be done."""
    names = supported()
    if len(names) > _FEW:
        words = [type(model).__name__, *{type(m).__name__ for m in model.modules()}]
        close = {
            str(FAMILIES[match].name)
            for word in words
            for match in get_close_matches(word, FAMILIES, n=3, cutoff=0.75)
        }
        nearest = f"the nearest are {', '.join(sorted(close)[:_FEW])}; " if close else ""
        listed = f"Of the {len(names)} families that it knows, {nearest}the README lists all"
    else:
        listed = f"Supported are {', '.join(names)}"
    return f"{listed}; bhlog.capture.routers.registry.register adds one of your own"


def _place(name: str) -> str:
    """A module's name without the numbers in it: where in a layer it is."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _joined(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _within(name: str, outer: str) -> bool:
    """Whether a module is another or inside of it, by their names."""
    return name == outer or not outer or name.startswith(outer + ".")


def _layer_index(name: str, default: int) -> int:
    """The last number in a dotted module name: model.layers.3.mlp is layer 3."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[-1]) if numbers else default
