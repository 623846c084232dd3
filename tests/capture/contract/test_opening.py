import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.opening import MEMORY_LIMIT, footer_of, open_sealed, refused, seal_of


@pytest.fixture
def path(tmp_path):
    table = pa.table({"layer": np.zeros(1000, np.uint16), "x": np.arange(1000.0)})
    pq.write_table(table, tmp_path / "a.parquet", write_page_checksum=True)
    return tmp_path / "a.parquet"


def opened(path, seal=None):
    return open_sealed(pa.OSFile(str(path)), seal)


def test_a_sealed_file_opens(path):
    assert opened(path, seal_of(path)).read().num_rows == 1000


def test_any_bit_of_a_footer_that_flips_is_told(path):
    seal, data = seal_of(path), path.read_bytes()
    start = len(data) - len(footer_of(pa.OSFile(str(path))))
    for at in range(start, len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises((ValueError, OSError)):
            opened(path, seal)


@pytest.mark.parametrize("name", ["bytes", "rows"])
def test_another_size_or_number_of_rows_is_told(path, name):
    seal = seal_of(path)
    with pytest.raises(ValueError, match="were sealed"):
        opened(path, replace(seal, **{name: getattr(seal, name) + 1}))


def test_a_small_file_that_claims_gigabytes_is_not_read(tmp_path, monkeypatch):
    n = 20_000_000
    table = pa.table({"a": np.zeros(n, np.int32)})
    path = tmp_path / "bomb.parquet"
    pq.write_table(table, path, compression="zstd", row_group_size=n)
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match=r"claims to hold 76 MiB in .* bytes; expected at most"):
        opened(path)
    monkeypatch.setenv(MEMORY_LIMIT, "70MiB")
    with pytest.raises(ValueError, match="expected at most 70 MiB; if you trust it, --memory-lim"):
        opened(path)
    monkeypatch.setenv(MEMORY_LIMIT, "80MiB")
    assert opened(path).metadata.num_rows == n
    monkeypatch.setenv(MEMORY_LIMIT, "lots")
    with pytest.raises(InvalidOption, match="BHLOG_MEMORY_LIMIT: 'lots' is no size"):
        opened(path)


def test_only_files_inside_the_folder_are_opened(path, tmp_path):
    run = tmp_path / "run"
    (run / "routing").mkdir(parents=True)
    os.mkfifo(run / "routing" / "fifo")
    (run / "routing" / "out").symlink_to(path)
    (run / "routing" / "null").symlink_to("/dev/null")
    (run / "routing" / "in").symlink_to("plain")
    (run / "routing" / "plain").write_text("x")
    assert refused(run, "routing/fifo") == refused(run, "routing") == "is not a file"
    for name in ("out", "null"):
        assert "is not followed" in str(refused(run, f"routing/{name}"))
    assert refused(run, "routing/in") is refused(run, "routing/plain") is None
    assert refused(run, "routing/nothing") is None
