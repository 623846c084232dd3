"""Each question of sql/ against a plain Python computation on two small runs."""

import math
from collections import Counter, defaultdict
from itertools import combinations, pairwise
from statistics import correlation, mean, median_low, pstdev

import duckdb
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bhlog.analysis.database.catalog import VIEWS
from bhlog.analysis.database.connection import connect
from bhlog.analysis.database.question import find_question, questions
from bhlog.analysis.run import open_log
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.files import write_shard
from bhlog.capture.contract.rule import BhOptions, decide
from tests.synthetic import normal_kde, write_run

E = 8
LAYERS = (0, 2, 5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs over the same tokens: one by BH, with some decoding, one native."""
    folder = tmp_path_factory.mktemp("questions")
    shared = {
        "layers": LAYERS,
        "n_experts": E,
        "n_sequences": 6,
        "length": 40,
        "n_ranks": 2,
        "n_shards": 4,
        "sources": ("docs", "code", "mail"),
    }
    kde = normal_kde(LAYERS)
    options = BhOptions(alpha=0.3, min_k=1, max_k=4)
    write_run(folder / "a", options=options, kde=kde, top_k=3, decode_from=30, **shared)
    write_run(folder / "b", top_k=3, seed=0, **shared)
    return [open_log(folder / name) for name in "ab"]


@pytest.fixture(scope="module")
def database(runs):
    with connect(runs, tokenizer="bytes") as opened:
        yield opened


@pytest.fixture(scope="module")
def rows(runs):
    """Routing rows of both runs, each with its token's nll and source."""
    found = []
    for log in runs:
        names = ("rank", "sequence", "position")
        tokens = {tuple(t[n] for n in names): t for t in log.tokens().to_pylist()}
        columns = [*names, "layer", "token_id", "phase", "logits", "experts", "weights", "forward"]
        for batch in log.batches([*columns, "n_selected", "n_rejected"]):
            for row in batch.to_pylist():
                token = tokens[tuple(row[n] for n in names)]
                found.append(
                    {**row, "run": log.name, "nll": token["nll"], "source": token["source"]}
                )
    return found


def ask(database, name, **params):
    question = find_question(name)
    values = question.values({key: str(value) for key, value in params.items()})
    question.check(database, values)
    return database.sql(question.text, values).pl().to_dicts()


def grouped(rows, *names):
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return dict(sorted(groups.items()))


def close(found, expected):
    """Whether rows agree: floats to 9 digits (sums in another order), the rest exactly."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float):
                assert ours[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
            else:
                assert ours[name] == value, name
    return True


def loads(group):
    return Counter(e for row in group for e in row["experts"])


def test_experts_per_token(database, rows):
    expected = []
    for (run, layer), group in grouped(rows, "run", "layer").items():
        n = [row["n_selected"] for row in group if row["phase"] == "prefill"]
        expected.append(
            {
                "run": run,
                "layer": layer,
                "tokens": len(n),
                "mean_experts": mean(n),
                "sd_experts": pstdev(n),
                "min_experts": min(n),
                "median_experts": median_low(n),
                "max_experts": max(n),
            }
        )
    assert close(ask(database, "experts_per_token", phase="prefill"), expected)
    assert sum(r["tokens"] for r in ask(database, "experts_per_token")) == len(rows)


def test_floor_and_ceiling(database, rows):
    expected = []
    for (run, layer), group in grouped(rows, "run", "layer").items():
        low, high = (1, 4) if run == "a" else (3, 3)
        rejected = [row["n_rejected"] for row in group if row["n_rejected"] is not None]

        def share(test, values):
            return sum(map(test, values)) / len(values) if values else None

        n = [row["n_selected"] for row in group]
        expected.append(
            {
                "run": run,
                "layer": layer,
                "tokens": len(group),
                "min_k": low,
                "max_k": high,
                "at_floor": share(low.__eq__, n),
                "raised": share(low.__gt__, rejected),
                "at_ceiling": share(high.__eq__, n),
                "cut": share(high.__lt__, rejected),
                "none_rejected": share((0).__eq__, rejected),
            }
        )
    assert close(ask(database, "floor_and_ceiling"), expected)
    assert any(row["raised"] and row["cut"] for row in expected)


def test_expert_load(database, rows):
    expected = []
    for (run, layer), group in grouped(rows, "run", "layer").items():
        n = loads(group)
        for expert in range(E):
            expected.append(
                {
                    "run": run,
                    "layer": layer,
                    "expert": expert,
                    "selections": n[expert],
                    "share_of_tokens": n[expert] / len(group),
                    "load": n[expert] / (n.total() / E),
                }
            )
    assert close(ask(database, "expert_load"), expected)
    assert ask(database, "expert_load", layer=2) == [
        row for row in ask(database, "expert_load") if row["layer"] == 2
    ]


def test_load_balance(database, rows):
    expected = []
    for (run, layer), group in grouped(rows, "run", "layer").items():
        n = loads(group)
        f = [n[e] / n.total() for e in range(E)]
        expected.append(
            {
                "run": run,
                "layer": layer,
                "n_experts": E,
                "unused": f.count(0),
                "balance": -sum(x * math.log(x) for x in f if x) / math.log(E),
                "cv": pstdev(f) / mean(f),
                "max_load": max(f) * E,
                "gini": sum(abs(x - y) for x in f for y in f) / (2 * E),
            }
        )
    assert close(ask(database, "load_balance"), expected)


def test_dead_and_hot_experts(database, rows):
    expected = []
    for (run, layer), group in grouped(rows, "run", "layer").items():
        n = loads(group)
        for expert in range(E):
            load = n[expert] * E / n.total()
            if load <= 0.9 or load >= 1.1:
                verdict = "dead" if load <= 0.9 else "hot"
                row = {"run": run, "layer": layer, "expert": expert, "selections": n[expert]}
                expected.append({**row, "load": load, "verdict": verdict})
    expected.sort(key=lambda r: (r["run"], -round(r["load"], 9), r["layer"], r["expert"]))
    assert close(ask(database, "dead_and_hot_experts", dead=0.9, hot=1.1), expected)
    assert {row["verdict"] for row in expected} == {"dead", "hot"}


def test_router_entropy(database, rows):
    found = ask(database, "router_entropy")
    groups = grouped(rows, "run", "layer")
    assert [(row["run"], row["layer"]) for row in found] == list(groups)
    for row, group in zip(found, groups.values(), strict=True):
        entropies, tops = [], []
        for logits in (r["logits"] for r in group):
            z = sum(math.exp(x) for x in logits)
            p = [math.exp(x) / z for x in logits]
            entropies.append(-sum(x * math.log(x) for x in p))
            tops.append(max(p))
        assert row["tokens"] == len(group)
        # the function works in float32
        assert row["mean_entropy"] == pytest.approx(mean(entropies), rel=1e-6)
        assert row["relative_entropy"] == pytest.approx(mean(entropies) / math.log(E), rel=1e-6)
        assert row["mean_top_probability"] == pytest.approx(mean(tops), rel=1e-6)


def test_load_by_position(database, rows):
    expected = []
    for row in rows:
        row["bucket"] = row["position"] // 16 * 16
    for (run, bucket), group in grouped(rows, "run", "bucket").items():
        n = [row["n_selected"] for row in group]
        expected.append(
            {
                "run": run,
                "first_position": bucket,
                "last_position": max(row["position"] for row in group),
                "rows": len(n),
                "mean_experts": mean(n),
                "sd_experts": pstdev(n),
            }
        )
    assert close(ask(database, "load_by_position", width=16), expected)


def test_prefill_against_decode(database, rows):
    expected = []
    for (run, layer), group in grouped(rows, "run", "layer").items():
        parts = {p: [r for r in group if r["phase"] == p] for p in ("prefill", "decode")}
        n = {p: loads(part) for p, part in parts.items()}
        distance = None
        if all(parts.values()):
            f = {p: [n[p][e] / n[p].total() for e in range(E)] for p in parts}
            distance = sum(abs(x - y) for x, y in zip(*f.values(), strict=True)) / 2
        expected.append(
            {
                "run": run,
                "layer": layer,
                "prefill_tokens": len(parts["prefill"]),
                "decode_tokens": len(parts["decode"]),
                **{
                    f"{p}_experts": mean(r["n_selected"] for r in part) if part else None
                    for p, part in parts.items()
                },
                "load_distance": distance,
            }
        )
    assert close(ask(database, "prefill_against_decode"), expected)


@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_coactivation(database, rows, pairs):
    expected = []
    for (run, layer), group in grouped(rows, "run", "layer").items():
        n = loads(group)
        both = Counter(
            tuple(sorted(pair))
            for row in group
            for pair in {
                "all": combinations(row["experts"], 2),
                "adjacent": pairwise(row["experts"]),
            }[pairs]
        )
        found = [
            {
                "run": run,
                "layer": layer,
                "first": a,
                "second": b,
                "tokens": count,
                "coactivation_first": count / n[a],
                "coactivation_second": count / n[b],
                "lift": count * len(group) / (n[a] * n[b]),
            }
            for (a, b), count in both.items()
            if count >= 5
        ]
        found.sort(key=lambda r: (-r["lift"], r["first"], r["second"]))
        expected += found[:6]
    assert close(ask(database, "coactivation", min_tokens=5, top=6, pairs=pairs), expected)


def test_a_kind_that_does_not_exist_is_refused_in_a_line(database):
    for name, kind in (("coactivation", "pairs"), ("vocabulary_specialization", "ids")):
        with pytest.raises(duckdb.Error, match=f'{name}: {kind} is "'):
            ask(database, name, **{kind: "near"})


@pytest.mark.parametrize(
    ("given", "ways"),
    [
        ({}, [(0, 2), (2, 5)]),
        ({"next_layer": 5}, [(0, 5), (2, 5)]),
        ({"layer": 5, "next_layer": 0}, [(5, 0)]),
        ({"layer": 2}, [(2, 5)]),
    ],
)
def test_routes(database, rows, given, ways):
    first = {
        (r["run"], r["layer"], r["rank"], r["sequence"], r["position"]): r["experts"][0]
        for r in rows
    }
    expected = []
    for run in "ab":
        for layer, following in ways:
            n = Counter(
                (expert, first[(run, following, *token)])
                for (name, at, *token), expert in first.items()
                if (name, at) == (run, layer)
            )
            total = n.total()
            found = [
                {
                    "run": run,
                    "layer": layer,
                    "next_layer": following,
                    "expert": a,
                    "next_expert": b,
                    "tokens": count,
                    "share": count / sum(c for (x, _), c in n.items() if x == a),
                    "lift": count
                    * total
                    / sum(c for (x, _), c in n.items() if x == a)
                    / sum(c for (_, y), c in n.items() if y == b),
                }
                for (a, b), count in n.items()
                if count >= 3
            ]
            found.sort(key=lambda r: (-r["tokens"], r["expert"], r["next_expert"]))
            expected += found[:5]
    assert close(ask(database, "routes", min_tokens=3, top=5, **given), expected)


def test_domain_specialization(database, rows):
    for params, k in (({}, None), ({"k": 1}, 1), ({"k": 2}, 2)):
        expected = []
        for (run, layer, source), group in grouped(rows, "run", "layer", "source").items():
            n = Counter(e for row in group for e in row["experts"][:k])
            for expert in range(E):
                row = {"run": run, "layer": layer, "source": source, "expert": expert}
                row["specialization"] = n[expert] / len(group)
                expected.append({**row, "even": n.total() / len(group) / E})
        assert close(ask(database, "domain_specialization", **params), expected)


@pytest.mark.parametrize("ids", ["input", "next"])
def test_vocabulary_specialization(database, rows, ids):
    following = {
        (r["run"], r["rank"], r["sequence"], r["position"] - 1): r["token_id"] for r in rows
    }
    expected = []
    for (run, layer), group in grouped(rows, "run", "layer").items():
        pairs = [
            (row["token_id"] if ids == "input" else following.get(key), row["experts"][:2])
            for row in group
            for key in [(run, row["rank"], row["sequence"], row["position"])]
        ]
        pairs = [(token, experts) for token, experts in pairs if token is not None]
        seen = Counter(token for token, _ in pairs)
        n = Counter((e, token) for token, experts in pairs for e in experts)
        largest = [
            max(n[e, token] for e in range(E)) / count
            for token, count in seen.items()
            if count >= 5
        ]
        for expert in range(E):
            found = [
                {
                    "run": run,
                    "layer": layer,
                    "expert": expert,
                    "token_id": token,
                    "tokens": seen[token],
                    "specialization": n[expert, token] / seen[token],
                    "average": mean(largest),
                }
                for token in seen
                if seen[token] >= 5 and n[expert, token]
            ]
            found.sort(key=lambda r: (-r["specialization"], -r["tokens"], r["token_id"]))
            expected += found[:2]
    found = ask(database, "vocabulary_specialization", k=2, min_tokens=5, top=2, ids=ids)
    assert close(found, expected)


def test_router_losses(database, rows):
    def balance(group):
        n, mass = loads(group), [0.0] * E
        for row in group:
            weights = [math.exp(x) for x in row["logits"]]
            mass = [m + w / sum(weights) for m, w in zip(mass, weights, strict=True)]
        return E * sum(n[e] / n.total() * mass[e] / len(group) for e in range(E))

    found = ask(database, "router_losses", phase="prefill")
    prefill = [row for row in rows if row["phase"] == "prefill"]
    for row, ((run, layer), group) in zip(
        found, grouped(prefill, "run", "layer").items(), strict=True
    ):
        forwards = grouped(group, "rank", "forward").values()
        z = [math.log(math.fsum(map(math.exp, one["logits"]))) ** 2 for one in group]
        assert row == {  # softmax works in float32
            "run": run,
            "layer": layer,
            "tokens": len(group),
            "load_balancing_loss": pytest.approx(balance(group), rel=1e-6),
            "load_balancing_loss_by_forward": pytest.approx(
                sum(len(one) * balance(one) for one in forwards) / len(group), rel=1e-6
            ),
            "z_loss": pytest.approx(mean(z), rel=1e-6),
        }
    assert len(ask(database, "router_losses", layer=2)) == 2


def pairs_of_runs(rows):
    by_run = {
        run: {
            (r["layer"], r["rank"], r["sequence"], r["position"]): r
            for r in rows
            if r["run"] == run
        }
        for run in "ab"
    }
    for layer in LAYERS:
        yield layer, [(r, by_run["b"][key]) for key, r in by_run["a"].items() if key[0] == layer]


def test_router_saturation(database, rows):
    first = [
        {
            "layer": layer,
            "tokens": len(pairs),
            "saturation": mean(a["experts"][0] == b["experts"][0] for a, b in pairs),
            "by_chance": 1 / E,
        }
        for layer, pairs in pairs_of_runs(rows)
    ]
    assert close(ask(database, "router_saturation", k=1), first)
    expected = [
        {
            "layer": layer,
            "tokens": len(pairs),
            "saturation": mean(len({*a["experts"]} & {*b["experts"]}) / 3 for a, b in pairs),
            "by_chance": mean(a["n_selected"] for a, _ in pairs) / E,
        }
        for layer, pairs in pairs_of_runs(rows)
    ]
    assert close(ask(database, "router_saturation"), expected)
    assert close(ask(database, "router_saturation", run="a", last="b"), expected)
    same = ask(database, "router_saturation", run="a", last="a")
    assert [row["saturation"] for row in same] == [1, 1, 1]


def test_run_agreement(database, rows):
    expected = []
    for layer, pairs in pairs_of_runs(rows):
        sets = [({*a["experts"]}, {*b["experts"]}) for a, b in pairs]
        expected.append(
            {
                "layer": layer,
                "tokens": len(pairs),
                "first_experts": mean(len(a) for a, _ in sets),
                "second_experts": mean(len(b) for _, b in sets),
                "same_number": mean(len(a) == len(b) for a, b in sets),
                "same_first_choice": mean(a["experts"][0] == b["experts"][0] for a, b in pairs),
                "same_experts": mean(a == b for a, b in sets),
                "jaccard": mean(len(a & b) / len(a | b) for a, b in sets),
            }
        )
    assert close(ask(database, "run_agreement"), expected)


def text_of(token_id: int) -> str | None:
    """Of a token that is a byte."""
    if token_id > 255:
        return None
    return chr(token_id) if token_id < 128 else f"<0x{token_id:02X}>"


def test_easiest_and_hardest_tokens(database, rows):
    expected = []
    for run in "ab":
        tokens = grouped([r for r in rows if r["run"] == run], "rank", "sequence", "position")
        ids = {key: group[0]["token_id"] for key, group in tokens.items()}
        means = {key: mean(r["n_selected"] for r in group) for key, group in tokens.items()}
        for kind, sign in (("most", -1), ("fewest", 1)):
            for key in sorted(means, key=lambda key: (sign * means[key], key))[:3]:
                rank, sequence, position = key

                around = [
                    [ids.get((rank, sequence, position + step)) for step in steps]
                    for steps in ((-2, -1), (1, 2))
                ]
                before, after = ([i for i in side if i is not None] or None for side in around)
                expected.append(
                    {
                        "run": run,
                        "kind": kind,
                        "mean_experts": means[key],
                        "rank": rank,
                        "sequence": sequence,
                        "position": position,
                        "token_id": ids[key],
                        "text": text_of(ids[key]),
                        "before": before,
                        "after": after,
                        "around": "".join(
                            text_of(i) or "" for i in (*(before or ()), ids[key], *(after or ()))
                        ),
                        "nll": tokens[key][0]["nll"],
                    }
                )
    assert close(ask(database, "easiest_and_hardest_tokens", top=3, around=2), expected)


def test_loss_against_experts(database, rows):
    key = ("run", "layer", "rank", "sequence", "position")
    nll = {tuple(row[name] for name in key): row["nll"] for row in rows}
    for row in rows:
        *place, position = (row[name] for name in key)
        row["next_nll"] = nll.get((*place, position + 1))
    expected = []
    for (run, layer), whole in grouped(rows, "run", "layer").items():

        def correlated(name, whole=whole):
            known = [row for row in whole if row[name] is not None]
            n = [row["n_selected"] for row in known]
            if len({row["n_selected"] for row in whole}) == 1:
                return None
            return correlation([row[name] for row in known], n)

        for (n,), group in grouped(whole, "n_selected").items():
            expected.append(
                {
                    "run": run,
                    "layer": layer,
                    "n_selected": n,
                    "tokens": len(group),
                    "mean_nll": mean(r["nll"] for r in group if r["nll"] is not None),
                    "mean_next_nll": mean(
                        r["next_nll"] for r in group if r["next_nll"] is not None
                    ),
                    "correlation": correlated("nll"),
                    "next_correlation": correlated("next_nll"),
                }
            )
    assert close(ask(database, "loss_against_experts"), expected)


def test_probability_against_loss(database, rows):
    kept, losses = {}, {}
    for (run,), group in grouped(rows, "run").items():
        shares = []
        for row in group:
            weights = [math.exp(x - max(row["logits"])) for x in row["logits"]]
            shares.append(sum(weights[e] for e in row["experts"]) / sum(weights))
        kept[run] = mean(shares)
        nll = {(r["rank"], r["sequence"], r["position"]): r["nll"] for r in group}
        losses[run] = mean(x for x in nll.values() if x is not None)
    pairs = [losses[a] < losses[b] for a in kept for b in kept if kept[a] > kept[b]]
    found = ask(database, "probability_against_loss")
    assert [row["run"] for row in found] == sorted(kept, key=lambda run: -kept[run])
    for row in found:
        run = row["run"]
        assert row["probability_kept"] == pytest.approx(kept[run], rel=1e-5)
        assert row["loss"] == pytest.approx(losses[run], rel=1e-6)
        assert row["loss_rank"] == 1 + sum(x < losses[run] for x in losses.values())
        assert row["pairs_in_order"] == pytest.approx(mean(map(float, pairs)))


def test_trace_sequence(database, rows):
    names = ("run", "position", "token_id", "phase", "nll", "layer")
    names += ("n_selected", "n_rejected", "experts", "weights")
    traced = [
        {name: row[name] for name in names}
        for row in rows
        if (row["sequence"], row["rank"]) == (3, 0) and 5 <= row["position"] <= 9
    ]
    rank = 0
    if not traced:
        rank = 1
        traced = [
            {name: row[name] for name in names}
            for row in rows
            if (row["sequence"], row["rank"]) == (3, 1) and 5 <= row["position"] <= 9
        ]
    traced.sort(key=lambda r: (r["run"], r["position"], r["layer"]))
    found = ask(database, "trace_sequence", **{"sequence": 3, "rank": rank, "from": 5, "to": 9})
    assert close(found, traced)
    assert len(found) == 2 * 5 * 3


def test_shard_sizes(database, runs):
    expected = []
    for log in runs:
        for name, tokens in zip(log.shards, log.token_shards, strict=True):
            n = log.open_shard("routing", name).metadata.num_rows
            size = log.files("routing")[name]
            expected.append(
                {
                    "run": log.name,
                    "shard": name,
                    "routing_rows": n,
                    "routing_bytes": size,
                    "bytes_per_row": size / n,
                    "token_rows": log.open_shard("tokens", tokens).metadata.num_rows,
                    "token_bytes": log.files("tokens")[tokens],
                }
            )
    assert close(ask(database, "shard_sizes"), expected)


def test_experts_by_source(database, rows):
    expected = []
    shares, errors = {}, {}
    for (run, source, layer), group in grouped(rows, "run", "source", "layer").items():
        n = loads(group)
        texts = grouped(group, "rank", "sequence").values()
        for expert in range(E):
            share = shares[run, source, layer, expert] = n[expert] / len(group)
            off = [sum((expert in row["experts"]) - share for row in text) for text in texts]
            G = len(off)
            errors[run, source, layer, expert] = (
                math.sqrt(G / (G - 1) * sum(x * x for x in off)) / len(group) if G > 1 else None
            )
    for (run, first, layer, expert), share in shares.items():
        second = "docs"
        other = shares[run, second, layer, expert]
        se, other_se = errors[run, first, layer, expert], errors[run, second, layer, expert]
        if first == "code":
            both = None if None in (se, other_se) else math.hypot(se, other_se)
            expected.append(
                {
                    "run": run,
                    "first": first,
                    "second": second,
                    "layer": layer,
                    "expert": expert,
                    "prefers": first if share > other else second,
                    "share_first": share,
                    "share_first_se": se,
                    "share_second": other,
                    "share_second_se": other_se,
                    "preference": share - other,
                    "preference_se": both,
                    "lift": share / other if other else None,
                }
            )
    expected.sort(key=lambda r: (-abs(r["preference"]), r["layer"], r["expert"]))
    expected = [
        row
        for run in "ab"
        for source in ("code", "docs")
        for row in [
            r for r in expected if (r["run"], r["prefers"]) == (run, source) and r["preference"]
        ][:4]
    ]
    found = ask(database, "experts_by_source", first="code", second="docs", top=4)
    assert close(found, expected)
    pairs = {(r["first"], r["second"]) for r in ask(database, "experts_by_source", top=1000)}
    assert pairs == {("code", "docs"), ("code", "mail"), ("docs", "mail")}


def test_noise_experts(runs, rows):
    log = runs[0]
    with connect(log) as alone:
        found = ask(alone, "noise_experts", alpha=0.4)
    low, high = 1, 4  # of the run
    for (layer,), group in grouped([row for row in rows if row["run"] == "a"], "layer").items():
        (row,) = (row for row in found if row["layer"] == layer)
        logits = np.array([row["logits"] for row in group], np.float32)
        logits = logits[np.isfinite(logits).any(axis=1)]
        thresholds = log.kde[layer].thresholds(0.4, E)
        n = decide(logits, thresholds, min_k=low, max_k=high).n_selected
        assert row["tokens"] == len(group)
        assert (row["mean_experts"], row["sd_experts"]) == pytest.approx((n.mean(), n.std()))
        rng = np.random.default_rng(0)
        shuffled = np.concatenate([rng.permuted(logits, axis=0) for _ in range(20)])
        noise = decide(shuffled, thresholds, min_k=low, max_k=high).n_selected
        # five standard errors: the question shuffles once, and draws nothing
        assert row["noise_experts"] == pytest.approx(noise.mean(), abs=5 * row["noise_experts_se"])
        assert row["noise_experts_se"] == pytest.approx(row["noise_sd_experts"] / len(n) ** 0.5)


def test_distinct_experts(database, rows):
    expected = []
    for (run, layer), whole in grouped(rows, "run", "layer").items():
        share = {e: n / len(whole) for e, n in loads(whole).items()}
        forwards = grouped(whole, "rank", "forward").values()
        sizes = defaultdict(list)
        for forward in forwards:
            sizes[len(forward)].append(len(loads(forward)))
        for tokens, distinct in sorted(sizes.items()):
            expected.append(
                {
                    "run": run,
                    "layer": layer,
                    "tokens": tokens,
                    "forwards": len(distinct),
                    "mean_distinct": mean(distinct),
                    "min_distinct": min(distinct),
                    "max_distinct": max(distinct),
                    "share": mean(distinct) / E,
                    "independent": sum(1 - (1 - p) ** tokens for p in share.values()),
                }
            )
    assert close(ask(database, "distinct_experts"), expected)
    decoded = ask(database, "distinct_experts", phase="decode", layer=2)
    assert {row["run"] for row in decoded} == {"a"} and len({row["tokens"] for row in decoded}) > 0
    assert all(
        row["min_distinct"] <= row["mean_distinct"] <= row["max_distinct"] for row in decoded
    )


def sampled(folder, every):
    """A copy of a run as it is with --sample-every: the tokens at its multiples alone."""
    whole = write_run(folder, layers=LAYERS, n_experts=E, n_sequences=4, length=24, n_shards=2)
    for path in [*whole.glob("routing/*"), *whole.glob("tokens/*")]:
        table = pq.read_table(path)
        groups = [
            group.filter(pc.equal(pc.bit_wise_and(group["position"], every - 1), 0))
            for group in (
                pq.ParquetFile(path).read_row_group(i).cast(table.schema)
                for i in range(pq.read_metadata(path).num_row_groups)
            )
        ]
        write_shard(path, groups)
    return whole


@pytest.mark.parametrize("every", [1, 2, 4])
def test_a_sampled_log_pairs_no_token_with_one_that_does_not_follow_it(tmp_path, every):
    run = sampled(tmp_path / "demo", every)
    with connect(open_log(run), tokenizer="bytes") as database:
        lost = ask(database, "loss_against_experts")
        assert lost and all((row["mean_next_nll"] is None) == (every > 1) for row in lost)
        assert all((row["next_correlation"] is None) for row in lost)
        for row in ask(database, "easiest_and_hardest_tokens", around=3):
            before, after = row["before"] or [], row["after"] or []
            place = row["position"]
            if every > 1:
                assert not before and not after
            else:
                assert (len(before), len(after)) == (min(3, place), min(3, 23 - place))


@pytest.mark.parametrize("name", ["run_agreement", "router_saturation"])
def test_runs_of_other_texts_are_not_compared(tmp_path, name):
    shared = {"layers": LAYERS, "n_experts": E, "n_sequences": 2, "length": 6, "n_shards": 1}
    for run, seed in (("a", 0), ("other", 1), ("b", 0)):
        write_run(tmp_path / run, seed=seed, **shared)
    logs = [open_log(tmp_path / run) for run in ("a", "other", "b")]
    with connect(logs) as database:
        assert len(ask(database, name)) == len(LAYERS)  # the first and the last one
        names = {"run_agreement": "second", "router_saturation": "last"}
        with pytest.raises(InvalidOption, match="hold other texts") as error:
            ask(database, name, **{names[name]: "other"})
        assert "\n" not in str(error.value) and str(logs[1].path) in str(error.value)
    with connect(logs[:2]) as database, pytest.raises(InvalidOption, match="hold other texts"):
        ask(database, name)


@pytest.mark.parametrize("name", ["run_agreement", "router_saturation"])
def test_a_run_of_a_part_of_the_text_is_compared_and_one_beside_it_is_not(tmp_path, name):
    kept = {"whole": (0, 1, 2), "first": (0, 1), "last": (1, 2)}
    for run, sequences in kept.items():
        write_run(tmp_path / run, layers=LAYERS, n_experts=E, n_sequences=3, length=6, n_shards=1)
        for shard in [*(tmp_path / run).glob("routing/*"), *(tmp_path / run).glob("tokens/*")]:
            table = pq.read_table(shard)
            pq.write_table(table.filter(pc.field("sequence").isin(sequences)), shard)
    logs = {run: open_log(tmp_path / run) for run in kept}
    for pair in (("whole", "first"), ("last", "whole")):
        with connect([logs[run] for run in pair]) as database:
            assert {row["tokens"] for row in ask(database, name)} == {2 * 6}
    beside = pytest.raises(InvalidOption, match=r"6 of 12 tokens of .* are not in .*; capture both")
    with connect([logs["first"], logs["last"]]) as database, beside:
        ask(database, name)


def test_whole_sequences(database, runs):
    """Without forks they are what is logged; test_generation.py asks it of beams."""
    truth = [
        {
            "run": log.name,
            **{name: row[name] for name in ("rank", "sequence", "position", "token_id")},
        }
        for log in runs
        for row in log.tokens().to_pylist()
    ]
    truth.sort(key=lambda row: [row[name] for name in ("run", "rank", "sequence", "position")])
    found = ask(database, "whole_sequences")
    assert [{name: row[name] for name in truth[0]} for row in found] == truth
    assert all(row["logged_as"] == row["sequence"] for row in found)
    one = ask(database, "whole_sequences", sequence=truth[0]["sequence"], rank=0)
    assert one == [
        row for row in found if (row["rank"], row["sequence"]) == (0, truth[0]["sequence"])
    ]


@pytest.mark.parametrize("question", questions(), ids=lambda question: question.name)
def test_every_question_says_what_it_reads_and_returns_and_is_tested(question):
    assert question.title.endswith("?")
    assert any(view in question.reads for view in VIEWS)
    assert question.returns.startswith("one row per ")
    assert f"test_{question.name}" in globals()
    assert question.text.startswith(f"-- {question.name}.sql\n")


@pytest.mark.parametrize("question", questions(), ids=lambda question: question.name)
@pytest.mark.filterwarnings("ignore:.* files are missing")
def test_every_question_runs_on_an_empty_run(question, tmp_path):
    for name in "ab":
        run = write_run(tmp_path / name, n_experts=E, n_sequences=1, length=2, n_shards=1)
        for shard in [*run.glob("routing/*"), *run.glob("tokens/*")]:
            shard.unlink()
    with connect([open_log(tmp_path / name) for name in "ab"]) as database:
        assert ask(database, question.name) == []


def test_what_a_run_lacks_is_said_in_a_line(tmp_path):
    write_run(tmp_path / "a", n_experts=E, n_sequences=2, length=4, n_shards=1, token_ids=False)
    write_run(tmp_path / "b", n_experts=16, n_sequences=2, length=1, n_shards=1)
    with connect(open_log(tmp_path / "a")) as database:
        with pytest.raises(InvalidOption, match="'a' was captured without token ids"):
            ask(database, "vocabulary_specialization")
        with pytest.raises(InvalidOption, match="compares two runs"):
            ask(database, "run_agreement")
        assert ask(database, "trace_sequence")[0]["token_id"] is None
    with (
        connect([open_log(tmp_path / name) for name in "ab"]) as database,
        pytest.raises(InvalidOption, match="different numbers of experts"),
    ):
        ask(database, "router_saturation")
    with (
        connect(open_log(tmp_path / "b")) as database,
        pytest.raises(InvalidOption, match="holds no losses"),
    ):
        ask(database, "loss_against_experts")


def test_a_question_of_ones_own_is_read_from_its_file(tmp_path, database):
    path = tmp_path / "mine.sql"
    path.write_text(
        "-- How many rows?\n--\n-- a note\n--\n-- Reads   routing\n"
        "-- Param   $layer integer  which layer\n-- Returns one row: n\n"
        "SELECT count(*) AS n FROM routing WHERE layer = $layer;\n"
    )
    question = find_question(str(path))
    assert (question.title, question.notes) == ("How many rows?", "a note")
    with pytest.raises(InvalidOption, match="needs a value for layer"):
        question.values({})
    assert database.sql(question.text, question.values({"layer": "2"})).fetchall() == [(480,)]
