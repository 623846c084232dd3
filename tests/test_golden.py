"""A run of each schema version, kept as files: what old logs hold must read the same for ever.

Their rows are the same, but for the columns that a version added. `python -m tests.test_golden`
writes the run of a version that is new; those of earlier versions are never written again.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bhlog.analysis.log import Log
from bhlog.analysis.replay.comparison import replay
from bhlog.analysis.replay.settings import settings_of
from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify, verify_decisions
from bhlog.capture.contract.null.histogram import Histogram
from bhlog.capture.contract.null.model import KdeModel, LayerNull, NullCurve
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.contract.schema import SCHEMA_VERSION
from tests.synthetic import normal_logits, write_run

DATA = Path(__file__).parent / "data"
VERSIONS = range(1, SCHEMA_VERSION + 1)
SAMPLE_IDS = ["q-1", "q-2", None, "q 4"]
LAYERS, E = (0, 3), 8

THRESHOLDS = [1.25, 1.0, 0.875, 0.75, 0.6875, 0.625, 0.5625, 0.5]
TOKEN_IDS = [119, 113, 110, 104, 105, 98, 119, 101, 99, 119, 97, 111]
EXPERTS = {
    0: [
        [7, 2, 3],
        [6, 0, 1, 2],
        [2, 1],
        [4, 1, 3, 6],
        [4, 5, 6, 1],
        [2, 6, 4],
        [5, 0, 1],
        [4, 2],
        [6, 2],
        [0, 2, 4],
        [7, 2],
        [6],
    ],
    3: [
        [0, 6, 4],
        [4, 0],
        [1, 7],
        [5, 3, 4],
        [4, 1],
        [6, 7, 1],
        [4, 5],
        [1, 5],
        [2, 3, 7, 6],
        [1, 0],
        [1, 3, 7, 5],
        [5, 1, 4],
    ],
}
N_REJECTED = {0: [3, 5, 2, 4, 4, 3, 3, 2, 2, 3, 2, 1], 3: [3, 2, 2, 3, 2, 3, 2, 2, 4, 2, 4, 3]}
FIRST_WEIGHTS = {
    0: [
        0.5779,
        0.2983,
        0.737,
        0.6524,
        0.3434,
        0.8799,
        0.6266,
        0.5519,
        0.5747,
        0.4664,
        0.5365,
        0.468,
    ],
    3: [
        0.4114,
        0.8205,
        0.6492,
        0.9544,
        0.6497,
        0.466,
        0.7202,
        0.6771,
        0.422,
        0.5325,
        0.3639,
        0.6695,
    ],
}
REPLAYED_MEAN = {0.0625: 2.3333333333333335, 0.5: 2.7916666666666665}


def null(layer: int) -> LayerNull:
    """A pooled null on 33 points with a dyadic tail, which every machine computes alike."""
    curve = NullCurve(
        expert=None,
        n=64,
        x0=-1.0,
        dx=0.25,
        tail=np.minimum(1.0, 2.0 ** -np.arange(33.0) * 16),
        histogram=Histogram.of(np.arange(-32, 32, dtype=np.float32) / 4096 + layer),
        kernel="gaussian",
        bandwidth=0.25,
        rule="fixed",
        source=("golden",),
    )
    return LayerNull(layer, (curve,))


def write_golden(folder: Path) -> None:
    """Two shard pairs of two sequences of three tokens, with ties, a NaN and an infinity."""
    logits = normal_logits(np.random.default_rng(1), 2 * 2 * 6, E).reshape(2, 2, 6, E)
    logits[0, 0, 1, :4] = 1.5
    logits[0, 1, 2, 7] = np.nan
    logits[1, 0, 3, 0] = np.inf
    write_run(
        folder,
        layers=LAYERS,
        n_experts=E,
        n_sequences=4,
        length=3,
        top_k=2,
        options=BhOptions(alpha=0.25, min_k=1, max_k=4),
        kde=KdeModel({layer: null(layer) for layer in LAYERS}),
        decode_from=2,
        logits=logits,
        sample_ids=SAMPLE_IDS,
        sealed=True,
    )


@pytest.fixture(scope="module", params=VERSIONS)
def log(request) -> Log:
    return open_log(DATA / f"golden_v{request.param}")


def read(log: Log, layer: int) -> pa.Table:
    columns = ["sequence", "position", "logits", "experts", "weights", "n_selected", "n_rejected"]
    return pa.Table.from_batches(log.batches(columns, layers=[layer]))


def test_it_verifies(log):
    findings = [*verify(log), *verify_decisions(log)]
    assert {f.status for f in findings} == {"ok"}


def test_its_manifest_reads(log):
    manifest = log.manifest
    assert f"golden_v{manifest.schema_version}" == log.name
    assert manifest.logits
    assert manifest.model.layers == LAYERS
    assert manifest.routing.options == BhOptions(alpha=0.25, min_k=1, max_k=4)
    assert (manifest.totals.rows, manifest.totals.tokens, manifest.totals.nonfinite) == (24, 12, 2)


def test_its_null_model_reads_and_gives_the_same_thresholds(log):
    assert log.kde is not None and log.kde.pooled and tuple(log.kde) == LAYERS
    curve = log.kde[3].curves[0]
    assert (curve.n, curve.bandwidth, curve.source) == (64, 0.25, ("golden",))
    assert curve.histogram is not None and curve.histogram.n == 64
    assert curve.p_value(np.array([-9.0, 0.0, 0.125, 3.0, 9.0])).tolist() == [
        1.0, 1.0, 0.75, 2.0**-12, 0.0
    ]  # fmt: skip
    assert log.kde[3].thresholds(0.25, 8).tolist() == THRESHOLDS


def test_its_tokens_read(log):
    tokens = log.tokens()
    assert tokens["sequence"].to_pylist() == [s for s in range(4) for _ in range(3)]
    assert tokens["position"].to_pylist() == [0, 1, 2] * 4
    assert tokens["phase"].to_pylist() == ["prefill", "prefill", "decode"] * 4
    assert tokens["source"].to_pylist() == [s for s in ("docs", "code") * 2 for _ in range(3)]
    assert tokens["nll"].null_count == 4
    assert tokens["token_id"].to_pylist() == TOKEN_IDS


def test_its_sample_ids_read_and_are_null_before_version_2(log):
    ids = SAMPLE_IDS if log.manifest.schema_version > 1 else [None] * 4
    assert log.tokens()["sample_id"].to_pylist() == [s for s in ids for _ in range(3)]
    query = "SELECT sequence, any_value(sample_id) FROM tokens GROUP BY ALL ORDER BY ALL"
    assert log.sql(query).fetchall() == list(enumerate(ids))


@pytest.mark.parametrize("layer", LAYERS)
def test_its_decisions_are_as_they_were(log, layer):
    rows = read(log, layer)
    assert rows["experts"].to_pylist() == EXPERTS[layer]
    assert rows["n_rejected"].to_pylist() == N_REJECTED[layer]
    assert rows["n_selected"].to_pylist() == [len(experts) for experts in EXPERTS[layer]]
    assert [round(float(w[0]), 4) for w in rows["weights"].to_pylist()] == FIRST_WEIGHTS[layer]


def test_its_odd_logits_are_there(log):
    first, second = (np.array(read(log, layer)["logits"].to_pylist()) for layer in LAYERS)
    assert np.isnan(first[8, 7]) and np.isnan(first).sum() == 1
    assert np.isposinf(second[3, 0]) and np.isinf(second).sum() == 1


@pytest.mark.parametrize("alpha", sorted(REPLAYED_MEAN))
def test_a_replay_at_another_alpha_is_as_it_was(log, alpha):
    frame = replay(log, settings_of(log, [alpha]))
    overall = frame.filter(frame["layer"].is_null())
    assert overall["mean_experts"].to_list() == [REPLAYED_MEAN[alpha]]


if __name__ == "__main__":
    write_golden(DATA / f"golden_v{SCHEMA_VERSION}")
