import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bhlog.capture.contract.errors import CorruptManifest, RouterLogError
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
    ],
)
def test_what_is_no_manifest_is_one_line(text):
    with pytest.raises(CorruptManifest, match=r"^RUN/run\.json: not a manifest") as error:
        Manifest.from_json(text, "RUN/run.json")
    assert "\n" not in str(error.value)


def test_another_schema_version_names_both():
    text = edited(lambda d: d.update(schema_version=2))
    with pytest.raises(CorruptManifest, match="schema version 2; this bhlog reads version 1"):
        Manifest.from_json(text, "run.json")


@pytest.mark.parametrize("kind, options", [("bh", None), ("native", BhOptions()), ("top", None)])
def test_routing_options_go_with_bh_alone(kind, options):
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
