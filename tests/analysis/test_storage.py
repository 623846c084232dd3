"""What messages show of where a run lies."""

import pytest

from bhlog.analysis.log import Log
from bhlog.analysis.storage import shown
from bhlog.capture.contract.errors import MissingRun


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("runs/a@b?c=d", "runs/a@b?c=d"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("s3://key:pass@bucket/run", "s3://bucket/run"),
        ("s3://key:pa%2Fss@bucket/a@b", "s3://bucket/a@b"),
        ("s3://b/r?region=eu&scheme=http", "s3://b/r?region=eu&scheme=http"),
        ("s3://k:s@b/r?secret_key=x&region=eu&session_token=y", "s3://b/r?region=eu"),
        ("s3://b/r?secret_key=x", "s3://b/r"),
    ],
)
def test_a_uri_is_shown_without_its_secrets(given, expected):
    assert shown(given) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:hunter%2F2@bucket/run?endpoint_override=127.0.0.1:9&scheme=http",
        "s3://AKIAKEY:hunter%2F2@bucket/run?no_such_option=hunter2",
        "nosuch://AKIAKEY:hunter2@bucket/run",
        "s3://AKIAKEY:hunter2@/run?endpoint_override=127.0.0.1:9",
    ],
)
def test_an_error_about_a_uri_echoes_no_secret(uri, monkeypatch):
    with pytest.raises(MissingRun) as error:
        Log(uri)
    text = str(error.value)
    assert "hunter" not in text and "AKIAKEY" not in text and "\n" not in text
