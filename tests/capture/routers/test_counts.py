"""Every policy that a model is routed by, against its definition row by row and against replay."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from bhlog.analysis.replay.registry import parse_policy
from bhlog.analysis.replay.rows import Rows
from bhlog.analysis.run import open_log
from bhlog.analysis.verify.replayed import verify_replay
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.named import ROUTED, TopK, parse
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.observe import route
from bhlog.capture.routers.counts import counter, most_experts, ranks_that_pass
from bhlog.capture.routers.routing import _last_rank, finite_keys
from tests.capture.tiny import EXPERTS, LAYERS, TOP_K, batch, tiny_model
from tests.synthetic import normal_kde

KDE = normal_kde(range(LAYERS))
BY_LOGIT = ["topk:1", "topk:5", "minp:0.2", "minp:0.97", "minp:1"]
BY_PROBABILITY = ["threshold:0.04", "threshold:0.3", "topp:0.5", "topp:0.93", "topp:1", "entropy:5"]
EVERY = ["bh:0.3", "by:0.6", "topk:3", "threshold:0.1", "topp:0.7", "minp:0.2", "entropy:5"]


def logits_of_many_kinds(n_experts: int) -> np.ndarray:
    """(T, E) float32: rows on a grid as bfloat16's, ties, and values that are not finite."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(3000, n_experts)).astype(np.float32)
    rows[:1000] = np.round(rows[:1000] * 16) / 16
    rows[1000:1100, ::3] = np.nan
    rows[1100:1150, 0] = np.inf
    rows[1150:1200] *= 40
    return rows


def defined(text: str, row: np.ndarray) -> int:
    """How many experts a policy takes of one row, from its definition."""
    policy = parse(text, ROUTED)
    finite = sorted((x for x in row if np.isfinite(x)), reverse=True)
    if policy.name == "topk":
        return int(policy.value)
    if policy.name == "minp":
        cut = finite[0] + np.float32(math.log(policy.value))
        return sum(x >= cut for x in finite)
    total = math.fsum(math.exp(float(x) - float(finite[0])) for x in finite)
    q = [math.exp(float(x) - float(finite[0])) / total for x in finite]
    if policy.name == "threshold":
        return sum(x >= policy.value for x in q)
    if policy.name == "entropy":
        entropy = -math.fsum(x * math.log(x) for x in q if x > 0)
        return max(1, math.ceil(policy.value * entropy / math.log(len(row))))
    return next((k for k in range(1, len(q)) if math.fsum(q[:k]) >= policy.value), len(q))


@pytest.mark.parametrize("text", BY_LOGIT + BY_PROBABILITY)
@pytest.mark.parametrize("n_experts", [7, 64])
def test_torch_counts_as_defined_and_as_replay_does(text, n_experts):
    logits = logits_of_many_kinds(n_experts)
    keys = finite_keys(torch.from_numpy(logits)).sort(dim=-1, descending=True).values
    count = counter(parse(text, ROUTED))(keys).numpy()
    rows = Rows(logits)
    policy = parse_policy(text)
    replayed = policy.count(rows)
    sure = ~policy.unsure(rows)
    assert np.array_equal(count[sure], replayed[sure])
    if text in BY_LOGIT:
        assert sure.all()
    if text != "topp:1":  # the whole of it is a boundary
        assert sure.mean() > 0.99
        slow = [defined(text, row) for row in logits[::7]]
        assert np.array_equal(count[::7][sure[::7]], np.array(slow)[sure[::7]])
    assert (count <= most_experts(parse(text, ROUTED), n_experts)).all()


def test_rows_on_a_boundary_are_said_to_be_unsure():
    rows = Rows(np.zeros((1, 8), dtype=np.float32))  # a probability of 1/8 each
    assert parse_policy("threshold:0.125").unsure(rows).all()
    assert parse_policy("topp:0.5").unsure(rows).all()
    assert not parse_policy("threshold:0.12").unsure(rows).any()
    assert not parse_policy("topp:0.51").unsure(rows).any()


def test_thresholds_stand_for_topk_in_the_kernel():
    keys = finite_keys(torch.from_numpy(logits_of_many_kinds(7)))
    falling = keys.sort(dim=-1, descending=True).values
    passes = falling >= ranks_that_pass(TopK(3), 7)
    assert torch.equal(_last_rank(passes), counter(TopK(3))(falling))


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A run by each policy."""
    model, folder = tiny_model(), tmp_path_factory.mktemp("runs")
    ids, mask = batch([40, 23, 9], left=True)
    for text in EVERY:
        kde = KDE if text.startswith("b") else None
        with torch.no_grad(), route(model, folder / text, policy=text, kde=kde, max_k=6):
            model(ids, attention_mask=mask)
    return folder


@pytest.mark.parametrize("text", EVERY)
def test_a_run_by_any_policy_replays_as_it_was(routed, text):
    run = open_log(routed / text)
    table = verify_replay(run)
    assert table["rows"].sum() == LAYERS * 72 and table["mismatches"].sum() == 0
    rows = run.sql("SELECT n_selected, n_rejected FROM routing").pl()
    assert rows["n_selected"].n_unique() > 1 or text.startswith("topk")
    assert rows["n_rejected"].is_null().all() == (text not in ("bh:0.3", "by:0.6"))
    manifest = run.manifest
    assert manifest.routing.kind == text.partition(":")[0]
    policy, alpha = run.sql("SELECT policy, alpha FROM runs").fetchall()[0]
    assert policy == text and alpha == {"bh:0.3": 0.3, "by:0.6": 0.6}.get(text)
    assert {*run.verify()["status"]} == {"ok"}


@pytest.mark.parametrize(
    "text, backend",
    [(text, "aot_eager") for text in EVERY[1:]]
    + [pytest.param(text, "inductor", marks=pytest.mark.slow) for text in EVERY[3:]],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
def test_whole_graphs_decide_by_any_policy(tmp_path, text, backend):
    model, (ids, mask) = tiny_model(), batch([9, 4, 6], left=True)
    torch._dynamo.reset()
    kde = KDE if text.startswith("b") else None
    with torch.no_grad(), route(model, tmp_path / "run", policy=text, kde=kde):
        torch.compile(model, backend=backend, fullgraph=True)(ids, attention_mask=mask)
    torch._dynamo.reset()
    table = verify_replay(open_log(tmp_path / "run"))
    assert table["rows"].sum() == LAYERS * 19 and table["mismatches"].sum() == 0


def test_topk_of_the_models_own_k_is_what_the_model_does():
    model, (ids, mask) = tiny_model(), batch([9, 4, 6], left=True)
    with torch.no_grad():
        own = model(ids, attention_mask=mask).logits
        with route(model, policy=f"topk:{TOP_K}"):
            routed = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(own[mask == 1], routed[mask == 1])


def test_slots_are_no_more_than_a_policy_can_fill():
    from bhlog.capture.routers.search import find_routers
    from bhlog.capture.routers.steering import Steering

    router = find_routers(tiny_model())[0]
    for text, most in (
        ("topk:3", 3),
        ("threshold:0.3", 3),
        ("minp:0.2", 8),
        ("topk:1,min_k=4", 4),
        ("entropy:2.5", 3),
    ):
        assert Steering.of(router, BhOptions.of(text), None, skip=True).max_k == most


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"policy": "storey:0.3"}, InvalidOption, "no policy 'storey'.*bh, by, lfdr, topk"),
        ({"policy": "mnp:0.3"}, InvalidOption, "did you mean 'minp'"),
        ({"policy": "minp:0.3", "alpha": 0.1}, InvalidOption, "leave alpha out"),
        ({"policy": "minp:0.3", "kde": KDE}, InvalidOption, "minp:0.3 uses no null model"),
        ({"policy": "minp:0.3", "p_values": "empirical"}, InvalidOption, "tests no p-values"),
        ({"policy": f"topk:{EXPERTS + 1}"}, InvalidOption, "but the model has 8 experts"),
        ({"policy": "by:0.3"}, KdeMismatch, "needs a null model"),
        ({"policy": "minp"}, InvalidOption, "t is missing, as in minp:0.2"),
    ],
)
def test_what_cannot_be_routed_by_is_refused(given, error, words):
    with pytest.raises(error, match=words), route(tiny_model(), **given):
        pass


def test_a_policys_own_bounds_go_first_and_bh_is_bh():
    assert BhOptions.of("minp:0.2,max_k=3", max_k=5, min_k=2) == BhOptions(
        policy="minp:0.2", min_k=2, max_k=3
    )
    assert BhOptions.of("bh:0.3,max_k=3") == BhOptions(0.3, max_k=3)


def test_looser_policies_take_more_experts(routed):
    model, means = tiny_model(), []
    ids, mask = batch([40, 23, 9], left=True)
    for t in (0.9, 0.5, 0.1):
        with torch.no_grad(), route(model, routed / f"t{t}", policy=f"minp:{t}"):
            model(ids, attention_mask=mask)
        means.append(open_log(routed / f"t{t}").sql("SELECT avg(n_selected) FROM routing"))
    means = [mean.fetchall()[0][0] for mean in means]
    assert all(a < b for a, b in pairwise(means))
