"""Verification: is a run whole, and does it keep what the log promises?"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from bhlog.analysis.fold import WHOLE, Scope
from bhlog.analysis.log import Log
from bhlog.analysis.verify.overlaps import shared_tokens
from bhlog.analysis.verify.pair import Pair, pairs_of, rank_and_number
from bhlog.analysis.verify.replayed import verify_replay
from bhlog.analysis.verify.replays import replay_problems
from bhlog.capture.contract.card import CARD_NAME
from bhlog.capture.contract.errors import CorruptKde, InvalidOption, KdeMismatch
from bhlog.capture.contract.manifest import MANIFEST_NAME, ShardEntry, manifest_name
from bhlog.capture.contract.schema import SHARD_NAME

FOLDERS = ("routing", "tokens")
_KNOWN_FOLDERS = (*FOLDERS, "figures", "replay")


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: "manifest", "files", "null model", "shards", "rows", "totals" or "replay".
        status: "ok", "warning" (worth knowing, nothing is wrong) or "error".
        where: file or part of the run.
        detail: what was found, and what was expected.
    """

    check: str
    status: Literal["ok", "warning", "error"]
    where: str
    detail: str


def verify(log: Log, scope: Scope = WHOLE) -> list[Finding]:
    """Check a run's files against each other and against what the log promises.

    Reads every page of every shard, with checksums, several pairs of shards at once; a thread holds
    the tokens of one shard and one row group. A run that is open, or whose capture was killed, is
    whole as far as it goes: what is missing is a warning.
    """
    return [
        *_manifest(log),
        *_files(log),
        *_null_model(log),
        *_shards(log, scope),
        *_replays(log),
    ]


def verify_decisions(
    log: Log, scope: Scope = WHOLE, *, after: Sequence[Finding] = ()
) -> list[Finding]:
    """Replay a run at its own settings and compare every row; see bhlog.analysis.verify.replayed.

    A run that cannot be replayed is an error.

    Args:
        after: what verify found; a run with errors is not replayed.
    """
    if any(finding.status == "error" for finding in after):
        return [Finding("replay", "warning", log.path, "not replayed: the run has errors")]
    try:
        frame = verify_replay(log, scope)
    except (InvalidOption, KdeMismatch) as error:
        return [Finding("replay", "error", log.path, str(error))]
    findings = []
    for row in frame.iter_rows(named=True):
        wrong = row["mismatches"]
        detail = f"{row['rows']:,} rows replayed, {wrong:,} disagree"
        if wrong:
            detail += f", first at {row['first']}"
        where = f"layer {row['layer']}"
        findings.append(Finding("replay", "error" if wrong else "ok", where, detail))
    return findings


def findings_frame(findings: Sequence[Finding]) -> pl.DataFrame:
    """A row for each finding: check, status, where, detail."""
    return pl.DataFrame([vars(finding) for finding in findings])


def _manifest(log: Log) -> Iterator[Finding]:
    manifest = log.manifest
    if manifest.error:
        detail = f"the capture ended early: {manifest.error}"
        yield Finding("manifest", "warning", MANIFEST_NAME, detail)
    if manifest.closed is None:
        yield Finding(
            "manifest",
            "warning",
            MANIFEST_NAME,
            "not closed: the capture still runs or was killed; rows since its last sealed shard "
            "are missing",
        )
    else:
        detail = f"closed {manifest.closed}, {_pairs(len(manifest.shards))} listed"
        yield Finding("manifest", "ok", MANIFEST_NAME, detail)
    if manifest.totals.dropped:
        why = "the queue was full" + (" or writing had stopped" if manifest.error else "")
        detail = f"{manifest.totals.dropped:,} tokens were dropped because {why}"
        yield Finding("manifest", "warning", MANIFEST_NAME, detail)


def _files(log: Log) -> Iterator[Finding]:
    """Shards that are listed, numbered and paired, and files that belong to no run."""
    files = log.tree()
    listed = {shard.name: shard for shard in log.manifest.shards}
    found = {*log.shards, *log.token_shards}
    for name in sorted(listed.keys() | found):
        for folder in FOLDERS:
            path = f"{folder}/{name}"
            if path in files and name not in listed and log.manifest.closed:
                yield Finding("files", "error", path, "not in the manifest of the closed run")
            elif path not in files and name in listed:
                yield Finding("files", "error", path, "missing: the manifest lists it")
            elif path not in files and _last_of_open_run(log, name):
                detail = "missing: the capture stopped between the two files of its last pair"
                yield Finding("files", "warning", path, detail)
            elif path not in files:
                yield Finding("files", "error", path, "missing beside its other half")
        size = sum(files.get(f"{folder}/{name}", 0) for folder in FOLDERS)
        if name in listed and name in found and size != listed[name].bytes:
            detail = f"{size:,} bytes in its two files, the manifest says {listed[name].bytes:,}"
            yield Finding("files", "error", name, detail)
    yield from _numbers(log, found, files)
    for path in files:
        yield from _foreign(path)
    total = sum(size for path, size in files.items() if path.startswith(FOLDERS))
    yield Finding("files", "ok", log.path, f"{len(files):,} files, {total:,} bytes in shards")


def _last_of_open_run(log: Log, name: str) -> bool:
    """Whether a shard is the last of its rank in a run that is not closed."""
    rank = name.partition("-")[0]
    last = max(n for n in (*log.shards, *log.token_shards) if n.startswith(rank))
    return log.manifest.closed is None and name == last


def _numbers(log: Log, found: set[str], files: dict[str, int]) -> Iterator[Finding]:
    """Shards are numbered from 0 within their rank, and each rank of the launch has a manifest."""
    numbers: dict[int, set[int]] = {}
    for name in found | {shard.name for shard in log.manifest.shards}:
        rank, number = rank_and_number(name)
        numbers.setdefault(rank, set()).add(number)
    for rank in sorted(set(range(log.manifest.ranks)) - set(numbers)):
        if manifest_name(rank) not in files:
            yield Finding(
                "files",
                "error" if log.manifest.closed else "warning",
                manifest_name(rank),
                f"missing: of the {log.manifest.ranks} processes of the capture, number {rank} "
                "wrote nothing; its share of the text is not in the run",
            )
    for rank, mine in sorted(numbers.items()):
        if manifest_name(rank) not in files:
            yield Finding(
                "files", "error", manifest_name(rank), f"missing: there are shards of rank {rank}"
            )
        for number in sorted(set(range(max(mine))) - mine):
            yield Finding(
                "files",
                "error",
                f"rank{rank:05d}-{number:05d}.parquet",
                f"missing from both folders: shards of rank {rank} go on to {max(mine):05d}",
            )


def _foreign(path: str) -> Iterator[Finding]:
    folder, _, name = path.rpartition("/")
    top = path.split("/")[0]
    if name.endswith(".part"):
        yield Finding("files", "warning", path, "unfinished: its rows are not part of the run")
    elif folder in FOLDERS and not SHARD_NAME.fullmatch(name):
        yield Finding("files", "warning", path, "not the name of a shard: it is not read")
    elif top not in (*_KNOWN_FOLDERS, "kde.parquet", CARD_NAME, MANIFEST_NAME) and not (
        path.startswith("run.rank") and path.endswith(".json")
    ):
        yield Finding("files", "warning", path, "not part of a run: it is not read")


def _null_model(log: Log) -> Iterator[Finding]:
    expected = log.manifest.routing.kde_sha256
    where = "kde.parquet"
    try:
        null = log.kde
    except CorruptKde as error:
        yield Finding("null model", "error", where, str(error))
        return
    if null is None:
        if expected is not None:
            yield Finding("null model", "error", where, "missing: the run was routed by it")
        return
    yield Finding("null model", "ok", where, f"{len(null)} layers, sha256 {null.sha256[:12]}...")


def _replays(log: Log) -> Iterator[Finding]:
    for status, where, detail in replay_problems(log):
        yield Finding("replay", "error" if status == "error" else "warning", where, detail)


def _orders_by_logit(log: Log) -> bool:
    """Whether the rule chose experts in order of falling logit: under one null for all experts."""
    options = log.manifest.routing.options
    if options is None or options.p_values != "kde":
        return False
    if not options.named.tests:
        return True
    try:
        return log.kde is not None and log.kde.pooled
    except CorruptKde:  # told by the check of the null model
        return False


def _shards(log: Log, scope: Scope) -> Iterator[Finding]:
    """Every pair of shards, row by row, and the totals over them."""
    listed = {shard.name: shard for shard in log.manifest.shards}
    # by rank, since each counts its sequences from 0: digest of a pair's tokens -> its name
    seen: dict[tuple[int, bytes], str] = {}
    texts: dict[int, tuple[int, int | None]] = {}  # by rank: tokens, and their fingerprint
    spans: dict[int, dict[str, NDArray[np.int64]]] = {}  # by rank and name
    whole: set[str] = set()
    broken: set[str] = set()
    rows = tokens = nonfinite = 0
    with closing(pairs_of(log, scope, by_logit=_orders_by_logit(log))) as pairs:
        for pair in pairs:
            rank, _ = rank_and_number(pair.name)
            twin = seen.setdefault((rank, pair.digest), pair.name) if pair.digest else pair.name
            if twin != pair.name:
                pair.problems.append(("rows", f"holds the same tokens as {twin}"))
            else:
                spans.setdefault(rank, {})[pair.name] = pair.spans
            before, text = texts.get(rank, (0, 0))
            known = None if text is None or pair.fingerprint is None else text + pair.fingerprint
            texts[rank] = before + pair.tokens, None if known is None else known % (1 << 64)
            yield from _told(pair, listed.get(pair.name))
            if pair.whole:
                whole.add(pair.name)
            elif pair.problems:
                broken.add(pair.name)
            rows, tokens = rows + pair.rows, tokens + pair.tokens
            nonfinite += pair.nonfinite
    yield from _twice(texts)
    for of_rank in spans.values():
        for name, detail in shared_tokens(log, of_rank):
            broken.add(name)
            yield Finding("rows", "error", name, detail)
    if broken:
        n_whole = len(whole - broken)
        detail = f"{n_whole:,} whole, {len(broken):,} not: see the errors above"
        yield Finding("shards", "warning", log.path, detail)
    else:
        detail = f"{_pairs(len(whole))}: {rows:,} rows of {tokens:,} tokens, every page read"
        yield Finding("shards", "ok", log.path, detail)
        yield from _totals(log, rows, tokens, nonfinite)


def _twice(texts: dict[int, tuple[int, int | None]]) -> Iterator[Finding]:
    """Ranks that logged the same tokens at the same places: every count of them doubles."""
    first: dict[tuple[int, int], int] = {}
    for rank, (tokens, text) in sorted(texts.items()):
        if not tokens or text is None:
            continue
        twin = first.setdefault((tokens, text), rank)
        if twin != rank:
            detail = (
                f"logged the same {tokens:,} tokens as rank {twin}, so each counts twice: were "
                "they spread over one model, or given the same text? Keep the shards of one of them"
            )
            yield Finding("rows", "error", manifest_name(rank), detail)


def _told(pair: Pair, entry: ShardEntry | None) -> Iterator[Finding]:
    """What is wrong with a pair, and with what the manifest says of it."""
    if entry is not None and not pair.problems and pair.counts != (entry.rows, entry.tokens):
        detail = (
            f"{pair.rows:,} rows of {pair.tokens:,} tokens, the manifest says {entry.rows:,} "
            f"of {entry.tokens:,}"
        )
        pair.problems.append(("totals", detail))
    for check, problem in pair.problems:
        yield Finding(check, "error", pair.name, problem)
    for problem in pair.remarks:
        yield Finding("rows", "warning", pair.name, problem)


def _totals(log: Log, rows: int, tokens: int, nonfinite: int) -> Iterator[Finding]:
    totals = log.manifest.totals
    if log.manifest.closed is None:
        return
    expected = {"rows": totals.rows, "tokens": totals.tokens, "nonfinite": totals.nonfinite}
    if not log.has_logits:
        nonfinite = totals.nonfinite  # of logits that were not kept
    found = {"rows": rows, "tokens": tokens, "nonfinite": nonfinite}
    for name, count in found.items():
        if count != expected[name]:
            detail = f"{name}: {expected[name]:,} in the manifest, {count:,} in the shards"
            yield Finding("totals", "error", MANIFEST_NAME, detail)
    if found == expected:
        detail = f"{rows:,} rows, {tokens:,} tokens, {nonfinite:,} rows with a NaN or infinity"
        yield Finding("totals", "ok", MANIFEST_NAME, detail)


def _pairs(n: int) -> str:
    return f"{n:,} shard {'pair' if n == 1 else 'pairs'}"
