"""Each kind of damage, on the smallest run that shows it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.log import open_log
from analysis.verification import verify, verify_decisions
from capture.bh import BhOptions
from capture.errors import CorruptManifest
from capture.manifest import Manifest
from capture.schema import logits_type, shard_name
from capture.shard import write_shard
from tests.synthetic import normal_kde, normal_logits, write_run

LAYERS, E = (1, 4), 8
LAST = shard_name(0, 2)


@pytest.fixture
def run(tmp_path):
    """Three pairs of two sequences of five tokens, routed by BH."""
    return write_run(
        tmp_path / "run",
        layers=LAYERS,
        n_experts=E,
        n_sequences=6,
        length=5,
        n_shards=3,
        options=BhOptions(alpha=0.3, max_k=4),
        kde=normal_kde(LAYERS),
    )


def errors(run):
    return [(f.check, f.where, f.detail) for f in verify(open_log(run)) if f.status == "error"]


def only_error(run):
    found = errors(run)
    assert len(found) == 1, found
    return found[0]


def warnings(run):
    return [(f.where, f.detail) for f in verify(open_log(run)) if f.status == "warning"]


def details(run):
    return {f.check: f.detail for f in verify(open_log(run))}


def edit_manifest(run, **changes):
    manifest = Manifest.from_json((run / "run.json").read_bytes(), "run.json")
    replace(manifest, **changes).write(run)


def reopen(run):
    """Make the run look as if its capture had been killed."""
    edit_manifest(run, closed=None, shards=(), totals=type(open_log(run).manifest.totals)())


def edit_shard(run, change, *, folder="routing", name=LAST, keep_manifest=False):
    """Rewrite a shard with change(table) in its place, and its size in the manifest."""
    path = run / folder / name
    table = change(pq.read_table(path))
    groups = [table]
    if folder == "routing" and "layer" in table.column_names:
        layers = np.asarray(table["layer"])
        groups = [table.filter(pa.array(layers == layer)) for layer in np.unique(layers)]
    write_shard(path, groups)
    if not keep_manifest:
        entries = tuple(
            replace(s, bytes=sum((run / f / s.name).stat().st_size for f in ("routing", "tokens")))
            for s in open_log(run).manifest.shards
        )
        edit_manifest(run, shards=entries)


def with_column(name, values):
    def change(table):
        at = table.column_names.index(name)
        field = table.schema.field(name)
        new = values(table[name]) if callable(values) else values
        return table.set_column(at, field, pa.chunked_array([pa.array(new, type=field.type)]))

    return change


def edited(change_list):
    """Values of a column as a Python list, changed in place."""

    def values(column):
        items = column.to_pylist()
        change_list(items)
        return items

    return values


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
def test_half_of_a_pair_is_missing(run, folder, number):
    name = shard_name(0, number)
    (run / folder / name).unlink()
    assert ("files", f"{folder}/{name}", "missing: the manifest lists it") in errors(run)


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


def test_a_pair_that_the_closed_manifest_does_not_list(run):
    for folder in ("routing", "tokens"):
        shutil.copy(run / folder / LAST, run / folder / shard_name(0, 3))
    found = {where for _, where, _ in errors(run)}
    assert {f"routing/{shard_name(0, 3)}", f"tokens/{shard_name(0, 3)}"} <= found


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
    edit_shard(run, lambda t: t.replace_schema_metadata({"bhlog.schema_version": "2"}))
    assert only_error(run) == ("shards", LAST, "schema version 2, expected 1")


def test_columns_beyond_the_schema_are_named(run):
    edit_shard(run, lambda t: t.append_column("mood", pa.nulls(len(t), pa.int8())))
    assert errors(run) == []
    assert (LAST, "columns that the schema does not have: mood") in warnings(run)


def test_several_layers_in_a_row_group(run):
    path = run / "routing" / LAST
    table = pq.read_table(path)
    write_shard(path, [table])
    assert "row group 0 holds several layers" in errors(run)[1][2]


def test_a_layer_is_missing(run):
    edit_shard(run, lambda t: t.filter(pa.array(np.asarray(t["layer"]) == 1)))
    assert ("rows", LAST, "layers 1; the manifest says 1, 4") in errors(run)


def test_a_token_is_missing_at_one_layer(run):
    edit_shard(run, lambda t: t.slice(0, t.num_rows - 1))
    assert (
        "rows",
        LAST,
        "layer 4: 9 rows for 10 tokens; no more rows, tokens has sequence 5 position 4",
    ) in errors(run)


def test_rows_in_another_order_are_no_error(run):
    edit_shard(run, lambda t: t.take(pa.array(np.arange(t.num_rows)[::-1])))
    assert errors(run) == []


def test_a_token_that_is_there_twice(run):
    def twice(table):
        return pa.concat_tables([table, table.slice(0, 1)])

    edit_shard(run, twice, folder="tokens")
    assert ("rows", LAST, "tokens: sequence 4 position 0 is there twice") in errors(run)


def test_a_position_run_in_two_forwards_is_worth_knowing(tmp_path):
    run = write_run(tmp_path / "run", layers=(0,), n_experts=E, n_sequences=1, length=4, n_shards=1)
    name = shard_name(0, 0)
    for folder in ("routing", "tokens"):
        edit_shard(run, with_column("position", [0, 1, 1, 2]), folder=folder, name=name)
        edit_shard(run, with_column("forward", [0, 0, 1, 1]), folder=folder, name=name)
    assert errors(run) == []
    assert warnings(run) == [(name, "1 positions of a sequence were run more than once")]


@pytest.mark.parametrize("column, value", [("forward", 9), ("token_id", 5)])
def test_routing_and_tokens_disagree_on_a_token(run, column, value):
    def change(items):
        items[3] = value

    edit_shard(run, with_column(column, edited(change)), folder="tokens")
    found = errors(run)
    assert len(found) == 2  # one a layer
    assert f"sequence 4 position 3: {column} " in found[0][2]
    assert found[0][2].endswith(f"tokens says {value}")


def test_an_unknown_phase(run):
    edit_shard(run, with_column("phase", lambda c: ["dreaming"] * len(c)), folder="tokens")
    assert ("rows", LAST, "tokens: unknown phase 'dreaming'") in errors(run)


def test_token_ids_that_were_to_be_withheld(run):
    edit_manifest(run, token_ids=False)
    assert (
        "rows",
        LAST,
        "tokens: has token ids, the manifest says they are withheld",
    ) in errors(run)


def rows_error(run, column, change):
    edit_shard(run, with_column(column, edited(change)))
    check, where, detail = only_error(run)
    assert (check, where) == ("rows", LAST)
    return detail


def row_with(run, n):
    """The first row of the last shard's first layer with n experts or more."""
    table = pq.read_table(run / "routing" / LAST).slice(0, 10)
    return int(np.argmax(np.asarray(table["n_selected"]) >= n))


def test_an_expert_that_the_model_does_not_have(run):
    row = row_with(run, 2)

    def change(experts):
        experts[row][-1] = E

    assert rows_error(run, "experts", change) == (
        f"layer 1: sequence {4 + row // 5} position {row % 5}: an expert is not below 8 "
        "(1 such rows)"
    )


def test_an_expert_twice_in_a_row(run):
    row = row_with(run, 2)

    def change(experts):
        experts[row][1] = experts[row][0]

    assert "an expert is there twice" in rows_error(run, "experts", change)


def test_experts_out_of_order(run):
    row = row_with(run, 2)

    def change(experts):
        experts[row].reverse()

    assert "experts are not in order of falling logit" in rows_error(run, "experts", change)


def test_weights_of_another_number(run):
    def change(weights):
        weights[0].append(0.5)

    assert "experts and weights differ in number" in rows_error(run, "weights", change)


def test_n_selected_is_the_number_of_experts(run):
    def change(n):
        n[0] += 1

    edit_shard(run, with_column("n_selected", edited(change)))
    assert "n_selected is not the number of experts" in errors(run)[0][2]


def test_n_selected_is_n_rejected_within_the_bounds(run):
    def change(n):
        n[0] = 0 if n[0] > 1 else 3

    assert "n_selected is not n_rejected within [1, 4]" in rows_error(run, "n_rejected", change)


def test_n_rejected_goes_with_bh_routing(run, tmp_path):
    edit_shard(run, with_column("n_rejected", lambda c: [None] * len(c)))
    assert "no n_rejected under BH routing" in errors(run)[0][2]
    native = write_run(tmp_path / "native", n_sequences=4, length=5)
    edit_shard(native, with_column("n_rejected", lambda c: [1] * len(c)), name=shard_name(0, 1))
    assert "n_rejected under native routing, expected null" in errors(native)[0][2]


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
        "7 tokens were dropped because the queue was full",
    ]


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"schema_version": 1})])
def test_a_cut_manifest_is_one_clear_error(run, text):
    (run / "run.json").write_text(text)
    with pytest.raises(CorruptManifest, match=r"run\.json: not a manifest of a bhlog run"):
        open_log(run)


def test_replay_finds_a_decision_that_the_rule_did_not_make(run):
    assert {f.status for f in verify_decisions(open_log(run))} == {"ok"}
    row = row_with(run, 2)

    def fewer(items):
        items[row] = items[row][:-1] if isinstance(items[row], list) else items[row] - 1

    for column in ("experts", "weights", "n_selected", "n_rejected"):
        edit_shard(run, with_column(column, edited(fewer)))
    assert errors(run) == []
    wrong = [f for f in verify_decisions(open_log(run)) if f.status == "error"]
    assert len(wrong) == 1
    assert wrong[0].where == "layer 1"
    assert wrong[0].detail.startswith("30 rows replayed, 1 disagree, first at rank 0 sequence")


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
