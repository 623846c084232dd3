"""Conversations: written by the model's chat template, and who says each token in the log."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bhlog.analysis.cli import main
from bhlog.analysis.run import open_log
from bhlog.capture.checkpoint import load_model
from bhlog.capture.contract.errors import RouterLogError
from bhlog.capture.documents import Field, read_documents
from bhlog.capture.observe import observe
from bhlog.capture.text import ByteTokenizer, conversation
from tests.capture.tiny import batch, rows_of

WORDS = ["<unk>", "<end>", "<user>", "<assistant>", "<system>", "be", "brief", "hi", "who", "me"]
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi who"},
    {"role": "assistant", "content": "me"},
    {"role": "user", "content": "hi"},
]
PLAIN = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
NEEDS_USER = (
    "{% if messages[-1].role == 'system' %}{{ raise_exception('alone') }}{% endif %}" + PLAIN
)
FORGETS = (  # what the assistant said before the last message
    "{% for m in messages %}<{{ m.role }}> {{ m.content if m.role != 'assistant' or loop.last }} "
    "<end> {% endfor %}"
)


def save(folder, template):
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template).save_pretrained(folder)
    return str(folder)


def said(folder, template, messages, **options):
    tokenizer = load_model("demo", tokenizer=save(folder, template)).tokenizer
    token_ids, roles = conversation(tokenizer, messages, **options)
    return [(WORDS[i], role) for i, role in zip(token_ids, roles, strict=True)]


def by_hand(messages):
    return [
        (word, m["role"])
        for m in messages
        for word in (f"<{m['role']}>", *m["content"].split(), "<end>")
    ]


def test_a_message_says_what_it_adds(tmp_path):
    assert said(tmp_path, PLAIN, TALK) == by_hand(TALK)
    answer = [*by_hand(TALK), ("<assistant>", "assistant")]
    assert said(tmp_path, PLAIN, TALK, answer=True) == answer


def test_where_a_template_refuses_the_first_messages_alone_nobody_is_named(tmp_path):
    found = said(tmp_path, NEEDS_USER, TALK)
    assert [word for word, _ in found] == [word for word, _ in by_hand(TALK)]
    roles = [role for _, role in found]
    assert roles == [""] * 8 + [role for _, role in by_hand(TALK[2:])]


def test_where_a_template_writes_earlier_messages_otherwise_nobody_is_named(tmp_path):
    found = said(tmp_path, FORGETS, TALK)
    words = ["<assistant>", "<end>", "<user>", "hi", "<end>"]
    assert found == by_hand(TALK[:2]) + [(word, "") for word in words]


def test_a_tokenizer_without_a_template_and_a_refusal_are_errors(tmp_path):
    with pytest.raises(RouterLogError, match="has no chat template"):
        conversation(ByteTokenizer(), TALK)
    with pytest.raises(RouterLogError, match="has no chat template"):
        said(tmp_path, None, TALK)
    with pytest.raises(RouterLogError, match=r"refuses a conversation \(alone"):
        said(tmp_path, NEEDS_USER, TALK[:1])


def bhlog(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


@pytest.mark.parametrize("generate", [0, 3])
def test_a_captured_conversation_has_roles(tmp_path, generate, capsys):
    talks = [TALK[:2], TALK, TALK[1:3]]
    lines = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks)
    (tmp_path / "talks.jsonl").write_text(lines)
    command = ["capture", "demo", "--text", tmp_path / "talks.jsonl", "--chat"]
    command += ["--tokenizer", save(tmp_path / "words", PLAIN), "--generate", generate]
    assert bhlog(*command, "--max-length", 12, "--batch-size", 4, "--out", tmp_path / "run") == 0
    rows = rows_of(tmp_path / "run", "tokens")
    expected = [by_hand(talk) for talk in talks]
    if generate:
        expected = [[*talk, ("<assistant>", "assistant")] for talk in expected]
    parts = [talk[start : start + 12] for talk in expected for start in range(0, len(talk), 12)]
    for number, part in enumerate(parts):
        mine = sorted((r for r in rows if r["sequence"] == number), key=lambda r: r["position"])
        assert [(WORDS[r["token_id"]], r["role"]) for r in mine[: len(part)]] == part
        assert [r["role"] for r in mine[len(part) :]] == ["assistant"] * max(0, generate - 1)
    capsys.readouterr()
    question = "SELECT role, count(*) AS n FROM tokens WHERE role = 'user' GROUP BY role"
    assert bhlog("sql", tmp_path / "run", question, "--format", "csv") == 0
    assert capsys.readouterr().out.splitlines()[1] == "user,15"
    assert open_log(tmp_path / "run").manifest.options["chat"] is True


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.txt", "hi", "a.txt: is text; messages are in records"),
        ("a.jsonl", '{"text": "hi"}', "no list of messages with role and content in field"),
        ("a.jsonl", '{"messages": [{"content": "hi"}]}', "no list of messages"),
    ],
)
def test_what_holds_no_messages_is_refused_in_a_line(tmp_path, capsys, name, content, says):
    (tmp_path / name).write_text(content)
    out = tmp_path / "run"
    assert bhlog("capture", "demo", "--text", tmp_path / name, "--chat", "--out", out) == 1
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not out.exists()


def test_messages_that_are_read_as_text_are_told_of_chat(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TALK}))
    with pytest.raises(RouterLogError, match="field 'messages' holds messages: read with --chat"):
        list(read_documents([path], field=Field("messages")))


def test_roles_that_callers_name_follow_prompts_and_forks(model, run):
    ids, mask = batch([3, 2], left=True)
    with torch.no_grad(), observe(model, run) as patcher:
        patcher.name_roles([("a", "b", "c"), ("", "d", "e")], then="f")
        model.generate(
            ids, attention_mask=mask, max_new_tokens=3, do_sample=True, num_return_sequences=2,
            eos_token_id=None,
        )  # fmt: skip
        model(ids, attention_mask=mask)  # of nobody's
    said_by: dict[int, str] = {}
    for row in sorted(rows_of(run, "tokens"), key=lambda r: (r["sequence"], r["position"])):
        said_by[row["sequence"]] = said_by.get(row["sequence"], "") + (row["role"] or "-")
    assert list(said_by.values()) == ["abcff", "abcff", "deff", "deff", "---", "--"]
