"""A capture session: run text through a model, log a run."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bhlog.capture.checkpoint import LoadedModel
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.manifest import Manifest, Routing
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.uris import shown
from bhlog.capture.observe import group_writer, recording
from bhlog.capture.origin import origin_here
from bhlog.capture.parallel import Group
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.text import Batch, Window, batches
from bhlog.capture.writing.fitting import KdeFit
from bhlog.capture.writing.launch import rank, world_size
from bhlog.capture.writing.writer import RunWriter, WriterOptions

Advance = Callable[[int, RunWriter], None]  # tokens just done, and the writer


@dataclass(frozen=True)
class CaptureOptions:
    """How text is run through the model.

    Attributes:
        batch_size: windows per forward.
        generate: new tokens to generate after each window; 0 only reads the text.
        allow_missing_layers: see bhlog.capture.observe.observe.
        writer: how the run is written.
    """

    batch_size: int = 8
    generate: int = 0
    allow_missing_layers: bool = False
    writer: WriterOptions = field(default_factory=WriterOptions)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InvalidOption(f"batch_size must be at least 1, got {self.batch_size}")
        if self.generate < 0:
            raise InvalidOption(f"generate must be at least 0, got {self.generate}")


def capture(
    loaded: LoadedModel,
    texts: Iterable[Window],
    run: str | Path,
    *,
    routing: Routing | None = None,
    kde: KdeModel | None = None,
    options: CaptureOptions | None = None,
    extra: dict[str, Any] | None = None,
    text_sha256: Mapping[str, str] | None = None,
    resume: bool = False,
    fit: KdeFit | None = None,
    progress: Advance | None = None,
) -> Manifest:
    """Run windows of text through a model and log a run; return its manifest.

    Windows are taken one batch after another, so they may be cut while the model runs. Of the
    processes of a launch, each runs its share of them; those that a model is spread over by tensor
    or expert parallelism run the same, and one of them logs. Batches
    are logged whole or not at all: what stops a run in the middle of one leaves the batch out, and
    resuming the run begins with it.

    Args:
        routing: native (default) or BH.
        kde: the null model for BH with KDE p-values.
        extra: options to note in the manifest.
        text_sha256: of each text file by its source, noted too.
        resume: continue the run after its last sealed shard.
        fit: a null model to fit from what is logged.
        progress: called after each batch, and first with the tokens that a resumed run has.

    Raises:
        RunExists, UnsupportedModel, KdeMismatch, InvalidOption, WriterFailed.
    """
    routing, options = routing or Routing(), options or CaptureOptions()
    patcher = RouterPatcher(loaded.model, allow_missing_layers=options.allow_missing_layers)
    patcher.check(routing, kde)
    group = patcher.group
    writer, done = group_writer(
        group,
        run,
        patcher.info,
        routing,
        kde=kde,
        options=options.writer,
        extra=_notes(patcher, routing) | (extra or {}),
        origin=origin_here(texts=text_sha256, tokenizer=loaded.tokenizer_name),
        resume=resume,
        fit=fit,
    )
    mine = iter(share(texts, group))
    with recording(patcher, routing, kde, writer, fit):
        if writer is not None:
            writer.checkpoint()
        before = n_tokens(islice(mine, done), options.generate)
        if progress is not None and writer is not None and done:
            progress(before, writer)
        for batch in batches(mine, batch_size=options.batch_size, pad_id=loaded.pad_id):
            patcher.name_sources(batch.sources)
            if any(batch.roles):
                patcher.name_roles(_by_column(batch, options.generate), then="assistant")
            tokens = _run(loaded.model, batch, options.generate, loaded.pad_id)
            if writer is None:
                continue
            assert patcher.recorder is not None
            patcher.recorder.flush()
            writer.checkpoint(windows=len(batch.sources))
            if progress is not None:
                progress(tokens, writer)

    def finished() -> tuple[Manifest, str]:
        assert writer is not None  # of the rank that writes
        return writer.manifest, writer.manifest.to_json()

    manifest, told = group.once(finished)
    return manifest or Manifest.from_json(told, shown(str(run)))


def _by_column(batch: Batch, generate: int) -> list[tuple[str, ...]]:
    """Roles of a batch's columns, as `_run` feeds them."""
    fill = [("",) * (batch.mask.shape[1] - len(roles)) for roles in batch.roles]
    pairs = zip(fill, batch.roles, strict=True)
    return [(*f, *roles) if generate else (*roles, *f) for f, roles in pairs]


def _notes(patcher: RouterPatcher, routing: Routing) -> dict[str, Any]:
    notes: dict[str, Any] = {"processes": patcher.group.count}  # the windows' shares depend on it
    if routing.options is not None:
        notes["experts_implementation"] = patcher.experts_implementation
    return notes


def n_tokens(texts: Iterable[Window], generate: int) -> int:
    """Tokens that windows hold, and at most generate after them."""
    return sum(len(window.token_ids) + generate for window in texts)


def share(texts: Iterable[Window], group: Group | None = None) -> Iterator[Window]:
    """The windows that this process of a launch runs, which are those of its group."""
    if group is None:
        return islice(texts, rank(), None, world_size())
    return islice(texts, group.number, None, group.count)


@torch.inference_mode()
def _run(model: Any, batch: Batch, generate: int, pad_id: int) -> int:
    """Run one batch; return the tokens it fed."""
    device = next(p.device for p in model.parameters() if not p.is_meta)
    token_ids = torch.from_numpy(batch.token_ids).to(device)
    mask = torch.from_numpy(batch.mask).to(device)
    if not generate:
        model(input_ids=token_ids, attention_mask=mask, use_cache=False)
        return int(batch.mask.sum())
    # generation needs the padding on the left
    width = token_ids.shape[1]
    shift = (width - batch.mask.sum(axis=1)).tolist()
    rolled = torch.stack([row.roll(int(n)) for row, n in zip(token_ids, shift, strict=True)])
    rolled_mask = torch.stack([row.roll(int(n)) for row, n in zip(mask, shift, strict=True)])
    output = model.generate(
        rolled,
        attention_mask=rolled_mask,
        max_new_tokens=generate,
        do_sample=False,
        pad_token_id=pad_id,
    )
    new: int = output.shape[1] - width
    return int(batch.mask.sum()) + new * len(token_ids)
