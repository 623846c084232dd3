import pytest

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.sizes import bytes_of


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1", 1),
        ("4GB", 4_000_000_000),
        ("4000MiB", 4000 << 20),
        (" 1.5 kib ", 1536),
        ("2e3", 2000),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes_are_read_as_people_write_them(text, expected):
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "0", "GB", "-1GB", "4 gigs", "1e99", "nan", "0x10", "1,000"])
def test_what_is_no_size_is_named(text):
    with pytest.raises(InvalidOption, match="is no size; expected one such as 4GB"):
        bytes_of(text)
