"""The text itself: tokens shaded by experts or loss, their step-up, and what each expert reads."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from bhlog.analysis.database.connection import connect
from bhlog.analysis.database.question import find_question
from bhlog.analysis.database.token_texts import vocabulary_of
from bhlog.analysis.log import Log, layer_of, logits_of
from bhlog.analysis.report.markup import Listed, Panel, shipped
from bhlog.analysis.report.subject import Subject, alpha_of, quoted
from bhlog.analysis.vocabulary import Vocabulary
from bhlog.capture.contract.arrays import values_of
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import BhOptions

RANKS = 10  # shown of a token's step-up
MOST_STEPS = 32_000  # of (token, layer, rank) on the page
MOST_TOKENS = 600
MOST_EXPERTS = 1_024  # with a page of their own, the busiest of each layer
TOP, AROUND = 4, 8  # tokens of an expert, and neighbours on either side
READ = 200_000  # tokens that experts' pages are made from
MOST_ROWS = 20_000_000  # of a run whose extremes are looked for


def text_panel(subject: Subject) -> Panel | None:
    """A piece of text with its decisions, and what each expert reads."""
    run = _run_of(subject)
    run.require_logits()
    if not run.manifest.token_ids:
        raise InvalidOption(f"{run.path} was captured without token ids")
    vocabulary = vocabulary_of({run.name: run}, subject.tokenizer)
    if vocabulary is None:
        raise InvalidOption("a log holds no text: name its tokenizer with --tokenizer")
    kde = run.kde if subject.null is None else subject.null[1]
    if kde is None or not kde.pooled:
        raise InvalidOption("p-values of tokens need a null model pooled over experts")
    options = run.manifest.routing.options
    if options is None or options.policy is not None:
        options = BhOptions()
    data = {
        **_piece(run, vocabulary, kde, options),
        "pages": _pages(run, vocabulary),
        "alpha": options.alpha,
        "n_experts": run.n_experts,
    }
    text = json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    body = shipped("tokens.html").replace("$data", text)
    tokens = f" --tokenizer {quoted(subject.tokenizer)}" if subject.tokenizer else ""
    return Panel(
        "text",
        "The text itself",
        f"The beginning of {run.name}, at alpha {options.alpha:g}. Darker tokens get more experts, "
        "or cost more nats. Point at a token, or walk with the arrow keys, to see its step-up.",
        body=body,
        commands=(f"bhlog sql {quoted(run.path)}{tokens} --query trace_sequence",),
    )


def extremes(subject: Subject) -> Panel | None:
    """Tokens with the most and with the fewest experts."""
    run = _run_of(subject)
    if run.manifest.routing.options is None or run.manifest.totals.rows > MOST_ROWS:
        return None
    if vocabulary_of({run.name: run}, subject.tokenizer) is None:
        raise InvalidOption("a log holds no text: name its tokenizer with --tokenizer")
    question = find_question("easiest_and_hardest_tokens")
    with connect(run, tokenizer=subject.tokenizer) as database:
        question.check(database)
        values = question.values({"top": "15", "around": "8"})
        answer = database.sql(question.text, values).pl()
    quotes = [
        pl.Series(name, [json.dumps(t, ensure_ascii=False) for t in answer[name]], pl.String)
        for name in ("text", "around")
    ]  # spaces and line ends are to be seen
    shown = answer.with_columns(quotes).select("kind", "mean_experts", "text", "around", "nll")
    tokens = f" --tokenizer {quoted(subject.tokenizer)}" if subject.tokenizer else ""
    return Panel(
        "extremes",
        "Tokens with most and fewest experts",
        f"Mean over the layers of {run.name}, and what stands around them.",
        listed=(
            Listed("Most experts", _of(shown, "most"), shown=True),
            Listed("Fewest experts", _of(shown, "fewest")),
        ),
        commands=(
            f"bhlog sql {quoted(run.path)}{tokens} --query easiest_and_hardest_tokens "
            "--param top=15 --param around=8",
        ),
    )


def _of(shown: pl.DataFrame, kind: str) -> pl.DataFrame:
    return shown.filter(pl.col("kind") == kind).drop("kind")


def _run_of(subject: Subject) -> Log:
    """The first run that BH routed: under native routing every token has the same experts."""
    return next((r for r in subject.runs if alpha_of(r) is not None), subject.run)


def _piece(run: Log, vocabulary: Vocabulary, kde: KdeModel, options: BhOptions) -> dict[str, Any]:
    """The first tokens of the first sequence, and what each layer decides for them."""
    name = run.token_shards[0]
    tokens = run.read_tokens(name, ["sequence", "position", "token_id", "nll"])
    sequence = tokens["sequence"][0].as_py()
    most = max(48, min(MOST_TOKENS, MOST_STEPS // (len(run.layers) * RANKS)))
    frame = pl.DataFrame(pl.from_arrow(tokens)).filter(pl.col("sequence") == sequence)
    frame = frame.sort("position").head(most)
    last = frame["position"][-1]
    where = f"sequence = {sequence} AND position <= {last}"
    low, high = options.bounds(run.n_experts)
    layers: list[dict[str, Any]] = []
    shard = run.open_shard("routing", name)
    seen: dict[int, list[dict[str, Any]]] = {}
    for group in run.groups_of(name, shard):
        batch = run.read(group, ["layer", "position", "logits"], where, shard=shard)
        if batch.num_rows:
            null = kde[group.layer]
            thresholds = null.curves[0].thresholds(options.alpha, run.n_experts)
            logits = logits_of(batch)
            decided = null.decide(logits, thresholds, min_k=low, max_k=run.n_experts)
            n_selected = np.minimum(decided.n_selected, high)  # ranks beyond it are shown too
            first = decided.order[:, :RANKS].astype(np.int64)
            p = np.take_along_axis(null.curves[0].p_value(null.tested(logits)), first, axis=1)
            rows = zip(values_of(batch.column("position")).tolist(), n_selected.tolist(),
                       first.tolist(), p.tolist(), strict=True)  # fmt: skip
            seen.setdefault(group.layer, []).extend(
                {"at": at, "n": n, "experts": e, "p": [_short(x) for x in ps]}
                for at, n, e, ps in rows
            )
    for layer in run.layers:
        rows_of = {row["at"]: row for row in seen.get(layer, [])}
        found = [rows_of.get(at) for at in frame["position"]]
        layers.append(
            {
                "layer": layer,
                "n": [None if row is None else row["n"] for row in found],
                "experts": [[] if row is None else row["experts"] for row in found],
                "p": [[] if row is None else row["p"] for row in found],
            }
        )
    nll = [None if x is None or x != x else round(x, 3) for x in frame["nll"].to_list()]
    texts = vocabulary.of(frame["token_id"].to_arrow()).to_pylist()
    return {"texts": [t or "\ufffd" for t in texts], "nll": nll, "layers": layers}


def _short(p: float) -> float | None:
    """Three digits of a p-value; a NaN logit has none."""
    return float(f"{p:.3g}") if p == p else None


@dataclass(eq=False)
class _Best:
    """Places of the tokens that each expert of a layer weighs most, the heaviest first."""

    weight: NDArray[np.float32]  # (E, TOP)
    token: NDArray[np.int64]  # (E, TOP), row in the tokens; -1: none
    rows: NDArray[np.int64]  # (E,)
    sources: NDArray[np.int64]  # (E, S)


def _pages(run: Log, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """For each layer its busiest experts: their top tokens in context, and their sources."""
    tokens, offsets = _read(run)
    ids = tokens["token_id"].to_arrow()
    texts = [t or "\ufffd" for t in vocabulary.of(ids).to_pylist()]
    names = tokens["source"].cast(pl.String).fill_null("?")
    sources = names.unique(maintain_order=True).to_list()[:8]
    index = {name: i for i, name in enumerate(sources)}
    source_of = np.array([index.get(name, -1) for name in names.to_list()])
    starts = _starts(tokens)
    best: dict[int, _Best] = {}
    E = run.n_experts
    for name, (start, keys, order) in offsets.items():
        shard = run.open_shard("routing", name)
        for group in run.groups_of(name, shard):
            columns = ["layer", "sequence", "position", "experts", "weights"]
            batch = run.read(group, columns, shard=shard)
            if not batch.num_rows:
                continue
            into = best.setdefault(
                layer_of(batch),
                _Best(np.zeros((E, TOP), np.float32), np.full((E, TOP), -1),
                      np.zeros(E, np.int64), np.zeros((E, len(sources)), np.int64)),
            )  # fmt: skip
            at = start + order[np.searchsorted(keys, _keys(batch)).clip(max=len(keys) - 1)]
            _add(into, batch, at, source_of)
    most = max(1, MOST_EXPERTS // max(1, len(run.layers)))
    share = np.bincount(source_of[source_of >= 0], minlength=len(sources)) / max(1, len(source_of))
    pages = []
    for layer, found in sorted(best.items()):
        busiest = np.argsort(-found.rows, kind="stable")[:most]
        experts = {
            str(e): {
                "rows": int(found.rows[e]),
                "top": [_in_context(texts, starts, int(t)) for t in found.token[e] if t >= 0],
                "sources": (found.sources[e] / max(1, found.rows[e])).round(4).tolist(),
            }
            for e in sorted(busiest.tolist())
        }
        pages.append({"layer": layer, "names": sources, "share": share.round(4).tolist(),
                      "experts": experts})  # fmt: skip
    return pages


def _read(run: Log) -> tuple[pl.DataFrame, dict[str, tuple[int, NDArray[Any], NDArray[Any]]]]:
    """Tokens of the first shards, and by shard where they start, their keys and their order."""
    frames: list[pl.DataFrame] = []
    offsets = {}
    start = 0
    for name in run.token_shards:
        if frames and start >= READ:
            break
        table = run.read_tokens(name, ["rank", "sequence", "position", "token_id", "source"])
        keys = _keys(table.combine_chunks())
        order = np.argsort(keys, kind="stable")
        offsets[name] = start, keys[order], order
        frames.append(pl.DataFrame(pl.from_arrow(table)))
        start += table.num_rows
    return pl.concat(frames), offsets


def _keys(rows: pa.Table | pa.RecordBatch) -> NDArray[np.uint64]:
    sequence = values_of(rows.column("sequence")).astype(np.uint64)
    return np.asarray((sequence << np.uint64(32)) | values_of(rows.column("position")))


def _starts(tokens: pl.DataFrame) -> NDArray[np.bool_]:
    """Whether a token follows no other of its sequence in the row above."""
    same = [tokens[name].to_numpy()[1:] == tokens[name].to_numpy()[:-1]
            for name in ("rank", "sequence")]  # fmt: skip
    after = np.diff(tokens["position"].to_numpy().astype(np.int64)) == 1
    return np.concatenate([[True], ~(same[0] & same[1] & after)])


def _add(into: _Best, batch: pa.RecordBatch, at: NDArray[np.int64],
         source_of: NDArray[np.int64]) -> None:  # fmt: skip
    lists = batch.column("experts")
    token = np.repeat(at, np.diff(values_of(lists.offsets)))
    expert = values_of(lists.flatten()).astype(np.int64)
    weight = values_of(batch.column("weights").flatten())
    E, S = into.sources.shape
    into.rows += np.bincount(expert, minlength=E)
    of = source_of[token]
    known = of >= 0
    into.sources += np.bincount(expert[known] * S + of[known], minlength=E * S).reshape(E, S)
    order = np.lexsort((token, -weight, expert))
    first = np.searchsorted(expert[order], np.arange(E + 1))
    for e in range(E):
        mine = order[first[e] : min(first[e + 1], first[e] + TOP)]
        if not len(mine):
            continue
        weights = np.concatenate([into.weight[e], weight[mine]])
        places = np.concatenate([into.token[e], token[mine]])
        keep = np.argsort(-weights, kind="stable")[:TOP]
        into.weight[e], into.token[e] = weights[keep], places[keep]


def _in_context(texts: list[str], starts: NDArray[np.bool_], at: int) -> list[str]:
    """A token's text with what stands before and after it in its sequence."""
    first = at
    while first > max(0, at - AROUND) and not starts[first]:
        first -= 1
    last = at + 1
    while last < min(len(texts), at + 1 + AROUND) and not starts[last]:
        last += 1
    return ["".join(texts[first:at]), texts[at], "".join(texts[at + 1 : last])]
