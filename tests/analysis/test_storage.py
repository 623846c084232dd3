"""What messages show of where a run lies."""

import pytest

from bhlog.analysis.log import Log
from bhlog.capture.contract.errors import MissingRun


@pytest.mark.parametrize(
    "uri",
    [
        pytest.param(
            "s3://AKIAKEY:hunter%2F2@bucket/run?endpoint_override=127.0.0.1:9&scheme=http",
            marks=pytest.mark.slow,  # waits for its retries
        ),
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
