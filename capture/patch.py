"""Patching a model: observe its routers, or route them by BH, and undo it without a trace."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from bhlog.capture.changes import Changes
from bhlog.capture.contract.errors import AlreadyPatched, UnsupportedModel
from bhlog.capture.contract.manifest import ModelInfo, Routing
from bhlog.capture.contract.named import Bh
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.forwards import Forwards
from bhlog.capture.graphs import Graph, at_router
from bhlog.capture.parallel import Group
from bhlog.capture.recorder import Recorder
from bhlog.capture.routers.expert_code import (
    implementation,
    obstacle,
    skips_sentinels,
    take,
    warn_of_cost,
)
from bhlog.capture.routers.family import Router, model_info
from bhlog.capture.routers.search import find_routers
from bhlog.capture.routers.stats import LayerStats
from bhlog.capture.routers.steering import Steering
from bhlog.capture.tokens.identity import Tracker
from bhlog.capture.writing.writer import RunWriter

_MARK = "_bhlog_patched"


class RouterPatcher:
    """Hooks on a model's routers: they log what it routes, or route it by BH.

    Nothing is touched but hooks on instances, so `unpatch` restores outputs bit for bit. Usable as
    a context manager.

    Args:
        model: a transformers model with routers of a known family, or a module around one.
        allow_missing_layers: leave out routers that bhlog does not know, if it knows others.

    Raises:
        UnsupportedModel: no known router in it, or one that is not known.
    """

    def __init__(self, model: nn.Module, *, allow_missing_layers: bool = False) -> None:
        self.model = model
        self.routers: tuple[Router, ...] = find_routers(
            model, allow_missing_layers=allow_missing_layers
        )
        self._models = _models(model, self.routers)
        self.info: ModelInfo = model_info(self._models[0], self.routers)
        self.forwards: Forwards | None = None
        self.stats: dict[int, LayerStats] = {}
        self._changes = Changes()
        self._implementation: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unpatch()

    @property
    def recorder(self) -> Recorder | None:
        """What keeps the routers' outputs until they are written; None if nothing is logged."""
        return None if self.forwards is None else self.forwards.recorder

    @property
    def tracker(self) -> Tracker | None:
        """What says which token each router row is; None if nobody asks."""
        return None if self.forwards is None else self.forwards.tracker

    def check(self, routing: Routing, kde: KdeModel | None) -> None:
        """Raise what `attach` would raise, before anything is touched or written.

        Raises:
            AlreadyPatched: the model is observed or routed.
            InvalidOption: a bound is above the number of experts, a layer has no alpha, or a null
                model is given where none is used.
            KdeMismatch: no null model, or one for other layers or experts.
            UnsupportedModel: the family can be observed but not routed.
        """
        if any(_MARK in vars(m) for m in (self.model, *(r.module for r in self.routers))):
            raise AlreadyPatched(
                f"{type(self.model).__name__} is already observed or routed; one patch at a time: "
                "leave that block or call unpatch() first"
            )
        if routing.options is None:
            return
        routing.options.bounds(self.info.n_experts)
        for router in self.routers:
            if router.family.scoring is None:
                raise UnsupportedModel(
                    f"{router.family.name} can be observed but not routed by BH: "
                    f"{router.family.why_not}"
                )
        routing.options.check_null(kde)
        if kde is not None:
            kde.require(self.info.layers, self.info.n_experts)
        named = routing.options.named
        if isinstance(named, Bh):
            for layer in self.info.layers:
                named.alpha_of(layer)

    @cached_property
    def group(self) -> Group:
        """The ranks that see the same tokens as this one: of those, one writes."""
        return Group.of(self.model)

    @property
    def experts_implementation(self) -> str:
        """Which code computes the experts while the model is routed, for the manifest."""
        attached = self._implementation  # inside the block experts look as it has made them
        return attached or ", ".join(dict.fromkeys(map(implementation, self.routers)))

    def attach(
        self,
        routing: Routing,
        kde: KdeModel | None = None,
        *,
        writer: RunWriter | None = None,
        collect_stats: bool = False,
        pad_token_id: int | None = None,
    ) -> None:
        """Hook the routers: log them, or steer them, or both.

        Args:
            routing: native only observes, and outputs stay bit-identical.
            kde: the null model, for BH with KDE p-values.
            writer: where rows go; None logs nothing.
            collect_stats: under BH, keep counts per layer in `stats`.
            pad_token_id: see bhlog.capture.observe.observe.

        Raises: see `check`.
        """
        self.check(routing, kde)
        self.group.check_alike(routing, self._thresholds(routing, kde))
        try:
            self._attach(routing, kde, writer, collect_stats, pad_token_id)
        except BaseException:
            self.unpatch()
            raise

    def name_sources(self, sources: Sequence[str]) -> None:
        """Say where the rows of the next forward's new sequences come from."""
        if self.tracker is not None:
            self.tracker.next_texts["source"] = tuple(sources)

    def name_sequences(self, ids: Sequence[str]) -> None:
        """Say which samples of the caller's the next forward's new sequences are.

        The log has them as `sample_id` of tokens, to join it with the caller's data; "" is none.
        """
        if self.tracker is not None:
            self.tracker.next_texts["sample_id"] = tuple(ids)

    def name_roles(self, roles: Sequence[Sequence[str]], *, then: str = "") -> None:
        """Say who says each token of the next forward's new sequences: `role` of tokens in the log.

        Args:
            roles: a name, "" for none, per row (or prompt of several rows) and column, padding too.
            then: who says what follows, as generation does.
        """
        if self.tracker is not None:
            self.tracker.next_roles = tuple(map(tuple, roles)), then

    def name_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many tokens each row of the next forward holds, where no attention mask does.

        What follows them is padding, which is not logged.
        """
        if self.tracker is not None:
            self.tracker.next_lengths = tuple(lengths)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Log nothing of what this thread runs inside the block, such as a trial of batch sizes."""
        with nullcontext() if self.forwards is None else self.forwards.paused():
            yield

    def unpatch(self) -> None:
        """Remove every hook and restore every flag; rows still on the device go to the writer.

        Raises:
            WriterFailed: the writer stopped on an error.
        """
        if self._changes.lost:
            warnings.warn(
                "hooks of bhlog were taken off the model inside the block: what ran without them "
                "is not logged",
                stacklevel=2,
            )
        self._changes.undo()
        self._implementation = None
        forwards, self.forwards = self.forwards, None
        if forwards is not None:
            forwards.close()

    def _attach(
        self,
        routing: Routing,
        kde: KdeModel | None,
        writer: RunWriter | None,
        collect_stats: bool,
        pad_token_id: int | None,
    ) -> None:
        self._implementation = self.experts_implementation
        for module in (self.model, *(r.module for r in self.routers)):
            self._changes.set(module, _MARK, True)
        for router in self.routers:
            router.unslice(self._changes)
        # a graph compiled before would run without the hooks
        torch._dynamo.reset_code_caches()  # type: ignore[no-untyped-call, unused-ignore]
        self.stats = {}
        options = routing.options
        if options is not None:
            warn_of_cost(self.model, self.routers)
        ranked_at = None
        if options is not None and options.p_values == "empirical":
            ranked_at = options.level(self.info.n_experts)
        if writer is not None or ranked_at is not None or collect_stats:
            self.forwards = Forwards(
                self.info.layers, writer, pad_token_id=pad_token_id, ranked_at=ranked_at
            )
            head, base = self._models[0], self._models[-1]
            self.forwards.attach(self._changes, self.model, base, head)
        for router in self.routers:
            if options is None:
                if self.forwards is not None:
                    observe = self._observer(router, self.forwards)
                    router.attach(
                        self._changes, at_router(observe, self.forwards.graph), steer=False
                    )
                    self._watch_door(router, self.forwards)
                router.slice_again(self._changes)
                continue
            if collect_stats:
                self.stats.setdefault(router.layer, LayerStats.empty(router.n_experts))
            skips = self._skips_unused(router)
            null = None if kde is None else kde[router.layer]
            steering = Steering.of(router, options, null, skip=skips)
            steer = self._steerer(router, steering)
            graph = Graph.unfollowed() if self.forwards is None else self.forwards.graph
            router.attach(self._changes, at_router(steer, graph, exported=True), steer=True)
            if router.block is None and self.recorder is not None:
                witness = at_router(self._witness(router), graph)
                self._changes.after_forward(router.module, witness, last=not router.sliced)
                self._watch_door(router, self.forwards)
            router.slice_again(self._changes)

    def _thresholds(self, routing: Routing, kde: KdeModel | None) -> Iterator[bytes]:
        """What each router's logits are compared with, to the bit."""
        options = routing.options
        if options is None or kde is None:
            return
        E = self.info.n_experts
        for router in self.routers:
            yield kde[router.layer].thresholds_of(options.named, E).tobytes()

    def _observer(self, router: Router, forwards: Forwards) -> Any:
        layers = router.layer, *router.again

        def observe(module: nn.Module, args: Any, output: Any) -> None:
            if not forwards.recording:
                return
            logits, weights, experts = router.triple(output)
            forwards.record(layers, {"logits": logits, "experts": experts, "weights": weights})

        return observe

    def _steerer(self, router: Router, steering: Steering) -> Any:
        stats, forwards = self.stats.get(router.layer), self.forwards
        layers, ranks_rows, tests = (router.layer,), steering.ranks_rows, steering.count is None

        def steer(module: nn.Module, args: Any, output: Any) -> Any:
            logits, own_weights, own_experts = router.triple(output)
            keep = None
            if forwards is not None and (stats is not None or ranks_rows):
                kept = forwards.keep
                keep = None if kept is None else kept.to(logits.device)
            choice = steering.choose(logits, own_experts, own_weights, keep)
            if stats is not None:
                stats.add(choice, keep)
            routed = (logits, choice.weights, choice.experts, *output[3:])
            if forwards is not None:
                record = {
                    "logits": logits.detach(),
                    "experts": choice.experts,
                    "weights": choice.weights,
                    "n_selected": choice.n_selected,
                }
                if tests:
                    record["n_rejected"] = choice.n_rejected
                forwards.record(layers, record)
                forwards.steered(router.layer, routed)
            return routed

        return steer

    def _witness(self, router: Router) -> Any:
        forwards, layer = self.forwards, router.layer
        assert forwards is not None

        def check(module: nn.Module, args: Any, output: Any) -> None:
            forwards.check_steered(layer, output)

        return check

    def _watch_door(self, router: Router, forwards: Forwards | None) -> None:
        """Compare what the experts get with what is logged: a block may change it in between."""
        if router.block is not None or router.experts is None or forwards is None:
            return
        if router.sliced:  # they get what is left of it on this rank
            return
        layers = router.layer, *router.again

        def at_door(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if forwards.recording:
                forwards.at_door(layers, (*args, *kwargs.values()))

        self._changes.before_forward(router.experts, at_router(at_door, forwards.graph), last=True)

    def _skips_unused(self, router: Router) -> bool:
        """Whether the index n_experts skips an unused slot's compute, which is arranged here."""
        if router.block is not None:
            return True
        if obstacle(router) is None:
            take(router, self._changes)
            return True
        if not skips_sentinels(router):
            return False
        experts: Any = router.experts
        self._changes.set(experts, "_is_expert_parallel", True)
        return True


def _models(model: nn.Module, routers: Sequence[Router]) -> list[nn.Module]:
    """The library's models that hold every router, from the outermost; else the model itself."""
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            inside = set(module.modules())
            if all(router.module in inside for router in routers):
                found.append(module)
    return found or [model]
