"""A byte trigram model: the yardstick beside which the demonstration model's loss is reported."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

SEPARATOR = 256  # stands before a text's first byte
SYMBOLS = 257


class Trigram:
    """Probability of a byte after its two predecessors, interpolated by Witten and Bell's rule.

    A context seen n times, followed by d different bytes, leaves d / (n + d) of its probability
    to the next shorter context; below the empty one lies the uniform distribution. So no
    parameter is chosen and no byte has probability 0.

    Args:
        texts: UTF-8 bytes of the documents to count.

    Reference:
        Witten and Bell (1991), IEEE Trans. Inf. Theory 37(4), method C.
    """

    def __init__(self, texts: Iterable[bytes]) -> None:
        codes = [_codes(text) for text in texts]
        counts = np.bincount(np.concatenate(codes), minlength=SYMBOLS**3)
        trigrams = counts.reshape(SYMBOLS, SYMBOLS, SYMBOLS)
        self._levels = [
            (level, level.sum(-1), (level > 0).sum(-1))
            for level in (trigrams.sum((0, 1)), trigrams.sum(0), trigrams)
        ]

    def nats(self, text: bytes) -> NDArray[np.float64]:
        """Surprise of each byte of a text, (len(text),), in nats."""
        before, last, byte = np.unravel_index(_codes(text), (SYMBOLS,) * 3)
        probability: NDArray[np.float64] = np.full(len(byte), 1 / SYMBOLS)
        contexts = ((), (last,), (before, last))
        for (counts, n_seen, n_different), context in zip(self._levels, contexts, strict=True):
            seen, different = n_seen[context], n_different[context]
            smoothed = counts[(*context, byte)] + different * probability
            probability = np.where(seen, smoothed / np.maximum(seen + different, 1), probability)
        nats: NDArray[np.float64] = -np.log(probability)
        return nats


def _codes(text: bytes) -> NDArray[np.int64]:
    """Each byte with its two predecessors as one number, (len(text),)."""
    symbols = np.concatenate([[SEPARATOR] * 2, np.frombuffer(text, np.uint8)]).astype(np.int64)
    return (symbols[:-2] * SYMBOLS + symbols[1:-1]) * SYMBOLS + symbols[2:]
