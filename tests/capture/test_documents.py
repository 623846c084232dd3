"""Where text comes from: files of many kinds, folders, globs, standard input, data sets."""

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys

import pandas as pd
import pyarrow as pa
import pytest

from bhlog.analysis.run import open_log
from bhlog.capture import documents
from bhlog.capture.contract.errors import EmptyText, RouterLogError
from bhlog.capture.documents import Field, read_dataset, read_documents, text_sha256
from bhlog.capture.session import CaptureOptions, capture
from bhlog.capture.text import ByteTokenizer, cut

TEXTS = ["To be, or not to be", 'that "is", the\nquestion', "naïve ☃"]


def lines(field="text"):
    return "".join(json.dumps({"n": 1, field: text}) + "\n" for text in TEXTS)


def write(path, kind):
    """The texts in a file of a kind."""
    frame = pd.DataFrame({"n": range(3), "text": TEXTS})
    if kind in ("jsonl", "ndjson", "json"):
        path.write_text(lines(), encoding="utf-8")
    elif kind == "list.json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")


def texts_of(*paths, **options):
    return [document.text for document in read_documents(paths, **options)]


@pytest.mark.parametrize(
    "kind", ["jsonl", "ndjson", "json", "list.json", "parquet", "csv", "tsv", "CSV"]
)
def test_records_of_every_kind_are_documents(tmp_path, kind):
    path = tmp_path / f"texts.{kind}"
    write(path, kind.lower())
    assert texts_of(path) == TEXTS
    with pytest.raises(RouterLogError, match="no text in field 'body'; it has"):
        texts_of(path, field=Field("body"))


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_compressed_files_are_read(tmp_path, kind, suffix):
    plain = tmp_path / f"a.{kind}"
    if kind == "txt":
        plain.write_text("".join(TEXTS))
    else:
        write(plain, kind)
    path = tmp_path / f"b.{kind}.{suffix}"
    path.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    assert texts_of(path) == texts_of(plain)
    assert next(d.source for d in read_documents([path])) == path.name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RouterLogError, match=rf"{path.name}: damaged, or not \.{suffix}"):
        texts_of(path)


def test_zstandard_is_read(tmp_path):
    path = tmp_path / "a.txt.zst"
    with pa.output_stream(str(path), compression="zstd") as out:
        out.write("".join(TEXTS).encode())
    assert texts_of(path) == ["".join(TEXTS)]


def test_globs_name_files_at_any_depth(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/1.txt", "a/b/2.txt", "a/b/3.md"):
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path / "a" / "*.txt") == ["a/1.txt"]
    assert texts_of(tmp_path / "**" / "*.txt") == ["a/1.txt", "a/b/2.txt"]
    with pytest.raises(RouterLogError, match="no such file or folder"):
        texts_of(tmp_path / "*.csv")


@pytest.mark.parametrize(
    "given, texts", [("To be,\nor not", ["To be,\nor not"]), (lines(), TEXTS), ("{x}\n", ["{x}\n"])]
)
def test_standard_input_is_text_or_json_lines(given, texts, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    assert [(d.source, d.text) for d in read_documents(["-"])] == [("stdin", t) for t in texts]
    assert text_sha256(["-"]) == {}


def test_a_long_text_is_read_in_pieces_of_whole_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_PIECE", 10)
    path = tmp_path / "a.txt"
    path.write_text("one two three\nfour\nfive six seven\neight")
    pieces = texts_of(path)
    assert "".join(pieces) == path.read_text() and len(pieces) == 3
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_a_source_is_left_once_max_tokens_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines() + "not JSON\n")  # is not come to
    (tmp_path / "b.txt").write_text("xy")
    full = set()
    found = read_documents([tmp_path], full=full)
    windows = list(cut(found, ByteTokenizer(), max_length=8, max_tokens=12, full=full))
    assert [(w.source, len(w.token_ids)) for w in windows] == [
        ("a.jsonl", 8),
        ("a.jsonl", 4),
        ("b.txt", 2),
    ]


def test_text_is_read_while_the_model_runs(demo, tmp_path):
    events = []

    def reading():
        for i in range(6):
            events.append(f"read {i}")
            yield documents.Document("a", "x" * 16)

    windows = cut(reading(), demo.tokenizer, max_length=16)
    capture(
        demo, windows, tmp_path / "run", options=CaptureOptions(batch_size=2),
        progress=lambda tokens, writer: events.append("ran"),
    )  # fmt: skip
    assert events.index("ran") < events.index("read 2")
    assert open_log(tmp_path / "run").manifest.totals.tokens == 96


@pytest.fixture
def data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    return datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": TEXTS}),
        test=datasets.Dataset.from_dict({"text": ["other"]}),
    )


@pytest.mark.slow
def test_data_sets_are_read_from_what_the_library_saved(data_set, tmp_path):
    data_set.save_to_disk(tmp_path / "both")
    data_set["train"].save_to_disk(tmp_path / "one")
    for name, split, texts in (
        ("both", "train", TEXTS),
        ("both", "test", ["other"]),
        ("one", "train", TEXTS),
    ):
        found = list(read_dataset(str(tmp_path / name), split=split))
        assert [d.text for d in found] == texts
        assert {d.source for d in found} == {str(tmp_path / name)}
    with pytest.raises(RouterLogError, match="no split 'dev'; it has train, test"):
        list(read_dataset(str(tmp_path / "both"), split="dev"))
    with pytest.raises(RouterLogError, match="no text in field 'body'; it has text"):
        list(read_dataset(str(tmp_path / "one"), split="train", field=Field("body")))


@pytest.mark.slow
def test_commands_read_data_sets_pipes_and_globs(data_set, tmp_path):
    """A folder of data files is a data set too; there is no network."""
    (tmp_path / "files").mkdir()
    data_set["train"].to_parquet(tmp_path / "files" / "train.parquet")
    (tmp_path / "a.txt").write_text("glob")

    def bhlog(*words, given=""):
        code = "from bhlog.analysis.cli import main; main()"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(
            [sys.executable, "-c", code, "capture", "demo", *words],
            cwd=tmp_path, env=environment, input=given, capture_output=True, text=True,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.stderr

    bhlog("--dataset", "files", "--text", "-", "--text", "*.txt", "--out", "run", given="piped")
    tokens = open_log(tmp_path / "run").tokens(["source", "token_id"]).to_pylist()
    sources = dict.fromkeys(row["source"] for row in tokens)
    assert set(sources) == {"files", "stdin", "a.txt"}
    read = bytes(row["token_id"] for row in tokens if row["source"] == "files").decode()
    assert read == "".join(TEXTS)
    assert "give --text PATH or --dataset" in bhlog("--out", "none")
    assert "cannot be read again" in bhlog("--text", "-", "--out", "run", "--resume")
    assert "the data set cannot be read" in bhlog("--dataset", "no/where", "--out", "none")
    assert not (tmp_path / "none").exists()


def test_folders_files_and_json_lines_are_read_in_order(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("bee")
    (folder / "sub" / "a.md").write_text("ay")
    (folder / "ignored.bin").write_bytes(b"\xff")
    lines = tmp_path / "c.jsonl"
    lines.write_text(json.dumps({"body": "one"}) + "\n\n" + json.dumps({"body": "two"}) + "\n")
    found = [(d.source, d.text) for d in read_documents([folder, lines], field=Field("body"))]
    assert found == [("b.txt", "bee"), ("sub/a.md", "ay"), ("c.jsonl", "one"), ("c.jsonl", "two")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", b"{not json}\n", "line 1: not JSON"),
        ("x.jsonl", b'{"body": "one"}\n', "no text in field 'text'; it has body"),
        ("x.jsonl", b"[1]\n", "it has list"),
        ("x.jsonl", b"[" * 100_000, "line 1: JSON nested too deeply"),
        ("x.txt", b"ok \xff\xfe", "not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RouterLogError, match=says) as error:
        list(read_documents([path]))
    assert str(path) in str(error.value)


def test_files_of_one_name_are_sources_of_their_own(tmp_path):
    for language in ("de", "en"):
        (tmp_path / language).mkdir()
        (tmp_path / language / "train.txt").write_text(language)
    (tmp_path / "en" / "more.txt").write_text("more")
    found = [
        (document.source, document.text)
        for document in read_documents([tmp_path / "de", tmp_path / "en", tmp_path / "en"])
    ]
    german, english = (f"{tmp_path.as_posix()}/{language}/train.txt" for language in ("de", "en"))
    twice = [("more.txt", "more"), (english, "en")]
    assert found == [(german, "de"), *twice, *twice]


def test_a_file_name_that_is_not_utf8_is_escaped(tmp_path):
    for byte in (b"\xfe", b"\xff"):
        (tmp_path / os.fsdecode(byte + b".txt")).write_text("a")
    found = [document.source for document in read_documents([tmp_path])]
    assert found == [r"\udcfe.txt", r"\udcff.txt"]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "b"}\n')
    assert [document.text for document in read_documents([tmp_path])] == ["a", "b"]


def test_a_missing_path_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(RouterLogError, match="no such file or folder"):
        list(read_documents([tmp_path / "nothing"]))
    with pytest.raises(EmptyText, match=r"no file ending in \.txt"):
        list(read_documents([tmp_path]))
