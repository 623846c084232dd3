"""Which routers a model has: those that bhlog knows, one a layer, and none left out in silence."""

import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from importlib.metadata import version
from itertools import takewhile
from typing import Any

from torch import nn

from bhlog.capture.contract.errors import UnsupportedModel
from bhlog.capture.routers.family import Router
from bhlog.capture.routers.registry import BLOCKS, FAMILIES, UNREADABLE, family_of

_ROUTER_NAMES = ("Router", "Gating", "TopKGate", "MoEGate")  # how their classes are called
_LOGITS_SINCE = 5, 6  # routers of transformers 5.0 to 5.5 return probabilities
_FEW = 6  # families that a message names


def find_routers(model: nn.Module, *, allow_missing_layers: bool = False) -> tuple[Router, ...]:
    """Routers of a model, by rising layer.

    A layer has several where a wrapper holds them and runs the one that is active, as PEFT does.

    Args:
        allow_missing_layers: leave out routers that bhlog does not know, if it knows others.

    Raises:
        UnsupportedModel: it has none, or some that are not known, or they differ in their number of
            experts, or a layer has several that are no alternatives.
    """
    if (5, 0) <= _version() < _LOGITS_SINCE:
        raise UnsupportedModel(
            f"transformers {version('transformers')}: its routers return probabilities in place of "
            "logits; install a later version (from "
            f"{'.'.join(map(str, _LOGITS_SINCE))} on), or 4.57"
        )
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
    routers_known, blocks_known = (FAMILIES, {}) if _version() >= (5, 0) else ({}, BLOCKS)
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
                full_name = _joined(name, child_name)
                experts = _experts_beside(model, full_name)
                yield full_name, Router(layer, child, family, experts, again=again)


def _experts_beside(model: nn.Module, name: str) -> nn.Module | None:
    """The experts of a router's block, which a wrapper may stand between."""
    while name and not name.rpartition(".")[2].isdigit():
        name = _parent(name)
        experts = model.get_submodule(name)._modules.get("experts")
        if experts is not None:
            return experts
    return None


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
    known = FAMILIES if _version() >= (5, 0) else BLOCKS
    return sorted({family.name for family in known.values()}, key=str.casefold)


def _later_passes(layer: int, config: Any) -> tuple[int, ...]:
    """What a layer is called in the passes of a forward after the first, none if it has one."""
    start, end = config.loop_layer_index_start, config.loop_layer_index_end
    if not start <= layer < end:
        return ()
    first = config.num_hidden_layers + layer - start
    return tuple(first + (end - start) * i for i in range(config.loop_num_passes - 1))


def _version() -> tuple[int, int]:
    """Of transformers: some routers of 4 have names of 5 but return other things."""
    major, minor = version("transformers").split(".")[:2]
    return int(major), int(minor)


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
        known = {_stem(router): family.name for router, family in FAMILIES.items()}
        words = {_stem(type(m).__name__) for m in model.modules() if _is_model_or_router(m)}
        close = {
            known[match] for w in words for match in get_close_matches(w, known, n=3, cutoff=0.7)
        }
        nearest = f"the nearest are {', '.join(sorted(close)[:_FEW])}; " if close else ""
        listed = (
            f"Of the {len(names)} families that it knows, {nearest}"
            "capture/routers/README.md lists all"
        )
    else:
        listed = f"Supported are {', '.join(names)}"
    return f"{listed}; bhlog.capture.routers.registry.register adds one of your own"


def _stem(kind: str) -> str:
    """What a class is called after: olmoe of OlmoeForCausalLM and of OlmoeTopKRouter."""
    return re.sub(r"(For\w+|(Text)?Model|(TopK|Topk|TokenChoice)?(Router|Gate))$", "", kind).lower()


def _is_model_or_router(module: nn.Module) -> bool:
    kind = type(module).__name__
    return kind.endswith((*_ROUTER_NAMES, "Model")) or "For" in kind


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
