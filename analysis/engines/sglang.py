"""sglang: the routed experts that SGLang returns, with --enable-return-routed-experts.

In an answer's or a choice's `meta_info` or `sgl_ext`, `routed_experts` is base64 of raw
little-endian int32 (tokens - 1 - start, layers, k): of the prompt and of the answer but its last
token, from `routed_experts_start_len` on. The shape is not told: k is --top-k, the tokens follow
from counts beside it, or else the layers from --layers. What SGLang's recorder dumps (.pt) is read
by bhlog.capture.apps.recorder_dump, which needs torch.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bhlog.analysis.engines.answers import About, Text, answers_of, bytes_of_text, of_texts
from bhlog.analysis.engines.trace import Told, Trace, regular
from bhlog.capture.contract.errors import CorruptTrace, InvalidOption


def read(path: Path, told: Told) -> Trace:
    """A file of answers.

    Raises:
        InvalidOption: --top-k is to be told.
        CorruptTrace: an answer's experts cannot be read; on the way, too.
    """
    if told.top_k is None:
        raise InvalidOption(f"{path}: does not tell top_k; give --top-k")
    texts = _texts(regular(path.parent, path.name), 4 * told.top_k, told.layers or ())
    return of_texts("sglang", path, told, texts)


def _texts(path: Path, width: int, layers: tuple[int, ...]) -> Iterator[Text]:
    for where, answer in answers_of(path):
        for choice in answer.choices or [answer]:
            about = choice.meta_info or answer.meta_info or About()
            text = about.routed_experts or (choice.sgl_ext or About()).routed_experts
            if text is None:
                continue
            data = bytes_of_text(text, where)
            counts = about if about.prompt_tokens else answer.usage or about
            start, prompt = about.routed_experts_start_len or 0, counts.prompt_tokens
            rows = (prompt or 0) + (counts.completion_tokens or 0) - 1 - start
            if not prompt:
                rows = len(data) // (width * max(1, len(layers)))
            L = len(data) // max(1, rows * width)
            if rows < 0 or rows * L * width != len(data):
                raise CorruptTrace(
                    f"{where}: {len(data):,} bytes are no int32 of {rows:,} tokens and "
                    f"{width // 4} experts for each layer"
                )
            experts = np.frombuffer(data, "<i4").reshape(rows, L, width // 4)
            yield Text(where, experts, start, prompt, model=answer.model)
