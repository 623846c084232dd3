import csv
import io
import json
import os
from dataclasses import replace

import pytest

from bhlog.analysis.cli import main
from bhlog.analysis.run import open_log
from bhlog.capture.contract.manifest import Manifest, Totals
from bhlog.capture.contract.rule import BhOptions
from tests.synthetic import normal_kde, write_run

LAYERS = (0, 2)


@pytest.fixture
def run(tmp_path):
    return write_run(
        tmp_path / "run",
        layers=LAYERS,
        n_experts=8,
        n_sequences=5,
        length=4,
        options=BhOptions(alpha=0.3, max_k=4),
        kde=normal_kde(LAYERS),
    )


@pytest.fixture
def bhlog(capsys):
    """Run the command; gives exit code, stdout and stderr."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return call


def reopen(run):
    manifest = Manifest.from_json((run / "run.json").read_bytes(), "run.json")
    replace(manifest, closed=None, shards=(), totals=Totals()).write(run)


def test_info_tells_model_routing_counts_and_sources(run, bhlog):
    code, out, err = bhlog("info", run)
    assert (code, err) == (0, "")
    facts = dict(line.split(None, 1) for line in out.splitlines()[1:])
    facts = {name: value.strip() for name, value in facts.items()}
    size = sum(path.stat().st_size for path in run.glob("*/*.parquet"))
    expected = {
        "model": "synthetic",
        "layers": "0 2",
        "experts": "8",
        "routing": "bh",
        "alpha": "0.3",
        "min_k": "1",
        "max_k": "4",
        "null_model": "2 layers, pooled over experts",
        "rows": "40",
        "tokens": "20",
        "sources": "docs 12, code 8",
        "shards": "2",
        "bytes": f"{size:,}",
        "bytes_per_row": f"{size / 40:.4g}",
        "forwards": "5",
    }
    assert {name: facts[name] for name in expected} == expected


def test_info_for_programs_keeps_types(run, bhlog):
    (facts,) = json.loads(bhlog("info", run, "--format", "json")[1])
    assert facts["layers"] == [0, 2]
    assert facts["sources"] == {"docs": 12, "code": 8}
    assert (facts["rows"], facts["alpha"], facts["closed"]) == (
        40,
        0.3,
        "2026-01-01T00:01:00+00:00",
    )
    (row,) = csv.DictReader(io.StringIO(bhlog("info", run, "--format", "csv")[1]))
    assert (row["rows"], row["sources"]) == ("40", "docs 12, code 8")


def test_info_of_a_native_run_without_a_null_model(tmp_path, bhlog):
    run = write_run(tmp_path / "run", n_sequences=2, length=3, sources=("only",))
    (facts,) = json.loads(bhlog("info", run, "--format", "json")[1])
    assert facts["routing"] == "native" and facts["null_model"] is None and "alpha" not in facts


def test_info_of_a_run_still_open_counts_what_is_on_disk(run, bhlog):
    reopen(run)
    (facts,) = json.loads(bhlog("info", run, "--format", "json")[1])
    assert (facts["rows"], facts["tokens"], facts["shards"]) == (40, 20, 2)
    assert facts["closed"] is None and facts["dropped"] is None
    assert "no: still running, or killed" in bhlog("info", run)[1]


def test_info_counts_files_that_cannot_be_read(run, bhlog):
    (run / "routing" / "rank00000-00001.parquet").write_bytes(b"half")
    (facts,) = json.loads(bhlog("info", run, "--format", "json")[1])
    assert (facts["unreadable_files"], facts["rows"], facts["tokens"]) == (1, 24, 20)


def test_info_of_a_run_without_rows(tmp_path, bhlog):
    run = write_run(tmp_path / "run", n_sequences=1, length=1, n_shards=1)
    for path in run.glob("*/*.parquet"):
        path.unlink()
    reopen(run)
    (facts,) = json.loads(bhlog("info", run, "--format", "json")[1])
    assert (facts["rows"], facts["bytes_per_row"]) == (0, None)
    assert bhlog("info", run)[0] == 0
    assert bhlog("verify", run)[0] == 3


def test_many_sources_are_cut_in_tables_only(tmp_path, bhlog):
    sources = tuple(f"file{i:02d}.py" for i in range(12))
    run = write_run(tmp_path / "run", n_sequences=12, length=2, sources=sources)
    assert "file07.py 2 and 4 more" in bhlog("info", run)[1]
    (facts,) = json.loads(bhlog("info", run, "--format", "json")[1])
    assert set(facts["sources"]) == set(sources)


def test_verify_of_a_sound_run_exits_0(run, bhlog):
    code, out, err = bhlog("verify", run, "--replay")
    assert (code, err) == (0, "")
    assert "2 shard pairs: 40 rows of 20 tokens, every page read" in out
    assert "layer 2  " in out and "20 rows replayed, 0 disagree" in out


def test_verify_of_a_damaged_run_exits_1_with_one_line(run, bhlog):
    path = run / "tokens" / "rank00000-00000.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    code, out, err = bhlog("verify", run, "--replay", "--format", "json")
    assert code == 1
    assert err == f"bhlog: {run}: 2 errors found\n"
    findings = json.loads(out)
    assert set(findings[0]) == {"check", "status", "where", "detail"}
    assert [f["check"] for f in findings if f["status"] == "error"] == ["files", "shards"]
    assert findings[-1]["detail"] == "not replayed: the run has errors"


def test_verify_of_a_killed_run_has_a_status_of_its_own_and_says_what_is_missing(run, bhlog):
    reopen(run)
    code, out, err = bhlog("verify", run)
    assert code == 3
    assert err == (
        f"bhlog: {run}: not closed: 20 tokens in 2 sealed shards are whole, what came after them "
        "is missing; let the capture end, or continue it with --resume\n"
    )
    assert "not closed: the capture still runs or was killed" in out


@pytest.mark.parametrize("command", ["info", "verify"])
@pytest.mark.parametrize("what", ["nothing", "a file", "no run", "a cut manifest"])
def test_what_is_no_run_is_one_line(tmp_path, bhlog, command, what):
    path = tmp_path / "run"
    if what == "a file":
        path.write_text("hello")
    elif what != "nothing":
        path.mkdir()
    if what == "a cut manifest":
        (path / "run.json").write_text('{"schema_version": 1, "run_')
    code, out, err = bhlog(command, path)
    assert (code, out) == (1, "")
    assert err.startswith(f"bhlog: {path}") and err.count("\n") == 1


def test_a_run_that_cannot_be_replayed_says_why(run, bhlog):
    manifest = open_log(run).manifest
    options = replace(manifest.routing.options, p_values="empirical")
    routing = replace(manifest.routing, options=options, kde_sha256=None)
    replace(manifest, routing=routing, sample_every=2).write(run)
    code, out, err = bhlog("verify", run, "--replay")
    assert code == 1
    assert "empirical p-values rank whole batches" in out
    assert err == f"bhlog: {run}: 1 error found\n"


def test_verify_reads_null_models_and_profiles(run, bhlog, tmp_path):
    null = tmp_path / "null.parquet"
    assert bhlog("kde", "fit", run, "--out", null)[0] == 0
    code, out, err = bhlog("verify", null)
    assert (code, err) == (0, "") and "null model  ok" in out
    assert bhlog("verify", null, "--replay")[0] == 1
    data = bytearray(null.read_bytes())
    data[len(data) // 2] ^= 1
    null.write_bytes(data)
    code, out, err = bhlog("verify", null)
    assert code == 1 and err == f"bhlog: {null}: 1 error found\n"


@pytest.mark.parametrize(
    "command",
    [
        ["verify"],
        ["info"],
        ["replay", "--alpha", "0.1"],
        ["sweep"],
        ["sql", "SELECT count(*) AS rows FROM routing"],
        ["kde", "fit", "--out", "null.parquet"],
    ],
)
def test_memory_limit_raises_what_a_file_may_claim(run, bhlog, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BHLOG_MEMORY_LIMIT", raising=False)
    monkeypatch.setattr("bhlog.capture.contract.opening.FREE_BYTES", 0)
    monkeypatch.setattr("bhlog.capture.contract.opening.MOST_RATIO", 0)
    name, *rest = command
    arguments = [name, rest[0], run, *rest[1:]] if name == "kde" else [name, run, *rest]
    if name != "info":  # which reads the manifest alone
        code, out, err = bhlog(*arguments)
        assert code == 1 and "--memory-limit raises that" in out + err
    assert bhlog(*arguments, "--memory-limit", "1GB")[0] == 0
    assert bhlog(*arguments, "--memory-limit", "many")[::2] == (
        1,
        "bhlog: 'many' is no size; expected one such as 4GB or 512MiB\n",
    )
    assert "BHLOG_MEMORY_LIMIT" not in os.environ
