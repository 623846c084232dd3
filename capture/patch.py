"""Patching a model: observe its routers, or route them by BH, and undo it without a trace."""

import inspect
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capture.bh import BhOptions, Renormalize
from capture.errors import AlreadyPatched, InvalidOption, KdeMismatch, UnsupportedModel
from capture.family import Router, find_routers, model_info
from capture.identity import Tracker
from capture.kde import KdeModel
from capture.manifest import ModelInfo, Routing
from capture.recorder import Recorder
from capture.routing import (
    Choice,
    TorchNull,
    choose,
    empirical_order,
    finite_keys,
    pad,
)
from capture.writer import RunWriter, WriterOptions

_MARK = "_bhlog_patched"

Hook = TypeVar("Hook", bound=Callable[..., Any])


def _eager(hook: Hook) -> Hook:
    """Keep a hook out of compiled graphs."""
    return cast(Hook, torch.compiler.disable(hook))  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class LayerStats:
    """Counts of one layer, kept on the model's device until they are read.

    Attributes:
        selected: (E + 1,) int64, tokens by n_selected.
        load: (E,) int64, tokens by expert.
    """

    selected: Tensor
    load: Tensor

    @property
    def tokens(self) -> int:
        """Tokens counted."""
        return int(self.selected.sum())

    @property
    def mean_experts(self) -> float:
        """Experts per token; NaN before the first token."""
        counts = self.selected.double().cpu()
        total = (counts * torch.arange(len(counts), dtype=torch.float64)).sum()
        return float(total / counts.sum())

    def add(self, choice: Choice, keep: Tensor | None) -> None:
        """Count the rows of a forward that are kept (None: all)."""
        n, E = choice.n_selected, len(self.load)
        weight = torch.ones_like(n) if keep is None else keep.to(n.dtype)
        self.selected.index_add_(0, n, weight)
        slots = torch.arange(choice.experts.shape[1], device=n.device)
        chosen = (slots < n[:, None]).to(n.dtype) * weight[:, None]
        self.load.index_add_(0, choice.experts.clamp(max=E - 1).reshape(-1), chosen.reshape(-1))


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
        self._thread = threading.local()  # DataParallel runs a forward per thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unpatch()

    @property
    def patched(self) -> bool:
        """Whether hooks are on the model."""
        return bool(self._handles)

    def observe(self, writer: RunWriter) -> None:
        """Log the model's own routing; its outputs stay bit-identical."""
        self._attach(writer)
        for router in self.routers:
            self._hook_router(router, self._observer(router))

    def route(
        self,
        options: BhOptions,
        kde: KdeModel | None,
        *,
        writer: RunWriter | None = None,
        collect_stats: bool = False,
    ) -> None:
        """Route by BH; log it if there is a writer.

        Args:
            options: alpha, bounds, weights.
            kde: the null model; None only for empirical p-values.
            collect_stats: keep counts per layer in `stats`.

        Raises:
            InvalidOption: a bound is above the number of experts.
            KdeMismatch: no null model, or one for other layers or experts.
            UnsupportedModel: the family can be observed but not routed.
        """
        E = self.info.n_experts
        options.bounds(E)
        for router in self.routers:
            if router.family.scoring is None:
                raise UnsupportedModel(
                    f"{type(router.module).__name__} can be observed, but its weights are not "
                    "a function of the logits alone, so BH cannot route it"
                )
        if options.p_values == "kde":
            if kde is None:
                raise KdeMismatch(
                    "BH routing needs a null model: pass kde=, fit one with "
                    "bhlog kde fit RUN --out FILE, or ask for p_values='empirical'"
                )
            kde.require(self.info.layers, E)
        self._attach(writer, track=options.p_values == "empirical" or collect_stats)
        self.stats = {}
        for router in self.routers:
            null = None
            if kde is not None and options.p_values == "kde":
                null = TorchNull(kde[router.layer], options.alpha, E)
            if collect_stats:
                self.stats[router.layer] = _empty_stats(E, router.module)
            self._use_sentinel(router)
            self._hook_router(router, self._steerer(router, options, null))

    def unpatch(self) -> None:
        """Remove every hook and restore every flag; rows still on the device go to the writer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for experts, flag in self._parallel:
            experts._is_expert_parallel = flag
        self._parallel = []
        for module in self._marked:
            vars(module).pop(_MARK, None)
        self._marked = []
        if self.tracker is not None:
            self.tracker.release()
        recorder, self.recorder, self.tracker = self.recorder, None, None
        if recorder is not None:
            recorder.flush()

    def _attach(self, writer: RunWriter | None, *, track: bool = False) -> None:
        """Mark the model, and follow its forwards where anything needs to know the tokens."""
        if self.patched:
            raise AlreadyPatched("this patcher is at work; unpatch() it first")
        if _MARK in vars(self.model) or any(_MARK in vars(r.module) for r in self.routers):
            raise AlreadyPatched(
                f"{type(self.model).__name__} is already observed or routed; one patch at a time: "
                "leave that block or call unpatch() first"
            )
        for module in (self.model, *(r.module for r in self.routers)):
            vars(module)[_MARK] = True
            self._marked.append(module)
        torch._dynamo.reset()  # a graph compiled before would run without the hooks
        if writer is None and not track:
            return
        self.tracker = Tracker(eos=_eos(self.model))
        if writer is not None:
            self.recorder = Recorder(writer, self.info.layers)
            self.tracker.on_cut = self.recorder.cut
        base = _nearest_model(self.model, self.routers)
        self._hook_forward(base)

    def _hook_forward(self, base: nn.Module) -> None:
        tracker, recorder = self.tracker, self.recorder
        assert tracker is not None
        signature = inspect.signature(base.forward)
        has_head = base is not self.model
        thread = self._thread

        @_eager
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = dict(signature.bind_partial(*args, **kwargs).arguments)
            inputs.update(inputs.pop("kwargs", {}))
            forward = tracker.begin(inputs)
            thread.forward = forward
            if recorder is not None:
                recorder.begin(forward)

        @_eager
        def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            forward, thread.forward = getattr(thread, "forward", None), None
            if forward is not None and output is not None:
                tracker.end(forward, output)
            if recorder is not None and (output is None or not getattr(thread, "in_head", False)):
                recorder.end(complete=output is not None)

        @_eager
        def begin_head(module: nn.Module, args: Any, kwargs: Any) -> None:
            thread.in_head = True

        @_eager
        def end_head(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            thread.in_head = False
            if recorder is None:
                return
            logits = getattr(output, "logits", None)
            if isinstance(logits, Tensor) and logits.dim() == 3:
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

    def _hook_router(self, router: Router, hook: Any) -> None:
        self._handles.append(router.module.register_forward_hook(hook))

    def _observer(self, router: Router) -> Any:
        recorder = self.recorder
        assert recorder is not None

        @_eager
        def observe(module: nn.Module, args: Any, output: Any) -> None:
            logits, weights, experts = output[:3]
            recorder.record(
                router.layer, {"logits": logits, "experts": experts, "weights": weights}
            )

        return observe

    def _steerer(self, router: Router, options: BhOptions, null: TorchNull | None) -> Any:
        min_k, max_k = options.bounds(router.n_experts)
        renormalize = options.renormalizes(router.norm_topk_prob)
        stats = self.stats.get(router.layer)

        @_eager
        def steer(module: nn.Module, args: Any, output: Any) -> Any:
            logits, own_weights, own_experts = output[:3]
            keys = finite_keys(logits)
            forward = getattr(self._thread, "forward", None)
            keep = None if forward is None else forward.keep.reshape(-1).to(keys.device)
            if null is not None:
                order, n_rejected = null.order(keys)
            else:
                order, n_rejected = empirical_order(keys, options.alpha, keep)
            choice = choose(
                keys,
                order,
                n_rejected,
                router.scores(keys, options.temperature),
                own_experts,
                own_weights,
                min_k=min_k,
                max_k=max_k,
                renormalize=renormalize,
                scale=router.scale,
            )
            weights = choice.weights.to(own_weights.dtype)
            if stats is not None:
                stats.add(choice, keep)
            if self.recorder is not None:
                self.recorder.record(
                    router.layer,
                    {
                        "logits": logits.detach(),
                        "experts": choice.experts,
                        "weights": weights,
                        "n_selected": choice.n_selected,
                        "n_rejected": choice.n_rejected,
                    },
                )
            experts = pad(choice, router.n_experts) if router.family.sentinel else choice.experts
            return (logits, weights, experts.to(own_experts.dtype), *output[3:])

        return steer

    def _use_sentinel(self, router: Router) -> None:
        """Let the index n_experts skip an unused slot's compute (see Family.sentinel)."""
        experts: Any = router.experts
        if router.family.sentinel and experts is not None:
            self._parallel.append((experts, getattr(experts, "_is_expert_parallel", False)))
            experts._is_expert_parallel = True


@contextmanager
def observe(
    model: nn.Module,
    run: str | Path,
    *,
    options: WriterOptions | None = None,
    extra: dict[str, Any] | None = None,
) -> Iterator[RouterPatcher]:
    """Log a model's own routing into a new run; outputs stay bit-identical.

    Args:
        model: a transformers model with routers.
        run: folder of the run to write.
        options: how it is written.

    Raises:
        UnsupportedModel, RunExists, AlreadyPatched.
    """
    with _patched(model, run, Routing(), None, options, extra) as (patcher, writer):
        assert writer is not None
        patcher.observe(writer)
        yield patcher


@contextmanager
def route(
    model: nn.Module,
    run: str | Path | None = None,
    *,
    alpha: float = 0.05,
    kde: KdeModel | str | Path | None = None,
    min_k: int = 1,
    max_k: int | None = None,
    temperature: float = 1.0,
    renormalize: Renormalize = "model",
    p_values: Any = "kde",
    options: WriterOptions | None = None,
    extra: dict[str, Any] | None = None,
) -> Iterator[RouterPatcher]:
    """Route a model by BH, and log it into a new run if one is named.

    Args:
        model: a transformers model with routers.
        run: folder of the run to write; None logs nothing.
        alpha, min_k, max_k, temperature, renormalize, p_values: see BhOptions.
        kde: the null model or its file.
        options: how the run is written.

    Raises:
        InvalidOption, KdeMismatch, UnsupportedModel, RunExists, AlreadyPatched.
    """
    if isinstance(kde, str | Path):
        kde = KdeModel.load(kde)
    bh = BhOptions(alpha, min_k, max_k, temperature, renormalize, p_values)
    if bh.p_values == "empirical" and kde is not None:
        raise InvalidOption("empirical p-values use no null model: leave kde= out")
    bh.bounds(find_routers(model)[0].n_experts)
    with _patched(model, run, Routing("bh", bh), kde, options, extra) as (patcher, writer):
        patcher.route(bh, kde, writer=writer)
        yield patcher


@contextmanager
def _patched(
    model: nn.Module,
    run: str | Path | None,
    routing: Routing,
    kde: KdeModel | None,
    options: WriterOptions | None,
    extra: dict[str, Any] | None,
) -> Iterator[tuple[RouterPatcher, RunWriter | None]]:
    patcher = RouterPatcher(model)
    if kde is not None:
        kde.require(patcher.info.layers, patcher.info.n_experts)
    if any(_MARK in vars(m) for m in (model, *(r.module for r in patcher.routers))):
        raise AlreadyPatched(
            f"{type(model).__name__} is already observed or routed; one patch at a time: leave "
            "that block or call unpatch() first"
        )
    writer = None
    if run is not None:
        writer = new_writer(run, patcher.info, routing, kde=kde, options=options, extra=extra)
    try:
        yield patcher, writer
        patcher.unpatch()
    except BaseException as error:
        patcher.recorder, recorder = None, patcher.recorder
        patcher.unpatch()
        if recorder is not None and writer is not None:
            _finish(recorder, writer, error)
        raise
    if writer is not None:
        writer.close()


def _finish(recorder: Recorder, writer: RunWriter, error: BaseException) -> None:
    """Save what was recorded before an error, without hiding the error."""
    from capture.errors import WriterFailed

    try:
        recorder.flush()
        writer.close(error)
    except WriterFailed:
        writer.close(error)


def new_writer(
    run: str | Path,
    info: ModelInfo,
    routing: Routing,
    *,
    kde: KdeModel | None = None,
    options: WriterOptions | None = None,
    extra: dict[str, Any] | None = None,
    resume: bool = False,
) -> RunWriter:
    """A writer for a run of this process's rank, with the versions at work."""
    return RunWriter(
        run,
        info,
        routing,
        kde=kde,
        options=options,
        versions={name: version(name) for name in ("bhlog", "torch", "transformers")},
        extra=extra,
        rank=_rank(),
        resume=resume,
    )


def _rank() -> int:
    """This process's rank: of the process group if there is one, else as torchrun names it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


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


def _empty_stats(n_experts: int, router: nn.Module) -> LayerStats:
    device = next(router.parameters()).device
    return LayerStats(
        selected=torch.zeros(n_experts + 1, dtype=torch.int64, device=device),
        load=torch.zeros(n_experts, dtype=torch.int64, device=device),
    )
