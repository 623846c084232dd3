import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bhlog.capture.contract.manifest as module
from bhlog.capture.contract.errors import CorruptManifest, NewerLog, RouterLogError
from bhlog.capture.contract.manifest import (
    Manifest,
    ModelInfo,
    Routing,
    ShardEntry,
    Totals,
    manifest_name,
    merge_manifests,
)
from bhlog.capture.contract.rule import BhOptions

MODEL = ModelInfo(
    name="allenai/OLMoE-1B-7B",
    class_name="OlmoeForCausalLM",
    revision="abc",
    layers=(0, 1, 3),
    n_experts=64,
    top_k=8,
    norm_topk_prob=False,
)
MANIFEST = Manifest(
    run_id="0" * 32,
    created="2026-01-01T00:00:00+00:00",
    closed="2026-01-01T01:00:00+00:00",
    model=MODEL,
    routing=Routing("bh", BhOptions(alpha=0.3, max_k=16), "f" * 64),
    versions={"torch": "2"},
    totals=Totals(rows=6, tokens=2, shards=1, forwards=1),
    shards=(ShardEntry("rank00000-00000.parquet", 6, 2, 1000),),
    options={"text": ["a.txt"]},
)


def test_a_manifest_reads_back_as_it_was_written(tmp_path):
    MANIFEST.write(tmp_path)
    text = (tmp_path / "run.json").read_bytes()
    assert Manifest.from_json(text, "run.json") == MANIFEST
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@given(
    st.builds(
        replace,
        st.just(MANIFEST),
        closed=st.none() | st.just("2026-02-02T00:00:00+00:00"),
        routing=st.just(Routing()) | st.builds(Routing, st.just("bh"), st.builds(BhOptions)),
        sample_every=st.integers(1, 9),
        token_ids=st.booleans(),
        totals=st.builds(Totals, *[st.integers(0, 2**40)] * 7),
        error=st.none() | st.text(),
    )
)
def test_any_manifest_survives_json(manifest):
    assert Manifest.from_json(manifest.to_json(), "run.json") == manifest


def edited(change):
    data = json.loads(MANIFEST.to_json())
    del data["checksum"]  # so that what is tested is reached
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        MANIFEST.to_json()[:200],
        "[]",
        "null",
        b"\xff\xfe",
        edited(lambda d: d.pop("model")),
        edited(lambda d: d["model"].pop("layers")),
        edited(lambda d: d.update(unheard_of=1)),
        edited(lambda d: d["routing"]["options"].update(alpha=2)),
        edited(lambda d: d["routing"].update(options=None)),
        edited(lambda d: d["shards"][0].update(name="../../etc/passwd")),
        edited(lambda d: d.pop("schema_version")),
        edited(lambda d: d.update(schema_version="1")),
        edited(lambda d: d.update(options={"a": [{"deep": None}]}, versions={"torch": None})),
        "[" * 100_000,
    ],
)
def test_what_is_no_manifest_is_one_line(text):
    with pytest.raises(CorruptManifest, match=r"^RUN/run\.json: not a manifest") as error:
        Manifest.from_json(text, "RUN/run.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(created=5), r"Expected `str`, got `int` - at `\$.created`"),
        (lambda d: d["model"].update(top_k=0), r"`int` >= 1 - at `\$.model.top_k`"),
        (lambda d: d["model"].update(top_k="8"), r"got `str` - at `\$.model.top_k`"),
        (lambda d: d["model"].update(top_k=65), "top_k is 65 of 64 experts"),
        (lambda d: d["model"].update(n_experts=2**16), r"at `\$.model.n_experts`"),
        (lambda d: d["model"].update(layers=[]), r"length >= 1 - at `\$.model.layers`"),
        (lambda d: d["model"].update(layers=[3, 1]), "do not rise"),
        (lambda d: d["model"].update(layers=[0, -1]), r"at `\$.model.layers\[1\]`"),
        (lambda d: d["model"].update(norm_topk_prob=0), r"Expected `bool`, got `int`"),
        (
            lambda d: d["routing"].update(kde_sha256=1.5),
            r"got `float` - at `\$.routing.kde_sha256`",
        ),
        (lambda d: d["routing"].update(kde_sha256="f"), r"at `\$.routing.kde_sha256`"),
        (lambda d: d["routing"]["options"].update(min_k=1.5), r"at `\$.routing.options.min_k`"),
        (lambda d: d["routing"]["options"].update(max_k=65), "the model has 64 experts"),
        (lambda d: d["routing"]["options"].update(alpha=float("nan")), "JSON is malformed"),
        (lambda d: d["routing"]["options"].update(renormalize="yes"), r"options.renormalize"),
        (lambda d: d["totals"].update(rows=-1), r"`int` >= 0 - at `\$.totals.rows`"),
        (lambda d: d["totals"].update(rows=2**53), r"at `\$.totals.rows`"),
        (lambda d: d["shards"][0].update(bytes=True), r"got `bool` - at `\$.shards\[0\].bytes`"),
        (lambda d: d["shards"].append(d["shards"][0]), "a shard is listed twice"),
        (lambda d: d.update(sample_every=0), r"at `\$.sample_every`"),
        (lambda d: d.update(created="yesterday"), "yesterday"),
        (lambda d: d.update(closed="2026-01-01T00:00:00"), "does not say its time zone"),
        (lambda d: d.update(versions={"torch": 2}), r"at `\$.versions\[...\]`"),
        (lambda d: d["model"].update(experts=1), "unknown field `experts`"),
        (lambda d: d["shards"][0].update(sum=1), "unknown field `sum`"),
    ],
)
def test_a_field_of_another_type_or_an_impossible_number_is_named(change, message):
    with pytest.raises(CorruptManifest, match=rf"^RUN/run\.json: not a manifest .*{message}"):
        Manifest.from_json(edited(change), "RUN/run.json")


def test_a_manifest_that_was_changed_does_not_have_its_checksum():
    text = MANIFEST.to_json()
    changed = text.replace('"n_experts": 64', '"n_experts": 65')
    assert changed != text and json.loads(text)["checksum"]
    with pytest.raises(CorruptManifest, match="does not have its checksum"):
        Manifest.from_json(changed, "run.json")
    with pytest.raises(CorruptManifest, match="unknown field `checkstm`"):
        Manifest.from_json(text.replace('"checksum"', '"checkstm"'), "run.json")


def test_a_manifest_without_end_is_not_decoded(monkeypatch):
    monkeypatch.setattr(module, "MOST_MANIFEST_BYTES", 1 << 20)
    with pytest.raises(CorruptManifest, match="larger than 1 MiB"):
        Manifest.from_json(MANIFEST.to_json() + " " * (1 << 20), "run.json")


def test_a_newer_version_reads_and_a_newer_major_version_is_refused_by_name():
    newer = edited(lambda d: d.update(schema_version=9, mood=1) or d["model"].update(hue=2))
    assert Manifest.from_json(newer, "run.json") == replace(MANIFEST, schema_version=9)
    major = edited(lambda d: d.update(schema_version=9, schema_major=2, totals="gone"))
    with pytest.raises(NewerLog, match=r"^RUN/run.json: a log of major version 2; .* version 1"):
        Manifest.from_json(major, "RUN/run.json")


def test_a_manifest_of_version_1_reads_with_what_came_later_at_its_default():
    def first(data):
        for name in ("logits", "schema_major"):
            del data[name]
        data["schema_version"] = 1
        del data["totals"]["rejected"]

    found = Manifest.from_json(edited(first), "run.json")
    assert found == replace(MANIFEST, schema_version=1)
    assert found.logits


@pytest.mark.parametrize(
    "kind, options", [("bh", None), ("native", BhOptions()), ("top", None), ("minp", BhOptions())]
)
def test_routing_options_go_with_their_policy(kind, options):
    with pytest.raises(RouterLogError, match=kind):
        Routing(kind, options)


def test_ranks_add_up():
    other = replace(
        MANIFEST,
        closed="2026-01-01T02:00:00+00:00",
        totals=Totals(rows=3, tokens=1, shards=1, forwards=1, dropped=2),
        shards=(ShardEntry("rank00001-00000.parquet", 3, 1, 500),),
    )
    merged = merge_manifests([MANIFEST, other])
    assert merged.totals == Totals(rows=9, tokens=3, shards=2, forwards=2, dropped=2)
    assert [s.name for s in merged.shards] == [
        "rank00000-00000.parquet",
        "rank00001-00000.parquet",
    ]
    assert merged.closed == "2026-01-01T02:00:00+00:00"
    assert merge_manifests([MANIFEST, replace(other, closed=None)]).closed is None
    assert merge_manifests([MANIFEST, replace(other, error="disk full")]).error == "disk full"


def test_each_rank_has_a_file_of_its_own():
    assert [manifest_name(rank) for rank in (0, 1, 12)] == [
        "run.json",
        "run.rank00001.json",
        "run.rank00012.json",
    ]
