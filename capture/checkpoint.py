"""Loading a model and its tokenizer, as Hugging Face users expect."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bhlog.capture.contract.errors import InvalidOption, RouterLogError
from bhlog.capture.documents import Message
from bhlog.capture.text import NO_TEMPLATE, ByteTokenizer, Tokenizer

# owner/name, or a name alone; what starts with a dot or a slash is a path
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_DTYPES = "float32", "bfloat16", "float16"  # which float32 holds exactly


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


def load_model(
    name: str,
    *,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    attn: str | None = None,
    quantize: str | None = None,
    adapter: str | None = None,
    trust_remote_code: bool = False,
    tokenizer: str | None = None,
) -> LoadedModel:
    """Load a model by folder, hub name, or `demo`, the bundled one.

    Args:
        name: a folder if there is one of that name, else a name on the hub such as
            allenai/OLMoE-1B-7B-0924, from the hub or its local cache.
        device: "cpu", "cuda", "cuda:1", ...; "auto" takes a GPU if there is one: the first, or
            that of this process under torchrun.
        device_map: spread it over devices instead, by accelerate: "auto", "balanced", ....
        dtype: "float32", "bfloat16", ...; "auto" takes the checkpoint's, on CPU float32.
        revision: branch, tag or commit on the hub; None takes the main one.
        attn: code of attention: "sdpa", "eager", "flash_attention_2", ...; None leaves it to
            transformers.
        quantize: quantize while loading, see `quantization`.
        adapter: folder or hub name of a PEFT adapter that is put on the model.
        trust_remote_code: run code that comes with the model.
        tokenizer: folder or hub name of another tokenizer, or "bytes"; None takes the model's.

    Raises:
        RouterLogError: no such model, tokenizer or adapter, or it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    is_folder = _require_place(name, "model") if name != "demo" else True
    if is_folder and revision is not None:
        raise InvalidOption(f"{name}: is a folder; a revision is of a model on the hub")
    adapter_is_folder = adapter is None or _require_place(adapter, "PEFT adapter")
    if tokenizer is not None and tokenizer != "bytes":
        _require_place(tokenizer, "tokenizer")
    options: dict[str, Any] = {"revision": revision or "main"}
    if trust_remote_code:
        options["trust_remote_code"] = True
    place = None
    if device_map is not None:
        if device != "auto":
            raise InvalidOption("device_map says where each part goes: give it or device, not both")
        options["device_map"] = device_map
    else:
        place = _device(device)
    if dtype == "auto" and place is not None and place.type == "cpu":
        dtype = "float32"  # widening is exact, and faster than bfloat16 on most CPUs
    if dtype not in ("auto", *_DTYPES):
        raise InvalidOption(f"no dtype '{dtype}'; expected {', '.join(_DTYPES)} or auto")
    options["dtype"] = dtype if dtype == "auto" else getattr(torch, dtype)
    if attn is not None:
        if not trust_remote_code and not attn.replace("_", "").isalnum():
            raise InvalidOption(f"attn '{attn}' is code from the hub: it needs trust_remote_code")
        options["attn_implementation"] = attn
    if quantize is not None:
        options["quantization_config"] = quantization(quantize)
        if place is not None:  # quantizers place what they have quantized
            options["device_map"] = {"": place}
    source = str(files("bhlog.capture.demo")) if name == "demo" else name
    with _explained(name, "model", is_folder), _quiet(name == "demo"):
        model: Any = AutoModelForCausalLM.from_pretrained(source, **options)
        if "device_map" not in options:
            model = model.to(place)
    if adapter is not None:
        with _explained(adapter, "adapter", adapter_is_folder):
            model = _with_adapter(model, adapter)
    model = model.eval()
    if name == "demo":
        model.config._name_or_path = "demo"
    elif not is_folder:
        model.config._commit_hash = _commit(source, revision)
    tokenizer_of = tokenizer or source
    with _explained(tokenizer or name, "tokenizer", Path(tokenizer_of).is_dir()):
        found = (
            ByteTokenizer()
            if tokenizer == "bytes"
            else _tokenizer(tokenizer_of, model, None if tokenizer else revision, trust_remote_code)
        )
    is_bytes = isinstance(found, ByteTokenizer)
    return LoadedModel(model, found, _pad_id(model), "bytes" if is_bytes else tokenizer or name)


def quantization(words: str) -> Any:
    """A quantizer of transformers with its options.

    Args:
        words: its name and options as `NAME` or `NAME:option=value,...`, such as
            bitsandbytes_4bit:bnb_4bit_quant_type=nf4 or quanto:weights=int8.

    Raises:
        InvalidOption: there is none of that name, or it takes no such options.
        RouterLogError: what it needs is not installed.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method, _, rest = words.partition(":")
    known: dict[str, Any] = AUTO_QUANTIZATION_CONFIG_MAPPING
    if method not in known:
        near = get_close_matches(method, known, n=3) or sorted(known)
        raise InvalidOption(f"no quantizer '{method}' in transformers; it has {', '.join(near)}")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InvalidOption(f"quantizer {method}: expected option=value, got '{part}'")
        options[key] = _value(value)
    try:
        if method.startswith("bitsandbytes_"):  # one config, whose quantizers differ by this
            options.setdefault(f"load_in_{method.removeprefix('bitsandbytes_')}", True)
        config = known[method](**options)
    except ImportError as error:
        raise RouterLogError(f"quantizer {method}: {_first_line(error)}") from error
    except Exception as error:  # each checks its options in a way of its own
        raise InvalidOption(f"quantizer {method}: {_first_line(error)}") from error
    takes = signature(known[method]).parameters  # some swallow others
    unknown = [key for key in options if key not in takes and not hasattr(config, key)]
    if unknown:
        raise InvalidOption(f"quantizer {method} has no option '{unknown[0]}'")
    return config


def _value(text: str) -> Any:
    """A number, true, false or null as in JSON; text otherwise."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _require_place(name: str, what: str) -> bool:
    """Whether a name is a folder rather than one on the hub.

    Raises:
        RouterLogError: it can be neither.
    """
    if Path(name).is_dir():
        return True
    if not _HUB_NAME.fullmatch(name):
        raise RouterLogError(
            f"{name}: no such folder, and no name on the hub; expected a {what}'s folder, or a "
            "hub name such as allenai/OLMoE-1B-7B-0924"
        )
    return False


@contextmanager
def _explained(name: str, what: str, is_folder: bool) -> Iterator[None]:
    """Say in a line what could not be loaded and why."""
    try:
        yield
    except RouterLogError:
        raise
    except Exception as error:  # what its files may lack has many names
        hint = (
            ""
            if is_folder
            else "; there is no such folder here, so it was looked up on the hub and in its cache"
        )
        why = _first_line(error)
        if "trust_remote_code" in str(error):
            why = "it comes with code of its own; trust_remote_code (--trust-remote-code) runs it"
        raise RouterLogError(f"{name}: the {what} cannot be loaded ({why}){hint}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _with_adapter(model: Any, adapter: str) -> Any:
    """The model with a PEFT adapter on it."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise RouterLogError(f"{adapter}: an adapter needs peft; pip install peft") from error
    return PeftModel.from_pretrained(model, adapter)


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


def _tokenizer(
    source: str, model: nn.Module, revision: str | None, trust_remote_code: bool
) -> Tokenizer:
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

    tokenizer: Any = AutoTokenizer.from_pretrained(
        source, revision=revision or "main", trust_remote_code=trust_remote_code
    )
    return _HubTokenizer(tokenizer)


class _HubTokenizer:
    """A transformers tokenizer without special tokens, quiet about long texts."""

    def __init__(self, tokenizer: Any) -> None:
        self.of_transformers = tokenizer

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.of_transformers(text, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return ids

    def chat(self, messages: Sequence[Message], *, answer: bool = False) -> str:
        if not self.of_transformers.chat_template:
            raise RouterLogError(NO_TEMPLATE)
        try:
            return str(
                self.of_transformers.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=answer
                )
            )
        except Exception as error:  # templates are programs, and refuse in ways of their own
            raise RouterLogError(
                f"the chat template refuses a conversation ({_first_line(error)})"
            ) from error

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.of_transformers.decode(token_ids))


def _pad_id(model: nn.Module) -> int:
    config: Any = model.config
    eos = config.eos_token_id
    for candidate in (config.pad_token_id, eos[0] if isinstance(eos, list) else eos, 0):
        if candidate is not None:
            return int(candidate)
    return 0
