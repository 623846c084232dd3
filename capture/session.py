"""A capture session: load a model, run text through it, log a run."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bhlog.capture.contract.errors import InvalidOption, RouterLogError
from bhlog.capture.contract.manifest import Manifest, Routing
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.observe import new_writer, recording
from bhlog.capture.origin import origin_here
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.text import Batch, ByteTokenizer, Tokenizer, Window, batches
from bhlog.capture.writing.fitting import KdeFit
from bhlog.capture.writing.launch import rank, world_size
from bhlog.capture.writing.writer import RunWriter, WriterOptions

# owner/name, or a name alone; what starts with a dot or a slash is a path
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_DTYPES = "float32", "bfloat16", "float16"  # which float32 holds exactly

Advance = Callable[[int, RunWriter], None]  # tokens just done, and the writer


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to run, with its tokenizer.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: of the model; bytes for byte-level models.
        pad_id: token id that fills up short rows.
        tokenizer_name: its folder or hub name, "bytes" for byte-level models.
    """

    model: Any
    tokenizer: Tokenizer
    pad_id: int
    tokenizer_name: str | None = None


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


def load_model(
    name: str, *, device: str = "auto", dtype: str = "auto", revision: str | None = None
) -> LoadedModel:
    """Load a model by folder, hub name, or `demo`, the bundled one.

    Args:
        name: a folder if there is one of that name, else a name on the hub such as
            allenai/OLMoE-1B-7B-0924, from the hub or its local cache.
        revision: branch, tag or commit on the hub; None takes the main one.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one: the first, or
            that of this process under torchrun.
        dtype: "float32", "bfloat16", ...; "auto" takes the checkpoint's, on CPU float32.

    Raises:
        RouterLogError: no such model, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    place = _device(device)
    source = str(files("bhlog.capture.demo")) if name == "demo" else name
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"  # widening is exact, and faster than bfloat16 on most CPUs
    if dtype not in ("auto", *_DTYPES):
        raise InvalidOption(f"no dtype '{dtype}'; expected {', '.join(_DTYPES)} or auto")
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    is_folder = Path(source).is_dir()
    if not is_folder and not _HUB_NAME.fullmatch(source):
        raise RouterLogError(
            f"{source}: no such folder, and no name on the hub; expected a model's folder, or a "
            "hub name such as allenai/OLMoE-1B-7B-0924"
        )
    if is_folder and revision is not None:
        raise InvalidOption(f"{source}: is a folder; a revision is of a model on the hub")
    try:
        with _quiet(name == "demo"):
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=wanted, revision=revision or "main"
            )
        model = model.to(place).eval()
        tokenizer = _tokenizer(source, model, revision)
    except RouterLogError:
        raise
    except Exception as error:  # what its files may lack has many names
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = (
            ""
            if is_folder
            else ("; there is no such folder here, so it was looked up on the hub and in its cache")
        )
        raise RouterLogError(f"{name}: the model cannot be loaded ({first}){hint}") from error
    if name == "demo":
        model.config._name_or_path = "demo"
    elif not is_folder:
        model.config._commit_hash = _commit(source, revision)
    is_bytes = isinstance(tokenizer, ByteTokenizer)
    return LoadedModel(model, tokenizer, _pad_id(model), "bytes" if is_bytes else name)


def _commit(source: str, revision: str | None) -> str | None:
    """Commit of a model on the hub; newer transformers drop it from the config."""
    from transformers.utils.hub import cached_file, extract_commit_hash

    return extract_commit_hash(cached_file(source, "config.json", revision=revision), None)


@contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Without a progress bar for loading weights: the bundled model is there in no time."""
    from transformers.utils import logging

    quiet = quiet and logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    try:
        yield
    finally:
        if quiet:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]


def capture(
    loaded: LoadedModel,
    texts: Sequence[Window],
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

    Of the processes of a launch, each runs its share of the windows: every world_size-th. Batches
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
    writer = new_writer(
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
    texts = share(texts)
    with recording(patcher, routing, kde, writer, fit):
        assert patcher.recorder is not None
        done = writer.windows
        writer.checkpoint()
        if progress is not None and done:
            progress(n_tokens(texts[:done], options.generate), writer)
        for batch in batches(texts[done:], batch_size=options.batch_size, pad_id=loaded.pad_id):
            patcher.name_sources(batch.sources)
            tokens = _run(loaded.model, batch, options.generate, loaded.pad_id)
            patcher.recorder.flush()
            writer.checkpoint(windows=len(batch.sources))
            if progress is not None:
                progress(tokens, writer)
    return writer.manifest


def _notes(patcher: RouterPatcher, routing: Routing) -> dict[str, Any]:
    notes: dict[str, Any] = {"processes": world_size()}  # the windows' shares depend on it
    if routing.options is not None:
        notes["experts_implementation"] = patcher.experts_implementation
    return notes


def n_tokens(texts: Sequence[Window], generate: int) -> int:
    """Tokens that windows hold, and at most generate after them."""
    return sum(len(window.token_ids) + generate for window in texts)


def share(texts: Sequence[Window]) -> Sequence[Window]:
    """The windows that this process of a launch runs."""
    return texts[rank() :: world_size()]


@torch.inference_mode()
def _run(model: Any, batch: Batch, generate: int, pad_id: int) -> int:
    """Run one batch; return the tokens it fed."""
    device = next(model.parameters()).device
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


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
        raise InvalidOption(
            f"no device '{name}' here; expected cpu, cuda, cuda:1, ... ({why})"
        ) from error
    return device


def _tokenizer(source: str, model: nn.Module, revision: str | None) -> Tokenizer:
    from transformers.utils.hub import cached_file

    config: Any = model.config
    named = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    quiet = dict.fromkeys(
        ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False
    )
    if not any(cached_file(source, name, revision=revision, **quiet) for name in named):
        if 256 <= config.vocab_size <= 512:
            return ByteTokenizer()
        raise RouterLogError(
            f"{source}: no tokenizer beside the model, and its vocabulary of "
            f"{config.vocab_size} is not one of bytes; put tokenizer.json beside it"
        )
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    return _HubTokenizer(tokenizer)


class _HubTokenizer:
    """A transformers tokenizer without special tokens, quiet about long texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(token_ids))


def _pad_id(model: nn.Module) -> int:
    config: Any = model.config
    eos = config.eos_token_id
    for candidate in (config.pad_token_id, eos[0] if isinstance(eos, list) else eos, 0):
        if candidate is not None:
            return int(candidate)
    return 0
