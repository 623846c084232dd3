"""Verification: is a run whole, and does it keep what the log promises?"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from analysis.log import Log, Progress, logits_of
from analysis.replay import padded_experts
from capture.bh import finite_keys
from capture.errors import CorruptKde, CorruptShard
from capture.manifest import MANIFEST_NAME
from capture.schema import SHARD_NAME

_IDENTITY = ("rank", "sequence", "position")
_KNOWN_FOLDERS = ("routing", "tokens", "figures", "replay")


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        status: "ok", "warning" (worth knowing, nothing lost) or "error".
        where: file or part of the run.
        detail: what was found, and what was expected.
    """

    status: str
    where: str
    detail: str


def verify(log: Log, progress: Progress | None = None) -> list[Finding]:
    """Check a run's files against each other and against what the log promises.

    Reads every page of every shard; holds one row group at a time.
    """
    return [*_manifest(log), *_files(log), *_kde(log), *_shards(log, progress)]


def _manifest(log: Log) -> Iterator[Finding]:
    manifest = log.manifest
    if manifest.error:
        yield Finding("warning", MANIFEST_NAME, f"the capture ended early: {manifest.error}")
    if manifest.closed is None:
        yield Finding(
            "warning",
            MANIFEST_NAME,
            "not closed: the capture is still running or was killed; rows since the last sealed "
            "shard are missing, and totals are what is on disk",
        )
        return
    listed = {shard.name for shard in manifest.shards}
    for folder, names in (("routing", log.shards), ("tokens", log.token_shards)):
        for name in sorted(listed - set(names)):
            yield Finding("error", f"{folder}/{name}", "missing: the manifest lists it")
        for name in sorted(set(names) - listed):
            yield Finding("error", f"{folder}/{name}", "not listed in the manifest")


def _files(log: Log) -> Iterator[Finding]:
    for path in log.tree():
        folder, _, name = path.rpartition("/")
        if name.endswith(".part"):
            yield Finding("warning", path, "unfinished: its rows are not part of the run")
        elif folder in ("routing", "tokens"):
            if not SHARD_NAME.fullmatch(name):
                yield Finding("warning", path, "not a shard's name: it is not read")
        elif path.split("/")[0] not in (*_KNOWN_FOLDERS, "kde.parquet") and not (
            name.startswith("run.") and name.endswith(".json")
        ):
            yield Finding("warning", path, "not part of a run: it is not read")


def _kde(log: Log) -> Iterator[Finding]:
    expected = log.manifest.routing.kde_sha256
    try:
        null = log.kde
    except CorruptKde as error:
        yield Finding("error", "kde.parquet", str(error))
        return
    if null is None:
        if expected is not None:
            yield Finding("error", "kde.parquet", "missing: the run was routed by it")
        return
    if expected is not None:
        with log.open_file("kde.parquet") as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found != expected:
            yield Finding(
                "error",
                "kde.parquet",
                f"sha256 is {found[:12]}..., the manifest says {expected[:12]}...: this is not the "
                "null model that the run was routed by",
            )
            return
    yield Finding("ok", "kde.parquet", f"null model of {len(null)} layers")


def _shards(log: Log, progress: Progress | None) -> Iterator[Finding]:
    listed = {shard.name: shard for shard in log.manifest.shards}
    rows = tokens = 0
    for name in sorted({*log.shards, *log.token_shards}):
        problems: list[str] = []
        try:
            counts = _check_pair(log, name, problems, progress)
        except CorruptShard as error:
            yield Finding("error", name, str(error))
            continue
        entry = listed.get(name)
        if counts and entry is not None and counts != (entry.rows, entry.tokens):
            problems.append(
                f"{counts[0]:,} rows and {counts[1]:,} tokens, the manifest says {entry.rows:,} "
                f"and {entry.tokens:,}"
            )
        for problem in problems:
            yield Finding("error", name, problem)
        if counts and not problems:
            yield Finding("ok", name, f"{counts[0]:,} rows of {counts[1]:,} tokens")
            rows, tokens = rows + counts[0], tokens + counts[1]
    totals = log.manifest.totals
    if log.manifest.closed and (rows, tokens) != (totals.rows, totals.tokens):
        yield Finding(
            "error",
            MANIFEST_NAME,
            f"totals are {totals.rows:,} rows of {totals.tokens:,} tokens; whole shards hold "
            f"{rows:,} of {tokens:,}",
        )


def _check_pair(
    log: Log, name: str, problems: list[str], progress: Progress | None
) -> tuple[int, int] | None:
    """Check a routing shard with its token shard; return their rows, None if one is missing."""
    for folder, names in (("routing", log.shards), ("tokens", log.token_shards)):
        if name not in names:
            if log.manifest.closed:
                problems.append(f"{folder}/{name} is missing beside its other half")
            return None
    tokens = _read_tokens(log, name)
    expected = np.stack([tokens[column].to_numpy() for column in _IDENTITY])
    rows = 0
    layers = set()
    for group in log.row_groups():
        if group.shard != name:
            continue
        columns = ["layer", *_IDENTITY, "logits", "experts", "weights", "n_selected", "n_rejected"]
        batch = log.read(group, columns)
        rows += group.rows
        layers.add(group.layer)
        found = np.stack([batch.column(column).to_numpy() for column in _IDENTITY])
        if not np.array_equal(found, expected):
            problems.append(f"layer {group.layer} holds other tokens than tokens/{name}")
        problems += [f"layer {group.layer}: {p}" for p in _row_problems(log, batch)]
        if progress is not None:
            progress(group.rows)
    missing = sorted(set(log.layers) - layers)
    if missing:
        problems.append(f"no rows of layers {', '.join(map(str, missing))}")
    return rows, tokens.num_rows


def _read_tokens(log: Log, name: str) -> pa.Table:
    try:
        table: pa.Table = log.open_shard("tokens", name).read()
    except (pa.ArrowException, OSError) as error:
        raise CorruptShard(
            f"{log.path}/tokens/{name}: cannot be read ({str(error).splitlines()[0]})"
        ) from error
    return table


def _row_problems(log: Log, batch: pa.RecordBatch) -> Iterator[str]:
    """What is wrong with the decisions of a batch."""
    E = log.n_experts
    experts, n = batch.column("experts"), batch.column("n_selected").to_numpy()
    flat = experts.flatten().to_numpy()
    if not np.array_equal(experts.value_lengths().to_numpy(zero_copy_only=False), n):
        yield "n_selected is not the number of experts"
        return
    if not np.array_equal(batch.column("weights").value_lengths(), experts.value_lengths()):
        yield "weights and experts differ in number"
    if flat.max(initial=0) >= E:
        yield f"expert {flat.max()} of {E}"
        return
    width = int(n.max(initial=0))
    logged = padded_experts(experts, max(1, width)).astype(np.int64)
    used = np.arange(logged.shape[1]) < n[:, None]
    marked: NDArray[np.int64] = np.where(used, logged, E + np.arange(logged.shape[1]))
    if (np.diff(np.sort(marked, axis=1), axis=1) == 0).any():
        yield "an expert is chosen twice in a row"
    if log.kde is None or log.kde.pooled:
        keys = np.take_along_axis(finite_keys(logits_of(batch)), logged, axis=1)
        falls = (keys[:, 1:] <= keys[:, :-1]) | ~used[:, 1:]
        options = log.manifest.routing.options
        if not falls.all() and (options is None or options.p_values == "kde"):
            yield "experts are not in order of falling logit"
