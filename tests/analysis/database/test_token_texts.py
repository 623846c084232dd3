"""token_text in SQL: texts of tokens by the tokenizer that is named."""

import json

import pytest

from bhlog.analysis.database.connection import connect
from bhlog.analysis.run import open_log
from tests.synthetic import write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", layers=(0,), n_sequences=1, length=8, n_shards=1)


def name_tokenizer(run, name: str) -> None:
    path = run / "run.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    path.write_text(json.dumps({**manifest, "origin": {"tokenizer": name}}))


def test_texts_are_those_of_the_ids(run):
    rows = open_log(run, tokenizer="bytes").sql(
        "SELECT token_id, token_text(token_id) FROM tokens UNION ALL SELECT NULL, token_text(NULL)"
    )
    found = rows.fetchall()
    assert len(found) == 9
    for token_id, text in found:
        known = token_id is not None and token_id < 256
        assert text == (
            (chr(token_id) if token_id < 128 else f"<0x{token_id:02X}>") if known else None
        )


def test_a_run_of_bytes_needs_no_tokenizer_named(run):
    name_tokenizer(run, "bytes")
    assert open_log(run).sql("SELECT token_text(104)").fetchall() == [("h",)]


def test_without_a_tokenizer_a_warning_names_that_of_the_run(run):
    name_tokenizer(run, "allenai/OLMoE-1B-7B-0924")
    with (
        connect(open_log(run)) as database,
        pytest.warns(UserWarning, match=r"--tokenizer \(the model was run with that of allenai/"),
    ):
        assert database.sql("SELECT token_text(token_id) FROM tokens").fetchall() == [(None,)] * 8


def test_hardest_tokens_show_the_text_around_them(run):
    from bhlog.analysis.database.question import find_question

    question = find_question("easiest_and_hardest_tokens")
    rows = open_log(run, tokenizer="bytes").sql(question.text, top=1, around=2).pl().to_dicts()
    for row in rows:
        ids = [*(row["before"] or []), row["token_id"], *(row["after"] or [])]
        texts = [chr(i) if i < 128 else f"<0x{i:02X}>" if i < 256 else "" for i in ids]
        assert row["around"] == "".join(texts)
