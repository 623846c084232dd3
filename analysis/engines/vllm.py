"""vllm: the routed experts that vLLM returns, with --enable-return-routed-experts.

In each choice of an answer (or output of a RequestOutput) `routed_experts` is base64 of what
numpy.save wrote: (tokens, MoE layers, k) int16, uint8 or uint16; -1 stands for positions whose keys
and values were cached, which are left out and counted. Earlier versions have int32 over all layers.
The tokens are those of the prompt and the answer but its last; or, where the answer has
`prompt_routed_experts`, those after it. A proxy may send {"data", "shape", "dtype", "start"} in
place of the file. A .npy file alone will do too.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bhlog.analysis.engines.answers import About, Packed, Text, answers_of, bytes_of_text, of_texts
from bhlog.analysis.engines.npy_files import array_of, mapped
from bhlog.analysis.engines.trace import Told, Trace, regular
from bhlog.capture.contract.errors import CorruptTrace


def read(path: Path, told: Told) -> Trace:
    """A file of answers, or a .npy file.

    Raises:
        CorruptTrace: an answer's experts cannot be read; on the way, too.
    """
    file = regular(path.parent, path.name)
    texts = _texts(file)
    if path.suffix == ".npy":
        texts = iter([Text(str(path), array_of(mapped(file), path, "iu"))])
    return of_texts("vllm", path, told, texts)


def _texts(path: Path) -> Iterator[Text]:
    for where, answer in answers_of(path):
        before, prompt_ids = answer.prompt_routed_experts, tuple(answer.prompt_token_ids or ())
        for choice in answer.choices or answer.outputs or [answer]:
            held = [part for part in (before, choice.routed_experts) if part is not None]
            if not held:
                continue
            arrays = [_array(part, where) for part in held]
            if len({array.shape[1:] for array in arrays}) > 1:
                raise CorruptTrace(f"{where}: the prompt's experts have another shape")
            start = choice.routed_experts_prompt_start or 0
            prompt = len(prompt_ids) or (answer.usage or About()).prompt_tokens
            yield Text(
                where,
                np.concatenate(arrays),
                held[0].start if isinstance(held[0], Packed) else start,
                prompt if before is None else start + len(arrays[0]),
                prompt_ids and (*prompt_ids, *(choice.token_ids or ())),
                answer.model,
            )


def _array(part: str | Packed, where: str) -> NDArray[Any]:
    """(T, L, K) experts.

    Raises:
        CorruptTrace: they are cut off, or something else.
    """
    if isinstance(part, str):
        return array_of(bytes_of_text(part, where), where, "iu")
    data, dtype = bytes_of_text(part.data, where), np.dtype(part.dtype)
    if len(data) != math.prod(part.shape) * dtype.itemsize:
        raise CorruptTrace(f"{where}: {len(data):,} bytes are no {part.dtype} of {part.shape}")
    return np.frombuffer(data, dtype).reshape(part.shape)
