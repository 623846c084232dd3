"""Patching a model: observe its routers, or route them by BH, and undo it without a trace."""

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capture.contract.bh import BhOptions
from capture.contract.errors import AlreadyPatched, UnsupportedModel
from capture.contract.kde import KdeModel
from capture.contract.manifest import ModelInfo, Routing
from capture.hooks import Mark, eager_hook
from capture.recorder import Recorder
from capture.routers.expert_code import (
    implementation,
    obstacle,
    skips_sentinels,
    take,
    warn_of_cost,
)
from capture.routers.family import Router, find_routers, model_info
from capture.routers.routing import (
    TorchNull,
    empirical_order,
    finite_keys,
    select,
    weigh,
)
from capture.routers.stats import LayerStats
from capture.tokens.generation import watch_generation
from capture.tokens.identity import Tracker
from capture.writing.writer import RunWriter


class RouterPatcher:
    """Hooks on a model's routers: they log what it routes, or route it by BH.

    Nothing is touched but hooks on instances, so `unpatch` restores outputs bit for bit. Usable as
    a context manager.

    Args:
        model: a transformers model with routers of a known family.

    Raises:
        UnsupportedModel: no known router in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.routers: tuple[Router, ...] = find_routers(model)
        self.info: ModelInfo = model_info(model, self.routers)
        self.recorder: Recorder | None = None
        self.tracker: Tracker | None = None
        self.stats: dict[int, LayerStats] = {}
        self._handles: list[Any] = []
        self._parallel: list[tuple[Any, bool]] = []
        self._marked: list[nn.Module] = []
        self._mark = Mark()
        self._undo: list[Callable[[], None]] = []
        self._thread = threading.local()  # DataParallel runs a forward per thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unpatch()

    @property
    def patched(self) -> bool:
        """Whether hooks are on the model."""
        return bool(self._handles)

    def check(self, routing: Routing, kde: KdeModel | None) -> None:
        """Raise what `attach` would raise, before anything is touched or written.

        Raises:
            AlreadyPatched: the model is observed or routed.
            InvalidOption: a bound is above the number of experts, or a null model is given where
                none is used.
            KdeMismatch: no null model, or one for other layers or experts.
            UnsupportedModel: the family can be observed but not routed.
        """
        if any(Mark.of(m) is not None for m in self._modules()):
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

    @property
    def experts_implementation(self) -> str:
        """Which code computes the experts while the model is routed, for the manifest."""
        return ", ".join(dict.fromkeys(implementation(router) for router in self.routers))

    def attach(
        self,
        routing: Routing,
        kde: KdeModel | None = None,
        *,
        writer: RunWriter | None = None,
        collect_stats: bool = False,
    ) -> None:
        """Hook the routers: log them, or steer them, or both.

        Args:
            routing: native only observes, and outputs stay bit-identical.
            kde: the null model, for BH with KDE p-values.
            writer: where rows go; None logs nothing.
            collect_stats: under BH, keep counts per layer in `stats`.

        Raises: see `check`.
        """
        self.check(routing, kde)
        try:
            self._attach(routing, kde, writer, collect_stats)
        except BaseException:
            self.unpatch()
            raise

    def name_sources(self, sources: Sequence[str]) -> None:
        """Say where the rows of the next forward's new sequences come from."""
        if self.tracker is not None:
            self.tracker.next_sources = tuple(sources)

    def unpatch(self) -> None:
        """Remove every hook and restore every flag; rows still on the device go to the writer.

        Raises:
            WriterFailed: the writer stopped on an error.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for experts, flag in self._parallel:
            experts._is_expert_parallel = flag
        self._parallel = []
        for module in self._marked:
            self._mark.take(module)
        self._marked = []
        for undo in self._undo:
            undo()
        self._undo = []
        if self.tracker is not None:
            self.tracker.release()
        recorder, self.recorder, self.tracker = self.recorder, None, None
        if recorder is not None:
            recorder.flush()

    def _attach(
        self,
        routing: Routing,
        kde: KdeModel | None,
        writer: RunWriter | None,
        collect_stats: bool,
    ) -> None:
        for module in self._modules():
            self._mark.put(module)
            self._marked.append(module)
        # a graph compiled before would run without the hooks
        torch._dynamo.reset_code_caches()  # type: ignore[no-untyped-call, unused-ignore]
        self.stats = {}
        options = routing.options
        if options is not None:
            warn_of_cost(self.model, self.routers)
        empirical = options is not None and options.p_values == "empirical"
        if writer is not None or empirical or collect_stats:
            self._track(writer)
        for router in self.routers:
            if options is None:
                if self.recorder is not None:
                    self._handles += router.attach(
                        self._observer(router, self.recorder), steer=False
                    )
                continue
            E = router.n_experts
            null = None if kde is None else TorchNull(kde[router.layer], options.alpha, E)
            weight = next(router.module.parameters(), None)
            if null is not None and weight is not None and weight.is_cuda:
                null.place(weight.device)
            if collect_stats:
                self.stats[router.layer] = LayerStats.empty(E)
            skips = self._skips_unused(router)
            self._handles += router.attach(self._steerer(router, options, null, skips), steer=True)

    def _track(self, writer: RunWriter | None) -> None:
        """Follow the model's forwards, to know which token each router row is."""
        self.tracker = Tracker(eos=_eos(self.model))
        if writer is not None:
            self.tracker.next_sequence = writer.next_sequence
            self.tracker.next_forward = writer.next_forward
            self.recorder = Recorder(writer, self.info.layers)
            self.tracker.on_cut = self.recorder.cut
        self._hook_forward(_nearest_model(self.model, self.routers))
        self._undo += watch_generation(self.model, self.tracker)

    def _hook_forward(self, base: nn.Module) -> None:
        tracker, recorder = self.tracker, self.recorder
        assert tracker is not None
        signature = inspect.signature(base.forward)
        has_head = base is not self.model
        thread = self._thread
        eager = functools.partial(eager_hook, mark=self._mark)

        @eager
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            forward = tracker.begin(_by_name(signature, args, kwargs))
            thread.forward = forward
            if recorder is not None:
                recorder.begin(forward)

        @eager
        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            forward, thread.forward = getattr(thread, "forward", None), None
            if forward is not None and output is not None:
                tracker.end(forward, output)
            if recorder is not None and (output is None or not getattr(thread, "in_head", False)):
                recorder.end(complete=output is not None)

        @eager
        def begin_head(module: nn.Module, args: Any, kwargs: Any) -> None:
            thread.in_head = True

        @eager
        def end_head(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            thread.in_head = False
            if recorder is None:
                return
            logits = _head_logits(output)
            # a tensor names columns of the caller's choice: which tokens they predict is not known
            if logits is not None and not isinstance(kwargs.get("logits_to_keep"), Tensor):
                recorder.loss(logits.detach())
            recorder.end(complete=output is not None)

        if has_head and recorder is not None:
            self._handles.append(
                self.model.register_forward_pre_hook(begin_head, with_kwargs=True, prepend=True)
            )
            self._handles.append(
                self.model.register_forward_hook(end_head, with_kwargs=True, always_call=True)
            )
        self._handles.append(base.register_forward_pre_hook(begin, with_kwargs=True))
        self._handles.append(base.register_forward_hook(end, with_kwargs=True, always_call=True))

    def _observer(self, router: Router, recorder: Recorder) -> Any:
        layers = router.layer, *router.again
        eager = functools.partial(eager_hook, mark=self._mark)

        @eager
        def observe(module: nn.Module, args: Any, output: Any) -> None:
            logits, weights, experts = router.triple(output)
            recorder.record(layers, {"logits": logits, "experts": experts, "weights": weights})

        return observe

    def _steerer(
        self, router: Router, options: BhOptions, null: TorchNull | None, skips: bool
    ) -> Any:
        min_k, max_k = options.bounds(router.n_experts)
        renormalize = options.renormalizes(router.norm_topk_prob)
        weighing = router.weighing(renormalize)
        stats = self.stats.get(router.layer)
        eager = functools.partial(eager_hook, mark=self._mark)

        @eager
        def steer(module: nn.Module, args: Any, output: Any) -> Any:
            logits, own_weights, own_experts = router.triple(output)
            keys = finite_keys(logits)
            # the decision has no gradient; weights carry theirs to the router
            scored = keys
            if logits.requires_grad:
                scored = torch.where(keys.isfinite(), logits.float(), -torch.inf)
            scores = router.scores(
                scored, options.temperature, logits.dtype, renormalize=renormalize
            )
            forward = getattr(self._thread, "forward", None)
            keep = None if forward is None else forward.keep.reshape(-1).to(keys.device)
            own = scores, own_experts, own_weights
            if null is not None:
                choice = null.select(keys, *own, min_k=min_k, max_k=max_k, skip=skips)
            else:
                ranked = empirical_order(keys, options.alpha, keep)
                choice = select(keys, *ranked, *own, min_k=min_k, max_k=max_k, skip=skips)
            choice = weigh(choice, weighing)
            weights = choice.weights.to(own_weights.dtype)
            if stats is not None:
                stats.add(choice, keep)
            if self.recorder is not None:
                self.recorder.record(
                    (router.layer,),
                    {
                        "logits": logits.detach(),
                        "experts": choice.experts,
                        "weights": weights,
                        "n_selected": choice.n_selected,
                        "n_rejected": choice.n_rejected,
                    },
                )
            return (logits, weights, choice.experts.to(own_experts.dtype), *output[3:])

        return steer

    def _skips_unused(self, router: Router) -> bool:
        """Whether the index n_experts skips an unused slot's compute, which is arranged here."""
        if router.block is not None:
            return True
        if obstacle(router) is None:
            self._undo.append(take(router))
            return True
        if not skips_sentinels(router):
            return False
        experts: Any = router.experts
        self._parallel.append((experts, experts._is_expert_parallel))
        experts._is_expert_parallel = True
        return True

    def _modules(self) -> tuple[nn.Module, ...]:
        """Those that are hooked."""
        base = _nearest_model(self.model, self.routers)
        return tuple(dict.fromkeys((self.model, base, *(r.module for r in self.routers))))


def _by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A call's arguments, those that the signature takes as further keywords too."""
    inputs = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            inputs.update(inputs.pop(name, {}))
    return inputs


def _head_logits(output: Any) -> Tensor | None:
    """(B, H, V) logits of the vocabulary in what a model with a head returned."""
    found = [getattr(output, "logits", None), *(output if isinstance(output, tuple) else ())]
    return next((t for t in found if isinstance(t, Tensor) and t.dim() == 3), None)


def _nearest_model(model: nn.Module, routers: Sequence[Router]) -> nn.Module:
    """The innermost PreTrainedModel that holds every router."""
    nearest = model
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            inside = set(module.modules())
            if all(router.module in inside for router in routers):
                nearest = module
    return nearest


def _eos(model: Any) -> frozenset[int]:
    """Ids that end a sequence, as generation sees them."""
    found: set[int] = set()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ids = getattr(config, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)
