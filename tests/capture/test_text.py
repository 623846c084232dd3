import json
import os

import pytest

from bhlog.capture.contract.errors import EmptyText, InvalidOption, RouterLogError
from bhlog.capture.text import ByteTokenizer, Document, batches, read_documents, windows


def test_a_window_holds_at_most_max_length_tokens_of_one_document():
    documents = [Document("a", "hello world"), Document("b", "xyz")]
    cut = windows(documents, ByteTokenizer(), max_length=4)
    assert [(w.source, bytes(w.token_ids)) for w in cut] == [
        ("a", b"hell"), ("a", b"o wo"), ("a", b"rld"), ("b", b"xyz"),
    ]  # fmt: skip


def test_max_tokens_bounds_every_source_on_its_own():
    documents = [Document("a", "aaaa"), Document("b", "bb"), Document("a", "aaaa")]
    cut = windows(documents, ByteTokenizer(), max_length=3, max_tokens=5)
    assert [(w.source, len(w.token_ids)) for w in cut] == [("a", 3), ("a", 1), ("b", 2), ("a", 1)]


def test_batches_pad_on_the_right_and_mask_the_padding():
    cut = windows([Document("a", "abcde")], ByteTokenizer(), max_length=3)
    (batch,) = batches(cut, batch_size=2, pad_id=9)
    assert batch.token_ids.tolist() == [[97, 98, 99], [100, 101, 9]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_empty_text_is_an_error():
    with pytest.raises(EmptyText, match="nothing to capture"):
        windows([Document("a", "")], ByteTokenizer(), max_length=4)


@pytest.mark.parametrize("options", [{"max_length": 0}, {"max_length": 4, "max_tokens": 0}])
def test_lengths_below_one_are_refused(options):
    with pytest.raises(InvalidOption, match="at least 1, got 0"):
        windows([Document("a", "x")], ByteTokenizer(), **options)


def test_byte_tokens_round_trip_through_utf8():
    text = "naïve ☃ 🎉"
    assert ByteTokenizer().decode([*ByteTokenizer().encode(text), 256]) == text


def test_folders_files_and_json_lines_are_read_in_order(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("bee")
    (folder / "sub" / "a.md").write_text("ay")
    (folder / "ignored.bin").write_bytes(b"\xff")
    lines = tmp_path / "c.jsonl"
    lines.write_text(json.dumps({"body": "one"}) + "\n\n" + json.dumps({"body": "two"}) + "\n")
    found = [(d.source, d.text) for d in read_documents([folder, lines], field="body")]
    assert found == [("b.txt", "bee"), ("sub/a.md", "ay"), ("c.jsonl", "one"), ("c.jsonl", "two")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", b"{not json}\n", "line 1: not JSON"),
        ("x.jsonl", b'{"body": "one"}\n', "no text in field 'text'; it has body"),
        ("x.jsonl", b"[1]\n", "it has list"),
        ("x.jsonl", b"[" * 100_000, "line 1: JSON nested too deeply"),
        ("x.txt", b"ok \xff\xfe", "not UTF-8 text \\(byte 3\\)"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RouterLogError, match=says) as error:
        list(read_documents([path]))
    assert str(path) in str(error.value)


def test_files_of_one_name_are_sources_of_their_own(tmp_path):
    for language in ("de", "en"):
        (tmp_path / language).mkdir()
        (tmp_path / language / "train.txt").write_text(language)
    (tmp_path / "en" / "more.txt").write_text("more")
    found = [
        (document.source, document.text)
        for document in read_documents([tmp_path / "de", tmp_path / "en", tmp_path / "en"])
    ]
    german, english = (f"{tmp_path.as_posix()}/{language}/train.txt" for language in ("de", "en"))
    twice = [("more.txt", "more"), (english, "en")]
    assert found == [(german, "de"), *twice, *twice]


def test_a_file_name_that_is_not_utf8_is_escaped(tmp_path):
    for byte in (b"\xfe", b"\xff"):
        (tmp_path / os.fsdecode(byte + b".txt")).write_text("a")
    found = [document.source for document in read_documents([tmp_path])]
    assert found == [r"\udcfe.txt", r"\udcff.txt"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "b"}\n')
    assert [document.text for document in read_documents([tmp_path])] == ["a", "b"]


def test_a_missing_path_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(RouterLogError, match="no such file or folder"):
        list(read_documents([tmp_path / "nothing"]))
    with pytest.raises(EmptyText, match=r"no file ending in \.txt"):
        list(read_documents([tmp_path]))
