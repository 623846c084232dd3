"""What may be shown and kept of URIs and command lines."""

import pytest

from bhlog.capture.contract.uris import command_line, shown


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
    ("words", "kept"),
    [
        ("bhlog capture demo --max-tokens 100", "bhlog capture demo --max-tokens 100"),
        ("bhlog capture m --no-token-ids --out r", "bhlog capture m --no-token-ids --out r"),
        ("train.py --hf-token abc --out r", "train.py --hf-token ... --out r"),
        ("train.py --api-key=abc x", "train.py --api-key=... x"),
        ("train.py --password --out r", "train.py --password --out r"),
        ("run AWS_SECRET_ACCESS_KEY=abc x", "run AWS_SECRET_ACCESS_KEY=... x"),
        ("run hf_abcdefghijklmnop x", "run ... x"),
        ("run --login=hf_abcdefghijklmnop", "run --login=..."),
        ("run s3://k:s@b/r?secret_key=x&region=eu", "run s3://b/r?region=eu"),
        ("run --to=s3://k:s@b/r", "run --to=s3://b/r"),
    ],
)
def test_a_command_line_is_kept_without_its_secrets(words, kept):
    assert command_line(words.split()) == tuple(kept.split())
