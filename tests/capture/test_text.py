import pytest

from bhlog.capture.contract.errors import EmptyText, InvalidOption
from bhlog.capture.documents import Document
from bhlog.capture.text import ByteTokenizer, batches, windows


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
