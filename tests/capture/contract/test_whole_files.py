import pytest

from bhlog.capture.contract.files import whole_file


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with whole_file(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(ValueError), whole_file(path) as file:
        file.write(b"sec")
        raise ValueError
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_the_callers_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "no" / "file"):
        pass
