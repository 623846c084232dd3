"""Each kind of damage to files, on the smallest run that shows it."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.run import open_log
from bhlog.analysis.verify.overlaps import _crossing
from bhlog.analysis.verify.verification import verify
from bhlog.capture.contract.errors import CorruptManifest
from bhlog.capture.contract.files import write_shard
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.contract.schema import logits_type, shard_name
from tests.analysis.verify.damage import (
    LAST,
    LAYERS,
    E,
    details,
    edit_manifest,
    edit_shard,
    errors,
    only_error,
    reopen,
    small_run,
    warnings,
)
from tests.synthetic import normal_kde, normal_logits, write_run


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path / "run")


def test_a_sound_run_has_no_errors_and_tells_what_is_there(run):
    findings = verify(open_log(run))
    assert {f.status for f in findings} == {"ok"}
    details = {f.check: f.detail for f in findings}
    assert details["shards"] == "3 shard pairs: 60 rows of 30 tokens, every page read"
    assert details["manifest"].endswith("3 shard pairs listed")
    assert details["null model"].startswith("2 layers")


@pytest.mark.parametrize(
    "options",
    [
        {"options": None},
        {"options": None, "token_ids": False},
        {"options": None, "n_ranks": 2, "n_shards": 4},
        {"options": None, "decode_from": 3},
    ],
)
def test_other_sound_runs_have_no_errors(tmp_path, options):
    run = write_run(tmp_path / "run", n_sequences=4, length=5, **options)
    assert errors(run) == []


def test_nonfinite_logits_are_counted_and_no_error(tmp_path):
    l = normal_logits(np.random.default_rng(0), 40, E).reshape(2, 2, 10, E)
    l[0, 0, 3, 2] = np.nan
    l[1, 1, 5] = -np.inf
    run = write_run(
        tmp_path / "run",
        layers=LAYERS,
        n_experts=E,
        n_sequences=4,
        length=5,
        logits=l,
        options=BhOptions(alpha=0.3),
        kde=normal_kde(LAYERS),
    )
    assert errors(run) == []
    assert details(run)["totals"].endswith("2 rows with a NaN or infinity")


@pytest.mark.parametrize("folder", ["routing", "tokens"])
def test_a_shard_cut_in_half(run, folder):
    path = run / folder / LAST
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    size, unreadable = errors(run)
    assert size[:2] == ("files", LAST) and "the manifest says" in size[2]
    assert unreadable[:2] == ("shards", LAST) and "no readable Parquet footer" in unreadable[2]
    assert "2 whole, 1 not: see the errors above" in [d for _, d in warnings(run)]


@pytest.mark.parametrize("folder", ["routing", "tokens"])
def test_an_empty_file_in_place_of_a_shard(run, folder):
    (run / folder / LAST).write_bytes(b"")
    assert "no readable Parquet footer in 0 bytes" in errors(run)[1][2]


@pytest.mark.parametrize("folder", ["routing", "tokens"])
@pytest.mark.parametrize("column", range(8))
def test_a_byte_flipped_in_a_page(run, folder, column):
    path = run / folder / LAST
    chunk = pq.read_metadata(path).row_group(0).column(column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start + chunk.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    check, where, detail = only_error(run)
    assert (check, where) == ("shards", LAST)
    assert "cannot be read" in detail and "\n" not in detail


@pytest.mark.parametrize("folder", ["routing", "tokens"])
@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_half_of_a_pair_is_missing(run, folder, number):
    name = shard_name(0, number)
    (run / folder / name).unlink()
    assert ("files", f"{folder}/{name}", "missing: the manifest lists it") in errors(run)


@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_a_whole_pair_is_missing(run):
    for folder in ("routing", "tokens"):
        (run / folder / LAST).unlink()
    found = errors(run)
    assert [(check, where) for check, where, _ in found] == [
        ("files", f"routing/{LAST}"),
        ("files", f"tokens/{LAST}"),
        ("totals", "run.json"),
        ("totals", "run.json"),
    ]
    assert found[2][2] == "rows: 60 in the manifest, 40 in the shards"


def test_a_run_without_close_is_whole_as_far_as_it_goes(run):
    reopen(run)
    assert errors(run) == []
    (where, detail) = warnings(run)[0]
    assert where == "run.json" and detail.startswith("not closed")
    assert "3 shard pairs: 60 rows" in details(run)["shards"]


def test_a_capture_killed_between_the_files_of_its_last_pair(run):
    reopen(run)
    (run / "routing" / LAST).unlink()
    assert errors(run) == []
    assert (f"routing/{LAST}", "missing: the capture stopped between the two files of its last "
            "pair") in warnings(run)  # fmt: skip


def test_half_a_pair_that_is_not_the_last_of_an_open_run(run):
    reopen(run)
    (run / "routing" / shard_name(0, 1)).unlink()
    assert only_error(run)[2] == "missing beside its other half"


def test_a_gap_in_the_numbers_of_an_open_run(run):
    reopen(run)
    for folder in ("routing", "tokens"):
        (run / folder / shard_name(0, 1)).unlink()
    _, where, detail = only_error(run)
    assert where == shard_name(0, 1)
    assert detail == "missing from both folders: shards of rank 0 go on to 00002"


def test_unfinished_and_foreign_files_are_named_and_no_error(run):
    (run / "routing" / f"{shard_name(0, 3)}.part").write_bytes(b"half")
    (run / "tokens" / "notes.txt").write_text("hello")
    (run / "notes.txt").write_text("hello")
    assert errors(run) == []
    assert dict(warnings(run)) == {
        f"routing/{shard_name(0, 3)}.part": "unfinished: its rows are not part of the run",
        "tokens/notes.txt": "not the name of a shard: it is not read",
        "notes.txt": "not part of a run: it is not read",
    }


def test_figures_and_replays_belong_to_a_run(run):
    for folder in ("figures", "replay"):
        (run / folder).mkdir()
        (run / folder / "file").write_bytes(b"")
    assert warnings(run) == []


def test_a_copied_pair_is_told_by_its_tokens(run):
    reopen(run)
    for folder in ("routing", "tokens"):
        shutil.copy(run / folder / shard_name(0, 1), run / folder / shard_name(0, 3))
    assert only_error(run) == (
        "rows",
        shard_name(0, 3),
        f"holds the same tokens as {shard_name(0, 1)}",
    )


@pytest.mark.parametrize("forward", [0, 100])
def test_shards_that_share_some_tokens(run, forward):
    """As of two captures into one folder; a position that another forward ran is no token twice."""
    reopen(run)
    for folder in ("routing", "tokens"):
        with pq.ParquetFile(run / folder / shard_name(0, 1)) as shard:
            groups = [shard.read_row_group(i) for i in range(shard.num_row_groups)]
        part = []
        for group in groups:
            some = group.filter(
                pc.and_(pc.equal(group["sequence"], 3), pc.less(group["position"], 4))
            )
            at = some.column_names.index("forward")
            later = pc.add(some["forward"], pa.scalar(forward, pa.uint32()))
            part.append(some.set_column(at, some.schema.field(at), later))
        write_shard(run / folder / shard_name(0, 3), part)
    shared = f"4 tokens are in {shard_name(0, 1)} too, sequence 3 position 0"
    assert errors(run) == ([] if forward else [("rows", shard_name(0, 3), shared)])


def test_which_shards_cross_is_as_one_by_one():
    rng = np.random.default_rng(0)
    for _ in range(50):
        spans = {}
        for name in "abcde":
            rows = [(s, *sorted(rng.integers(0, 40, 2))) for s in range(4) if rng.random() < 0.7]
            spans[name] = np.array(rows, np.int64).reshape(-1, 3)
        slow = {
            (b, a)
            for a, b in itertools.combinations("abcde", 2)
            for s, low, high in spans[a]
            for t, first, last in spans[b]
            if s == t and first <= high and low <= last
        }
        assert set(_crossing(spans)) == slow


def test_a_pair_that_the_closed_manifest_does_not_list(run):
    for folder in ("routing", "tokens"):
        shutil.copy(run / folder / LAST, run / folder / shard_name(0, 3))
    found = {where for _, where, _ in errors(run)}
    assert {f"routing/{shard_name(0, 3)}", f"tokens/{shard_name(0, 3)}"} <= found


@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_a_renamed_shard_of_another_rank(run):
    for folder in ("routing", "tokens"):
        (run / folder / LAST).rename(run / folder / shard_name(1, 0))
    reopen(run)
    found = errors(run)
    assert ("files", "run.rank00001.json", "missing: there are shards of rank 1") in found
    assert ("rows", shard_name(1, 0), "tokens: rows of rank [0], the name says 1") in found


def test_shards_of_two_pairs_swapped(run):
    first, second = (run / "tokens" / shard_name(0, n) for n in (0, 1))
    other = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(other)
    found = [detail for check, _, detail in errors(run) if check == "rows"]
    assert "layer 1: 10 rows for 10 tokens; sequence 0 position 0, tokens has sequence 2 " \
        "position 0" in found  # fmt: skip


def test_wrong_columns(run):
    edit_shard(run, lambda table: table.drop_columns(["weights"]))
    assert only_error(run)[2].endswith("no column 'weights'")


def test_a_column_of_another_type(run):
    edit_shard(
        run,
        lambda t: t.set_column(
            t.column_names.index("position"), "position", t["position"].cast(pa.int64())
        ),
    )
    assert only_error(run)[2].endswith("column 'position' is int64, expected uint32")


def test_logits_of_another_number_of_experts(run):
    def change(table):
        values = pa.array(np.zeros(table.num_rows * 16, np.float32))
        logits = pa.FixedSizeListArray.from_arrays(values, type=logits_type(16))
        return table.set_column(table.column_names.index("logits"), "logits", logits)

    edit_shard(run, change)
    assert "expected fixed_size_list<element: float not null>[8]" in only_error(run)[2]


def test_another_schema_version(run):
    edit_shard(run, lambda t: t.replace_schema_metadata({"bhlog.schema_version": "9"}))
    assert only_error(run) == ("shards", LAST, "schema version 9, expected 2")


def test_columns_beyond_the_schema_are_named(run):
    edit_shard(run, lambda t: t.append_column("mood", pa.nulls(len(t), pa.int8())))
    assert errors(run) == []
    assert (LAST, "columns that the schema does not have: mood") in warnings(run)


def test_several_layers_in_a_row_group(run):
    path = run / "routing" / LAST
    table = pq.read_table(path)
    write_shard(path, [table])
    assert "row group 0 holds several layers" in errors(run)[1][2]


def test_another_null_model_than_the_run_was_routed_by(run):
    normal_kde((1, 4, 5)).save(run / "kde.parquet")
    check, where, detail = only_error(run)
    assert (check, where) == ("null model", "kde.parquet")
    assert "not the null model that the run was routed by" in detail


def test_a_null_model_that_is_missing_or_broken(run):
    path = run / "kde.parquet"
    path.write_bytes(path.read_bytes()[:100])
    assert errors(run)[0][:2] == ("null model", "kde.parquet")
    path.unlink()
    assert only_error(run)[2] == "missing: the run was routed by it"


def test_totals_that_the_shards_do_not_have(run):
    totals = open_log(run).manifest.totals
    edit_manifest(run, totals=replace(totals, tokens=31, nonfinite=2))
    assert [detail for _, _, detail in errors(run)] == [
        "tokens: 31 in the manifest, 30 in the shards",
        "nonfinite: 2 in the manifest, 0 in the shards",
    ]


def test_a_shard_entry_that_its_files_do_not_have(run):
    entry, *others = open_log(run).manifest.shards
    edit_manifest(run, shards=(replace(entry, rows=21, bytes=entry.bytes + 1), *others))
    (first, _, size), (second, _, counts) = errors(run)
    assert (first, second) == ("files", "totals")
    assert size.endswith(f"the manifest says {entry.bytes + 1:,}")
    assert counts == "20 rows of 10 tokens, the manifest says 21 of 10"


def test_dropped_tokens_and_an_early_end_are_worth_knowing(run):
    totals = open_log(run).manifest.totals
    edit_manifest(run, totals=replace(totals, dropped=7), error="OSError: disk full")
    assert [detail for _, detail in warnings(run)] == [
        "the capture ended early: OSError: disk full",
        "7 tokens were dropped because the queue was full or writing had stopped",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"schema_version": 1})])
def test_a_cut_manifest_is_one_clear_error(run, text):
    (run / "run.json").write_text(text)
    with pytest.raises(CorruptManifest, match=r"run\.json: not a manifest of a bhlog run"):
        open_log(run)


def test_memory_and_files_stay_with_one_shard_at_a_time(run, monkeypatch):
    log = open_log(run)
    opened = []
    open_shard = log.open_shard
    monkeypatch.setattr(
        log, "open_shard", lambda *where: opened.append(where) or open_shard(*where)
    )
    verify(log)
    # a footer is read once for the schema, once for the rows: not once for every other shard
    assert len(opened) <= 3 * 3


def test_the_same_text_logged_by_two_ranks(tmp_path):
    """As by a tensor parallel model that each of its ranks logs."""
    run = write_run(tmp_path / "run", n_sequences=4, length=5, n_ranks=2, n_shards=2)
    assert errors(run) == []
    for folder in ("routing", "tokens"):
        table = pq.read_table(run / folder / shard_name(0, 0))
        at = table.column_names.index("rank")
        ranks = pa.array(np.ones(len(table), np.uint16))
        field = table.schema.field(at)
        again = table.set_column(at, field, ranks)
        write_shard(run / folder / shard_name(1, 0), [again])
    told = [f.detail for f in verify(open_log(run)) if f.where == "run.rank00001.json"]
    assert any("logged the same 10 tokens as rank 0" in detail for detail in told)
