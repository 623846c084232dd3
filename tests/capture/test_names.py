"""The names of capture: the same objects from bhlog and from capture."""

import pytest

import bhlog
import bhlog.capture
import capture


@pytest.mark.parametrize("name", sorted(capture.__all__))
def test_a_name_of_capture_is_the_same_object_in_bhlog(name):
    assert getattr(capture, name) is getattr(bhlog, name) is getattr(bhlog.capture, name)
