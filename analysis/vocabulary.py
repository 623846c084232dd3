"""The texts of token ids: a log holds ids alone, and a tokenizer says what they stand for."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from bhlog.analysis.imports import needed
from bhlog.capture.contract.errors import InvalidOption, one_line

BYTES = "bytes"  # a token per byte of UTF-8, as manifests name it
_WORD_START = "\u2581"  # SentencePiece's mark, which decoding a token alone takes off


@dataclass(frozen=True)
class Vocabulary:
    """What each token id stands for.

    Attributes:
        name: of the tokenizer, as given.
        texts: (V,) string by token id; null where an id has no token.
    """

    name: str
    texts: pa.StringArray

    @classmethod
    def load(cls, name: str) -> "Vocabulary":
        """The vocabulary of a tokenizer.

        Args:
            name: a folder with tokenizer.json, such a file, a hub name (from its local cache, or
                the hub), or "bytes" or "demo".

        Raises:
            InvalidOption: there is none of that name, or it cannot be read.
            MissingExtra: the package tokenizers is not installed.
        """
        if name in (BYTES, "demo"):
            return cls(name, pa.array([_byte(value) for value in range(256)], pa.string()))
        tokenizers = needed("tokenizers", "text")
        path = Path(name)
        if path.is_dir():
            path = path / "tokenizer.json"
            if not path.is_file():
                raise InvalidOption(
                    f"{name}: no tokenizer.json in this folder; write one there with "
                    "AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
                )
        try:
            if path.is_file():
                tokenizer = tokenizers.Tokenizer.from_file(str(path))
            else:
                tokenizer = tokenizers.Tokenizer.from_pretrained(name)
        except Exception as error:  # of the Rust library, the hub's and the network's
            raise InvalidOption(
                f"{name}: no tokenizer can be read from it ({one_line(str(error))}); expected a "
                "folder with tokenizer.json, such a file, or a hub name"
            ) from error
        ids = range(tokenizer.get_vocab_size(with_added_tokens=True))
        raw = [tokenizer.id_to_token(i) for i in ids]
        decoded = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
        return cls(name, pa.array([_text(*pair) for pair in zip(raw, decoded, strict=True)]))

    def of(self, token_ids: pa.Array) -> pa.StringArray:
        """The text of each id; null for null and for ids that have no token."""
        known = np.asarray(token_ids.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64)
        inside = (known >= 0) & (known < len(self.texts))
        return self.texts.take(pa.array(np.where(inside, known, 0), mask=~inside))

    def decode(self, token_ids: Iterable[int | None]) -> str:
        """Texts of ids, one after another; bytes of one character are put together."""
        pieces = self.of(pa.array(token_ids, pa.int64())).to_pylist()
        return "".join(piece or "" for piece in pieces)


def _byte(value: int) -> str:
    """A byte as text; what is no character by itself as SentencePiece spells it."""
    return chr(value) if value < 128 else f"<0x{value:02X}>"


def _text(raw: str | None, decoded: str) -> str | None:
    if raw is None:
        return None
    if raw.startswith(_WORD_START) and not decoded.startswith(" "):
        return f" {decoded}"
    return decoded
