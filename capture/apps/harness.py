"""lm-evaluation-harness: its model wrapper around ours, and which request each row of a log is.

The harness feeds requests sorted, in groups that share a forward, padded, and without an attention
mask. `named_requests` tells bhlog what the rows are: `source` is the task, `sample_id` the document
and the request, as in 12/0, or 12/0+1 where requests of a document are answered by one forward. It
changes what the model is told in nothing, so scores are the bare harness's, digit for digit.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from bhlog.capture.checkpoint import LoadedModel
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.patch import RouterPatcher
from bhlog.capture.text import ByteTokenizer

Name = tuple[str, str]  # source, sample_id
Key = tuple[int, ...]


def harness_model(
    loaded: LoadedModel, *, batch_size: int | str = 1, max_batch_size: int = 64
) -> Any:
    """The harness's own wrapper, HFLM, of a loaded model.

    Args:
        batch_size: rows a forward; "auto" lets the harness search for it.
        max_batch_size: where that search begins.
    """
    from lm_eval.models.huggingface import HFLM

    found = loaded.tokenizer
    tokenizer = (
        byte_tokenizer(loaded.model.config.vocab_size)
        if isinstance(found, ByteTokenizer)
        else getattr(found, "of_transformers", found)
    )
    return HFLM(
        pretrained=loaded.model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_batch_size=max_batch_size,
    )


def byte_tokenizer(n_ids: int) -> Any:
    """A tokenizer of transformers with a token a byte, and 256, where it is one, between texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shown = _byte_characters()
    vocabulary = {shown[byte]: byte for byte in range(256)}
    special = "<|endoftext|>" if n_ids > 256 else shown[0]
    core = Tokenizer(models.BPE(vocab=vocabulary | {special: min(256, n_ids - 1)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=core,
        bos_token=special,
        eos_token=special,
        pad_token=special,
        clean_up_tokenization_spaces=False,
    )


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies, as GPT-2 chose them."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


@contextmanager
def named_requests(
    lm: Any, patcher: RouterPatcher, samples: Mapping[str, Sequence[int]] | None = None
) -> Iterator[None]:
    """Name the rows that a harness's model runs inside the block; see the module.

    The search for a batch size is not logged.

    Args:
        lm: an HFLM of the harness around the model that is observed or routed.
        patcher: what `observe` or `route` gave.
        samples: the documents of each task, where simple_evaluate is given them: it counts from 0
            among these.

    Raises:
        InvalidOption: it is of another kind, or runs in several processes.
    """
    from lm_eval.models.huggingface import HFLM

    if not isinstance(lm, HFLM) or lm.backend != "causal":
        raise InvalidOption(f"{type(lm).__name__}: expected lm_eval's HFLM of a causal model")
    if lm.world_size > 1:
        raise InvalidOption("requests of a harness in several processes cannot be named; use one")
    names = _Names(lm, patcher, samples or {})
    with ExitStack() as stack:
        for method in (
            "loglikelihood",
            "loglikelihood_rolling",
            "generate_until",
            "tok_batch_encode",
            "_loglikelihood_tokens",
            "_model_call",
            "_detect_batch_size",
        ):
            stack.enter_context(_wrapped(lm, method, getattr(names, method.strip("_"))))
        yield


@contextmanager
def _wrapped(lm: Any, method: str, around: Callable[..., Any]) -> Iterator[None]:
    """Put a function around a method of this instance."""
    inner = getattr(lm, method)
    vars(lm)[method] = lambda *args, **kwargs: around(inner, *args, **kwargs)
    try:
        yield
    finally:
        del vars(lm)[method]


class _Names:
    """What the forwards of a harness's model are of, told to a patcher ahead of each."""

    def __init__(
        self, lm: Any, patcher: RouterPatcher, samples: Mapping[str, Sequence[int]]
    ) -> None:
        self.lm, self.patcher, self.samples = lm, patcher, samples
        self.requests: deque[Name] = deque()  # of what _loglikelihood_tokens gets next
        self.groups: dict[Key, deque[list[Name]]] = {}  # by the tokens that are fed
        self.contexts: dict[str, deque[Name]] | None = None  # by prompt, while it generates

    def loglikelihood(self, inner: Any, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        self.requests = deque(map(self._name, requests))
        return inner(requests, *args, **kwargs)

    def loglikelihood_rolling(
        self, inner: Any, requests: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        from lm_eval.utils import get_rolling_token_windows

        lm = self.lm
        self.requests = deque(
            self._name(request)
            for request in requests
            for _ in get_rolling_token_windows(
                lm.tok_encode(request.args[0]), lm.prefix_token_id, lm.max_length, 1
            )
        )
        return inner(requests, *args, **kwargs)

    def loglikelihood_tokens(
        self, inner: Any, requests: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        grouped: dict[Key, list[list[Name]]] = defaultdict(list)
        for _, context, continuation in requests:
            name = self.requests.popleft() if self.requests else ("", "")
            fed = (*context, *continuation)[:-1]
            if self.lm.logits_cache and fed in grouped:
                grouped[fed][0].append(name)  # one forward answers both
            else:
                grouped[fed].append([name])
        self.groups = defaultdict(deque)
        for fed, groups in grouped.items():
            self.groups[fed[-self.lm.max_length :]].extend(groups)
        return inner(requests, *args, **kwargs)

    def model_call(self, inner: Any, inps: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.groups:
            rows = [self._row(tuple(row)) for row in inps.tolist()]
            self._tell([_joined(names) for _, names in rows])
            self.patcher.name_lengths([length for length, _ in rows])
        return inner(inps, *args, **kwargs)

    def _row(self, row: Key) -> tuple[int, list[Name]]:
        """Tokens of a row, and whose they are: the longest request left that it may be.

        The harness runs them from the longest on and fills up with zeros.
        """
        length = len(row)
        while True:
            waiting = self.groups.get(row[:length])
            if waiting:
                return length, waiting.popleft()
            if not length or row[length - 1] != 0:
                return len(row), [("", "")]
            length -= 1

    def generate_until(self, inner: Any, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        self.contexts = defaultdict(deque)
        for request in requests:
            self.contexts[request.args[0]].append(self._name(request))
        try:
            return inner(requests, *args, **kwargs)
        finally:
            self.contexts = None

    def tok_batch_encode(
        self, inner: Any, strings: Sequence[str], *args: Any, **kwargs: Any
    ) -> Any:
        contexts = self.contexts
        if contexts is not None:  # they are fed next
            self._tell([contexts[s].popleft() if contexts[s] else ("", "") for s in strings])
        return inner(strings, *args, **kwargs)

    def detect_batch_size(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        groups, self.groups = self.groups, {}
        try:
            with self.patcher.paused():
                return inner(*args, **kwargs)
        finally:
            self.groups = groups

    def _name(self, request: Any) -> Name:
        task, document = request.task_name or "", request.doc_id
        if task in self.samples:
            document = self.samples[task][document]
        return task, f"{document}/{request.idx}"

    def _tell(self, names: Sequence[Name]) -> None:
        self.patcher.name_sources([source for source, _ in names])
        self.patcher.name_sequences([sample for _, sample in names])


def _joined(names: Sequence[Name]) -> Name:
    """The name of a row that several requests share: 12/0+1 if they are of one document."""
    source, sample = names[0]
    document = sample.rpartition("/")[0]
    others = [
        other.rpartition("/")[2]
        for task, other in names[1:]
        if task == source and other.rpartition("/")[0] == document
    ]
    return source, "+".join([sample, *dict.fromkeys(others)])
