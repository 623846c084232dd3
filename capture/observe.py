"""Runs: observe or route a model inside a block, and log it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bhlog.capture.contract.errors import (
    InvalidOption,
    RouterLogError,
    UnsupportedModel,
    WriterFailed,
)
from bhlog.capture.contract.manifest import ModelInfo, Origin, Routing
from bhlog.capture.contract.named import Bh
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions, Renormalize
from bhlog.capture.graphs import WHOLE_GRAPH
from bhlog.capture.origin import origin_here
from bhlog.capture.parallel import Group
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.writing.fitting import KdeFit
from bhlog.capture.writing.launch import rank, world_size
from bhlog.capture.writing.writer import RunWriter, WriterOptions


@contextmanager
def observe(
    model: nn.Module,
    run: str | Path,
    *,
    options: WriterOptions | None = None,
    fit_kde: KdeFit | str | Path | None = None,
    pad_token_id: int | None = None,
    allow_missing_layers: bool = False,
) -> Iterator[RouterPatcher]:
    """Log a model's own routing into a new run; its outputs stay bit-identical.

    Args:
        model: a transformers model with routers.
        run: folder of the run to write, or a URI such as s3://bucket/run: see RunWriter.
        options: how it is written.
        fit_kde: a null model to fit from what is logged, ready when the block is left; a path
            stands for KdeFit(path).
        pad_token_id: what fills up rows in forwards that have no attention mask: runs of it at
            either end of a row are not logged. Without it, leaving the block warns of what may be
            padding and was logged.
        allow_missing_layers: leave out routers that bhlog does not know, if it knows others.

    Raises:
        UnsupportedModel, RunExists, AlreadyPatched, InvalidOption, WriterFailed.
    """
    patcher = RouterPatcher(model, allow_missing_layers=allow_missing_layers)
    patcher.check(Routing(), None)
    fit = as_fit(fit_kde)
    writer, _ = group_writer(patcher.group, run, patcher.info, Routing(), options=options, fit=fit)
    with recording(patcher, Routing(), None, writer, fit, pad_token_id=pad_token_id):
        yield patcher


@contextmanager
def route(
    model: nn.Module,
    run: str | Path | None = None,
    *,
    policy: str | None = None,
    alpha: float | None = None,
    kde: KdeModel | str | Path | None = None,
    min_k: int = 1,
    max_k: int | None = None,
    temperature: float = 1.0,
    renormalize: Renormalize = "model",
    p_values: Literal["kde", "empirical"] = "kde",
    centre: Literal["none", "median"] = "none",
    options: WriterOptions | None = None,
    fit_kde: KdeFit | str | Path | None = None,
    pad_token_id: int | None = None,
    allow_missing_layers: bool = False,
) -> Iterator[RouterPatcher]:
    """Route a model by BH or another policy, and log it into a new run if one is named.

    Args:
        model: a transformers model with routers.
        run: folder or URI of the run to write; None logs nothing.
        policy: such as "minp:0.2" or "topk:4", of a family of capture.contract.named.ROUTED; its
            own bounds, as in "bh:0.3,max_k=16", go before min_k and max_k. None is BH at alpha.
        alpha: of BH; 0.05 where neither it nor a policy is given.
        min_k, max_k, temperature, renormalize, p_values, centre: see BhOptions.
        kde: the null model or its file, where the policy tests p-values.
        options: how the run is written.
        fit_kde, pad_token_id, allow_missing_layers: see observe.

    Raises:
        InvalidOption, KdeMismatch, UnsupportedModel, RunExists, AlreadyPatched, WriterFailed.
    """
    if isinstance(kde, str | Path):
        kde = KdeModel.load(kde)
    if policy is not None and alpha is not None:
        raise InvalidOption(f"policy {policy} has a value of its own: leave alpha out")
    routing = Routing.by(
        BhOptions.of(
            policy or Bh(0.05 if alpha is None else alpha),
            min_k=min_k,
            max_k=max_k,
            temperature=temperature,
            renormalize=renormalize,
            p_values=p_values,
            centre=centre,
        )
    )
    patcher = RouterPatcher(model, allow_missing_layers=allow_missing_layers)
    patcher.check(routing, kde)
    writer, fit = None, as_fit(fit_kde)
    if run is not None:
        writer, _ = group_writer(
            patcher.group,
            run,
            patcher.info,
            routing,
            kde=kde,
            options=options,
            extra={"experts_implementation": patcher.experts_implementation},
            fit=fit,
        )
    elif fit is not None:
        raise InvalidOption("fit_kde counts what is logged: name a run to log into")
    with recording(patcher, routing, kde, writer, fit, pad_token_id=pad_token_id):
        yield patcher


@contextmanager
def recording(
    patcher: RouterPatcher,
    routing: Routing,
    kde: KdeModel | None,
    writer: RunWriter | None,
    fit: KdeFit | None = None,
    *,
    pad_token_id: int | None = None,
) -> Iterator[None]:
    """Attach a patcher for a block; afterwards nothing is left on the model, and the run is closed.

    An exception inside the block is noted in the manifest and goes on to the caller; rows recorded
    before it are kept, and a null model is fitted from them.
    """
    try:
        patcher.attach(routing, kde, writer=writer, pad_token_id=pad_token_id)
    except BaseException as error:  # it left nothing on the model
        _close_quietly(writer, error, fit)
        raise
    writing = os.getpid()
    try:
        yield
    except BaseException as error:
        try:
            patcher.unpatch()
        except WriterFailed:
            pass  # the caller gets its own error; the manifest names the writer's
        finally:
            if os.getpid() == writing:
                _close_quietly(writer, error, fit)
        if WHOLE_GRAPH in str(error):  # dynamo says so in the middle of a page
            raise UnsupportedModel(WHOLE_GRAPH) from error
        raise
    ours = writer if os.getpid() == writing else None  # a fork has neither writer nor run
    try:
        patcher.unpatch()
        if ours is not None:
            ours.close()
    except BaseException as error:  # as an error inside the block
        _close_quietly(ours, error, fit)
        raise
    if ours is not None and fit is not None:
        fit.finish(ours)


def _close_quietly(writer: RunWriter | None, error: BaseException, fit: KdeFit | None) -> None:
    if writer is None:
        return
    with suppress(WriterFailed):
        writer.close(error)
    if fit is not None:
        with suppress(RouterLogError):
            fit.finish(writer)


def as_fit(fit_kde: KdeFit | str | Path | None) -> KdeFit | None:
    """A path stands for a fit with the options that `bhlog kde fit` has by default."""
    return KdeFit(fit_kde) if isinstance(fit_kde, str | Path) else fit_kde


def group_writer(
    group: Group, run: str | Path, info: ModelInfo, routing: Routing, **given: Any
) -> tuple[RunWriter | None, int]:
    """The writer of a group of ranks that see the same tokens: one of them has it, others None.

    Args:
        given: see new_writer.

    Returns:
        The writer, and on every rank the windows of text that were done when it was opened.

    Raises:
        RouterLogError: on every rank, if the run cannot be written.
    """

    def begin() -> tuple[RunWriter, str]:
        writer = new_writer(run, info, routing, group=group, **given)
        return writer, str(writer.windows)

    writer, windows = group.once(begin)
    return writer, int(windows)


def new_writer(
    run: str | Path,
    info: ModelInfo,
    routing: Routing,
    *,
    kde: KdeModel | None = None,
    options: WriterOptions | None = None,
    extra: dict[str, Any] | None = None,
    origin: Origin | None = None,
    resume: bool = False,
    fit: KdeFit | None = None,
    group: Group | None = None,
) -> RunWriter:
    """A writer for a run of this process's rank, which notes the versions at work.

    Args:
        group: the ranks that this one writes for; None: itself alone.
    """
    ranks = world_size() if group is None else group.count
    if fit is not None:
        fit.check(run, info.n_experts, ranks)
    writer = RunWriter(
        run,
        info,
        routing,
        kde=kde,
        options=options,
        versions={name: _version(name) for name in ("bhlog", "torch", "transformers")},
        extra=extra,
        origin=origin or origin_here(),
        rank=rank() if group is None else group.number,
        ranks=ranks,
        resume=resume,
    )
    if fit is not None:
        try:
            fit.begin(writer)
        except BaseException as error:
            writer.close(error)
            raise
    return writer


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
