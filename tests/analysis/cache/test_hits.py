import itertools
import json
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from bhlog.analysis.cache.hits import CACHES, Budget, cache_hits
from bhlog.analysis.cache.touches import Touches
from bhlog.analysis.cli import main
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.rule import BhOptions
from tests.analysis.replay import slow
from tests.synthetic import normal_kde, write_run

LAYERS, E, TOP_K = (1, 4), 8, 2


# Plain caches: each takes steps, lists of items looked up together, and gives the hits of each.


def lru(steps, sizes, capacity):
    held, hits = OrderedDict(), []
    for step in steps:
        hits.append(sum(item in held for item in step))
        for item in sorted(step):
            held[item] = None
            held.move_to_end(item)
        while sum(sizes[item] for item in held) > capacity:  # the step's own are the last
            held.popitem(last=False)
    return hits


def lfu(steps, sizes, capacity):
    held, count, last, hits = set(), Counter(), {}, []
    for now, step in enumerate(steps):
        hits.append(len(held & set(step)))
        held |= set(step)
        for item in step:
            count[item] += 1
            last[item] = now
        while sum(sizes[item] for item in held) > capacity:
            held.remove(min(held, key=lambda x: (x in step, count[x], last[x], x)))
    return hits


def belady(steps, sizes, capacity):
    held, hits = set(), []
    for now, step in enumerate(steps):
        hits.append(len(held & set(step)))
        held |= set(step)

        def wait(item, now=now):
            ahead = (t for t in range(now + 1, len(steps)) if item in steps[t])
            return next(ahead, len(steps))

        while sum(sizes[item] for item in held) > capacity:
            held.remove(min(held, key=lambda x: (x in step, -wait(x), x)))
    return hits


def pinned(steps, sizes, capacity):
    count = Counter(item for step in steps for item in step)
    held, free = set(), capacity
    for item in sorted(sizes, key=lambda x: (-count[x], x)):
        if sizes[item] <= free:
            held.add(item)
            free -= sizes[item]
    return [len(held & set(step)) for step in steps]


PLAIN = {"lru": lru, "lfu": lfu, "belady": belady, "pinned": pinned}


def most_hits(steps, capacity, held=frozenset()):
    """The most that any choice of what stays can hit, by trying all of them."""
    if not steps:
        return 0
    step = frozenset(steps[0])
    everything = held | step
    others = everything - step
    free = capacity - len(step)
    if free >= 0:
        stays = [
            step | set(kept) for kept in itertools.combinations(others, min(free, len(others)))
        ]
    else:
        stays = [frozenset(kept) for kept in itertools.combinations(step, capacity)]
    return len(held & step) + max(most_hits(steps[1:], capacity, frozenset(s)) for s in stays)


def random_steps(rng, n, *, widest):
    """(layer, decode, experts) of each step; layers in turn, some steps empty."""
    popular = rng.dirichlet(np.full(E, 0.7), len(LAYERS))
    steps = []
    for i in range(n):
        layer = i % len(LAYERS)
        some = rng.choice(
            E, rng.integers(0, widest + 1), p=(popular[layer] + 0.01) / (1 + 0.01 * E)
        )
        steps.append((LAYERS[layer], int(rng.integers(2)), sorted({*some.tolist()})))
    return steps


def touches_of(steps):
    return Touches(
        np.array([layer for layer, _, _ in steps], dtype=np.int64),
        np.array([decode for _, decode, _ in steps], dtype=np.int64),
        np.cumsum([0, *(len(experts) for _, _, experts in steps)]).astype(np.int64),
        np.array([e for _, _, experts in steps for e in experts], dtype=np.int64),
    )


def plain_counts(steps, budget, cache, sizes):
    """(2, 2) lookups and hits of prefill and of decode, by the plain caches."""
    counts = np.zeros((2, 2), dtype=np.int64)
    streams = [steps] if budget.shared else [[s for s in steps if s[0] == l] for l in LAYERS]
    for stream in streams:
        of_stream = LAYERS if budget.shared else {s[0] for s in stream}
        cost = {(l, e): sizes[l] if budget.shared else 1 for l in of_stream for e in range(E)}
        items = [[(layer, e) for e in experts] for layer, _, experts in stream]
        hits = PLAIN[cache](items, cost, budget.size)
        for (_, decode, experts), n in zip(stream, hits, strict=True):
            counts[:, decode] += len(experts), n
    return counts


@pytest.mark.parametrize("cache", CACHES)
def test_hits_are_those_of_plain_caches(cache):
    rng = np.random.default_rng(7)
    log = SimpleNamespace(n_experts=E, layers=LAYERS)
    for trial in range(60):
        steps = random_steps(rng, 40, widest=(2, 5, 8)[trial % 3])
        sizes = {1: 5, 4: int(rng.choice([5, 3]))}
        for text in ("1", "3", "8", "20", "12B", "33B", "1000B"):
            budget = Budget.of(text)
            found = cache_hits(touches_of(steps), budget, cache, log, sizes)
            expected = plain_counts(steps, budget, cache, sizes)
            assert (found == expected).all(), (trial, text)


def test_no_choice_of_what_stays_hits_more_than_belady():
    rng = np.random.default_rng(3)
    for _ in range(60):
        steps = [sorted({*rng.integers(0, 5, rng.integers(1, 4)).tolist()}) for _ in range(7)]
        for capacity in (1, 2, 3):
            hits = sum(belady(steps, dict.fromkeys(range(5), 1), capacity))
            assert hits == most_hits(steps, capacity)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two ranks, prompts of 12 tokens and then decoding."""
    return write_run(
        tmp_path_factory.mktemp("cache") / "run",
        layers=LAYERS,
        n_experts=E,
        n_sequences=6,
        length=20,
        n_shards=4,
        n_ranks=2,
        top_k=TOP_K,
        decode_from=12,
        options=BhOptions(alpha=0.3, max_k=4),
        kde=normal_kde(LAYERS),
    )


def steps_by_rank(run, chosen, *, only=lambda row: True):
    """The steps of each rank, from the rows one by one."""
    experts, prompt = defaultdict(set), Counter()
    for path in (run / "routing").glob("*.parquet"):
        for row in filter(only, pq.read_table(path).to_pylist()):
            key = row["rank"], row["forward"], row["layer"]
            experts[key] |= set(chosen(row))
            prompt[key] += row["phase"] == "prefill"
    ranks = defaultdict(list)
    for rank, forward, layer in sorted(experts):
        key = rank, forward, layer
        ranks[rank].append((layer, int(prompt[key] == 0), sorted(experts[key])))
    return [*ranks.values()]


def plain_row(run, chosen, text, cache, sizes=None, **only):
    ranks = steps_by_rank(run, chosen, **only)
    counts = sum(plain_counts(steps, Budget.of(text), cache, sizes) for steps in ranks)
    columns = {"": counts.sum(axis=1), "prefill_": counts[:, 0], "decode_": counts[:, 1]}
    row = {}
    for prefix, (lookups, hits) in columns.items():
        row |= {
            f"{prefix}lookups": lookups,
            f"{prefix}hit_rate": hits / lookups if lookups else None,
        }
    return row


def test_a_run_is_read_in_the_order_that_its_layers_ran(run):
    log = open_log(run)
    policies = {"bh:0.1": lambda r: None, "topk:3": lambda r: slow.by_logit(r["logits"])[:3]}
    logged = log.cache([2, "40B"], expert_bytes={1: 7, 4: 9}).to_dicts()
    replayed = log.cache(2, policies=[*policies]).to_dicts()
    assert [(row["budget"], row["cache"]) for row in logged] == [
        *itertools.product(("2", "40B"), CACHES)
    ]
    for row in logged:
        assert row.pop("policy") == "logged"
        budget, cache = row.pop("budget"), row.pop("cache")
        assert row == plain_row(run, lambda r: r["experts"], budget, cache, {1: 7, 4: 9})
    for row in replayed[4:]:
        assert row.pop("policy") == "topk:3"
        budget, cache = row.pop("budget"), row.pop("cache")
        assert row == plain_row(run, policies["topk:3"], budget, cache)
    assert {row["policy"] for row in replayed[:4]} == {"bh:0.1"}


def test_the_runs_own_alpha_gives_what_the_logged_experts_do(run):
    log = open_log(run)
    replayed, logged = log.cache(3, policies=["bh:0.3"]), log.cache(3)
    assert_frame_equal(replayed.drop("policy"), logged.drop("policy"))


def test_an_executor_gathers_the_same(run):
    with ThreadPoolExecutor(2) as pool:
        found = open_log(run).cache(2, policies=["topk:3"], executor=pool)
    assert_frame_equal(found, open_log(run).cache(2, policies=["topk:3"]))


def test_rows_that_are_left_out_are_not_looked_up(run):
    frame = open_log(run).cache(2, where="phase = 'decode'", layers=[4])
    for row in frame.to_dicts():
        cache = row["cache"]
        expected = plain_row(
            run,
            lambda r: r["experts"],
            "2",
            cache,
            only=lambda r: r["phase"] == "decode" and r["layer"] == 4,
        )
        assert {name: row[name] for name in expected} == expected
    assert frame["prefill_hit_rate"].is_null().all()
    assert frame["prefill_hit_rate"].dtype == pl.Float64


def test_what_cannot_be_replayed_is_told(run):
    log = open_log(run)
    for given, why in (
        ({"budget": []}, "at least one budget"),
        ({"budget": "0"}, "at least 1 expert"),
        ({"budget": -3}, "experts a layer, such as 8"),
        ({"budget": "many"}, "experts a layer, such as 8"),
        ({"budget": "4QB"}, "no size"),
        ({"budget": "4MB"}, "--expert-bytes"),
        ({"budget": "4MB", "expert_bytes": {1: 5}}, "no size of layer 4"),
        ({"budget": 2, "sample": 0.5}, "sample of tokens"),
        ({"budget": 2, "where": "position > 999"}, "no rows where position > 999"),
        ({"budget": 2, "policies": ["topk"]}, "topk"),
    ):
        with pytest.raises(InvalidOption, match=why):
            log.cache(given.pop("budget"), **given)


def test_a_policy_that_tests_needs_a_null_model(tmp_path):
    write_run(tmp_path / "native", layers=LAYERS, n_experts=E, n_sequences=2, length=4, n_shards=1)
    with pytest.raises(KdeMismatch, match="null model"):
        open_log(tmp_path / "native").cache(2, policies=["bh:0.1"])


def test_the_command_writes_a_row_for_each_policy_budget_and_cache(run, capsys):
    arguments = ["--budget", "2", "--budget", "40B", "--expert-bytes", "8B", "--alpha", "0.1"]
    with pytest.raises(SystemExit) as end:
        main(["cache", str(run), *arguments, "--policy", "topk:3", "--format", "json"])
    assert end.value.code == 0
    rows = json.loads(capsys.readouterr().out)
    expected = open_log(run).cache(["2", "40B"], policies=["bh:0.1", "topk:3"], expert_bytes="8B")
    assert rows == expected.to_dicts() and len(rows) == 2 * 2 * 4
