"""Runs: observe or route a model inside a block, and log it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from capture.bh import BhOptions, Renormalize
from capture.errors import WriterFailed
from capture.kde import KdeModel
from capture.manifest import ModelInfo, Routing
from capture.patch import RouterPatcher
from capture.writer import RunWriter, WriterOptions


@contextmanager
def observe(
    model: nn.Module, run: str | Path, *, options: WriterOptions | None = None
) -> Iterator[RouterPatcher]:
    """Log a model's own routing into a new run; its outputs stay bit-identical.

    Args:
        model: a transformers model with routers.
        run: folder of the run to write.
        options: how it is written.

    Raises:
        UnsupportedModel, RunExists, AlreadyPatched, WriterFailed.
    """
    patcher = RouterPatcher(model)
    patcher.check(Routing(), None)
    writer = new_writer(run, patcher.info, Routing(), options=options)
    with recording(patcher, Routing(), None, writer):
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
    p_values: Literal["kde", "empirical"] = "kde",
    options: WriterOptions | None = None,
) -> Iterator[RouterPatcher]:
    """Route a model by BH, and log it into a new run if one is named.

    Args:
        model: a transformers model with routers.
        run: folder of the run to write; None logs nothing.
        alpha, min_k, max_k, temperature, renormalize, p_values: see BhOptions.
        kde: the null model or its file.
        options: how the run is written.

    Raises:
        InvalidOption, KdeMismatch, UnsupportedModel, RunExists, AlreadyPatched, WriterFailed.
    """
    if isinstance(kde, str | Path):
        kde = KdeModel.load(kde)
    routing = Routing("bh", BhOptions(alpha, min_k, max_k, temperature, renormalize, p_values))
    patcher = RouterPatcher(model)
    patcher.check(routing, kde)
    writer = None
    if run is not None:
        writer = new_writer(run, patcher.info, routing, kde=kde, options=options)
    with recording(patcher, routing, kde, writer):
        yield patcher


@contextmanager
def recording(
    patcher: RouterPatcher, routing: Routing, kde: KdeModel | None, writer: RunWriter | None
) -> Iterator[None]:
    """Attach a patcher for a block; afterwards nothing is left on the model, and the run is closed.

    An exception inside the block is noted in the manifest and goes on to the caller; rows recorded
    before it are kept.
    """
    patcher.attach(routing, kde, writer=writer)
    try:
        yield
    except BaseException as error:
        try:
            patcher.unpatch()
        except WriterFailed:
            pass  # the caller gets its own error; the manifest names the writer's
        finally:
            if writer is not None:
                _close_quietly(writer, error)
        raise
    try:
        patcher.unpatch()
    finally:
        if writer is not None:
            writer.close()


def _close_quietly(writer: RunWriter, error: BaseException) -> None:
    try:
        writer.close(error)
    except WriterFailed:
        return


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
