"""What token ids stand for, by tokenizers of several kinds."""

import os
import subprocess
import sys

import pyarrow as pa
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from bhlog.analysis.vocabulary import Vocabulary
from bhlog.capture.contract.errors import InvalidOption, MissingExtra

TEXT = "the cat sat on the mat, naïve café; the dog sat too"


@pytest.fixture
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return tokenizer


@pytest.fixture
def word_marks() -> Tokenizer:
    """As SentencePiece's: a mark where words start, and bytes that are no character."""
    words = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "<0xC3>": 4, "<0xA9>": 5, "▁": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1),
        ]
    )
    return tokenizer


def test_texts_of_a_byte_level_tokenizer_put_the_text_together(tmp_path, byte_level):
    byte_level.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.load(str(tmp_path))
    text = "the cat on the dog"
    ids = byte_level.encode(text).ids
    assert vocabulary.decode(ids) == text
    assert vocabulary.decode(ids[:1]) + vocabulary.decode(ids[1:]) == text
    (end,) = byte_level.encode("<|end|>").ids
    assert vocabulary.decode([end]) == "<|end|>"
    assert Vocabulary.load(str(tmp_path / "tokenizer.json")).texts.equals(vocabulary.texts)


def test_a_word_keeps_the_blank_before_it(tmp_path, word_marks):
    word_marks.save(str(tmp_path / "tokenizer.json"))
    vocabulary = Vocabulary.load(str(tmp_path))
    assert vocabulary.texts.to_pylist()[:4] == ["<unk>", " the", " cat", "s"]
    assert vocabulary.decode([1, 2, 3, 6, 1]) == " the cats  the"


def test_ids_without_a_token_have_no_text():
    vocabulary = Vocabulary.load("bytes")
    ids = pa.array([104, None, 255, 256, -1], pa.int32())
    assert vocabulary.of(ids).to_pylist() == ["h", None, "<0xFF>", None, None]
    assert vocabulary.of(pa.array([], pa.int32())).to_pylist() == []


def test_what_is_no_tokenizer_is_an_error_of_one_line(tmp_path):
    (tmp_path / "broken.json").write_text('{"model": ')
    for name, says in [
        (str(tmp_path), "no tokenizer.json in this folder"),
        (str(tmp_path / "broken.json"), "no tokenizer can be read"),
        (str(tmp_path / "nothing"), "no tokenizer can be read"),
    ]:
        with pytest.raises(InvalidOption, match=says) as caught:
            Vocabulary.load(name)
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'bhlog\[text\]'"):
        Vocabulary.load("somebody/model")
    assert Vocabulary.load("demo").decode([104, 105]) == "hi"


@pytest.mark.slow
def test_a_hub_name_is_read_from_its_local_cache(tmp_path, byte_level):
    home = tmp_path / "models--tiny--olmoe"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    byte_level.save(str(snapshot / "tokenizer.json"))
    program = (
        "from bhlog.analysis.vocabulary import Vocabulary\n"
        "print(len(Vocabulary.load('tiny/olmoe').texts))"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) == byte_level.get_vocab_size()
