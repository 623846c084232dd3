"""The routers found in a model, and how each turns logits into weights."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from bhlog.capture.changes import Changes
from bhlog.capture.contract.errors import UnsupportedModel
from bhlog.capture.contract.manifest import ModelInfo
from bhlog.capture.routers.blocks4 import GatedBlock
from bhlog.capture.routers.registry import Family
from bhlog.capture.routers.routing import Weighing


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
            changes.after_forward(self.module, hook, last=not steer)
            return
        raw: list[Tensor] = []

        def keep_raw(module: nn.Module, args: Any, output: Tensor) -> None:
            raw[:] = [output]

        def with_raw(module: nn.Module, args: Any, output: Any) -> None:
            hook(module, args, (raw.pop(), *output[1:]))

        changes.after_forward(self.module.get_submodule(self.family.logits), keep_raw, last=True)
        changes.after_forward(self.module, with_raw, last=True)

    @cached_property
    def sliced(self) -> "_Slices | None":
        """What leaves a rank its own experts of the router's choice, inside the router's forward.

        Under expert parallelism transformers before 5.24 replaces the forward of each router by one
        that numbers the experts of this rank from 0 and drops the others.
        """
        return _Slices.of(self.module)

    def unslice(self, changes: Changes) -> None:
        """Have the router return its whole choice, until the changes are undone."""
        if self.sliced is not None:
            changes.set(self.module, "forward", self.sliced.whole)

    def slice_again(self, changes: Changes) -> None:
        """Leave a rank its own experts once the hooks so far have run."""
        if self.sliced is not None:
            changes.after_forward(self.module, self.sliced)

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


@dataclass(frozen=True, eq=False)
class _Slices:
    """A forward hook that does to a router's output what expert parallelism does.

    Attributes:
        whole: the router's forward without it.
        style: the library's, with `transform_output_post_forward`.
        mesh: the devices that the experts are on.
    """

    whole: Callable[..., Any]
    style: Any
    mesh: Any

    @classmethod
    def of(cls, module: nn.Module) -> "_Slices | None":
        """As the library put it on a router, whose hidden variables it reads; None if it did not.

        Raises:
            UnsupportedModel: the library did something else to the router.
        """
        forward: Any = vars(module).get("forward")
        if getattr(forward, "__name__", "") != "tp_forward":
            return None
        cells = dict(zip(forward.__code__.co_freevars, forward.__closure__ or (), strict=True))
        try:
            found = [cells[name].cell_contents for name in ("original_forward", "self", "mesh")]
        except KeyError as error:
            raise UnsupportedModel(
                f"{type(module).__name__} is spread over devices by transformers "
                f"{version('transformers')} in a way that bhlog does not know"
            ) from error
        return cls(*found)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.style.transform_output_post_forward(module, output, self.mesh)


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
