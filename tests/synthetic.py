"""Runs made without a model: real files with chosen logits, for tests and benchmarks."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from bhlog.capture.contract.files import write_shard
from bhlog.capture.contract.manifest import Manifest, ModelInfo, Routing, ShardEntry, Totals
from bhlog.capture.contract.null.histogram import Histogram
from bhlog.capture.contract.null.model import KdeModel, LayerNull, NullCurve
from bhlog.capture.contract.opening import seal_of
from bhlog.capture.contract.rule import BhOptions, Decisions, decide, finite_keys, softmax_weights
from bhlog.capture.contract.schema import PHASES, routing_schema, shard_name, tokens_schema

TOP_K = 8


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round float32 values to the nearest bfloat16, kept as float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def normal_logits(rng: np.random.Generator, rows: int, n_experts: int) -> NDArray[np.float32]:
    """(rows, E) float32 on the bfloat16 lattice: a normal bulk with a few strong experts a row."""
    logits = rng.normal(-1.0, 1.0, (rows, n_experts)).astype(np.float32)
    strong = rng.integers(0, n_experts, (rows, 3))
    np.put_along_axis(logits, strong, rng.normal(2.5, 1.0, (rows, 3)).astype(np.float32), 1)
    return to_bfloat16(logits)


def real_logits(
    rng: np.random.Generator, rows: int, n_experts: int, *, x0: float, dx: float, cdf: NDArray
) -> NDArray[np.float32]:
    """(rows, E) float32 on the bfloat16 lattice, by inverse sampling from one layer's CDF."""
    grid = x0 + dx * np.arange(len(cdf))
    return to_bfloat16(np.interp(rng.random((rows, n_experts)), cdf, grid).astype(np.float32))


def normal_null(layer: int, *, mean: float = -0.8, sd: float = 1.2) -> LayerNull:
    """A pooled null with a normal tail on a grid of 2^-6 logits and a small histogram behind it."""
    dx = 2.0**-6
    grid = np.arange(-12, 12 + dx, dx)
    values = np.random.default_rng(layer).normal(mean, sd, 500).astype(np.float32)
    curve = NullCurve(
        expert=None,
        n=500,
        x0=float(grid[0]),
        dx=dx,
        tail=np.array([math.erfc((x - mean) / (sd * math.sqrt(2))) / 2 for x in grid]),
        histogram=Histogram.of(values),
        kernel="gaussian",
        bandwidth=0.1,
        rule="fixed",
        source=("synthetic",),
    )
    return LayerNull(layer, (curve,))


def normal_kde(layers: Sequence[int]) -> KdeModel:
    """normal_null for each layer."""
    return KdeModel({layer: normal_null(layer) for layer in layers})


def same_histogram(a: Histogram, b: Histogram) -> bool:
    """Whether both hold the same numbers."""
    return (
        (a.first, a.left_out) == (b.first, b.left_out)
        and np.array_equal(a.counts, b.counts)
        and np.array_equal(a.spread, b.spread)
    )


def native_decisions(logits: NDArray[np.float32], top_k: int) -> Decisions:
    """The model's own top-k, ties to the lower expert."""
    order = np.argsort(-finite_keys(logits), axis=1, kind="stable")[:, :top_k]
    k = np.full(len(logits), top_k, dtype=np.uint16)
    return Decisions(order.astype(np.uint16), k, np.zeros_like(k))


def routing_table(
    *,
    layer: int,
    logits: NDArray[np.float32],
    sequence: NDArray,
    position: NDArray,
    token_id: NDArray | None,
    phase: NDArray,
    forward: NDArray,
    decisions: Decisions,
    weights: NDArray[np.float32],
    native: bool,
    rank: int = 0,
) -> pa.Table:
    """Rows of one layer as a table of routing_schema."""
    T, E = logits.shape
    chosen = np.arange(decisions.order.shape[1]) < decisions.n_selected[:, None]
    offsets = np.concatenate([[0], np.cumsum(decisions.n_selected, dtype=np.int64)])
    schema = routing_schema(E)
    columns = {
        "layer": np.full(T, layer, np.uint16),
        "sequence": sequence.astype(np.uint32),
        "position": position.astype(np.uint32),
        "token_id": pa.nulls(T, pa.int32()) if token_id is None else token_id.astype(np.int32),
        "phase": pa.DictionaryArray.from_arrays(phase.astype(np.int8), list(PHASES)),
        "forward": forward.astype(np.uint32),
        "logits": pa.FixedSizeListArray.from_arrays(
            pa.array(logits.ravel()), type=schema.field("logits").type
        ),
        "experts": pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()),
            pa.array(decisions.order[chosen]),
            type=schema.field("experts").type,
        ),
        "weights": pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()),
            pa.array(weights[chosen]),
            type=schema.field("weights").type,
        ),
        "n_selected": decisions.n_selected,
        "n_rejected": pa.nulls(T, pa.uint16()) if native else decisions.n_rejected,
        "rank": np.full(T, rank, np.uint16),
    }
    return pa.table(columns, schema=schema)


def write_run(
    folder: Path,
    *,
    layers: Sequence[int] = (0, 1, 2),
    n_experts: int = 16,
    n_sequences: int = 4,
    length: int = 50,
    n_shards: int = 2,
    top_k: int = TOP_K,
    options: BhOptions | None = None,
    kde: KdeModel | None = None,
    token_ids: bool = True,
    sources: Sequence[str] = ("docs", "code"),
    sample_ids: Sequence[str | None] = (None,),
    decode_from: int | None = None,
    n_ranks: int = 1,
    cdfs: dict[str, NDArray] | None = None,
    logits: NDArray[np.float32] | None = None,
    seed: int = 0,
    sealed: bool = False,
) -> Path:
    """Write a whole run: manifest, null model if given, routing and token shards.

    Args:
        options: BH options; None for native top-k routing. BH needs kde.
        decode_from: position from which tokens count as decoded, one forward each.
        cdfs: arrays x0, dx, cdf by layer (16 layers), to draw logits with real marginals.
        logits: (len(layers), n_shards, tokens per shard, E): chosen logits in place of drawn ones.
        sealed: whether the manifest seals the shards, as that of a capture does; tests that change
            a shard to see what its rows are checked for leave it out.

    Sequence s is read by forward s (prefill); its source is sources[s % len(sources)], its
    sample_id sample_ids[s % len(sample_ids)].
    """
    rng = np.random.default_rng(seed)
    for name in ("routing", "tokens"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    sha256 = kde.save(folder / "kde.parquet") if kde is not None else None
    thresholds = kde.thresholds(options.alpha, n_experts) if options and kde else {}
    entries: list[ShardEntry] = []
    nonfinite = 0
    sequences = np.array_split(np.arange(n_sequences), n_shards)
    for number, part in enumerate(sequences):
        rank, name_number = number % n_ranks, number // n_ranks
        sequence = np.repeat(part, length)
        position = np.tile(np.arange(length), len(part))
        T = len(sequence)
        token_id = rng.integers(97, 123, T)
        phase = np.zeros(T, np.int8)
        forward = sequence.copy()
        if decode_from is not None:
            phase = (position >= decode_from).astype(np.int8)
            forward = np.where(phase, n_sequences + position, sequence)
        tables = []
        for i, layer in enumerate(layers):
            if logits is not None:
                l = logits[i, number]
            elif cdfs is not None:
                row = layer % len(cdfs["x0"])
                l = real_logits(
                    rng,
                    T,
                    n_experts,
                    x0=float(cdfs["x0"][row]),
                    dx=float(cdfs["dx"][row]),
                    cdf=cdfs["cdf"][row],
                )
            else:
                l = normal_logits(rng, T, n_experts)
            nonfinite += int((~np.isfinite(l)).any(axis=1).sum())
            if options is None:
                decisions = native_decisions(l, top_k)
                weights = softmax_weights(l, decisions)
            else:
                low, high = options.bounds(n_experts)
                decisions = decide(l, thresholds[layer], min_k=low, max_k=high)
                weights = softmax_weights(
                    l,
                    decisions,
                    temperature=options.temperature,
                    renormalize=options.renormalizes(False),
                )
            tables.append(
                routing_table(
                    layer=layer,
                    logits=l,
                    sequence=sequence,
                    position=position,
                    token_id=token_id if token_ids else None,
                    phase=phase,
                    forward=forward,
                    decisions=decisions,
                    weights=weights,
                    native=options is None,
                    rank=rank,
                )
            )
        nll = rng.gamma(2.0, 1.0, T).astype(np.float32)
        tokens = pa.table(
            {
                "rank": np.full(T, rank, np.uint16),
                "sequence": sequence.astype(np.uint32),
                "position": position.astype(np.uint32),
                "token_id": token_id.astype(np.int32) if token_ids else pa.nulls(T, pa.int32()),
                "phase": pa.DictionaryArray.from_arrays(phase, list(PHASES)),
                "forward": forward.astype(np.uint32),
                "nll": pa.array(nll, mask=position == 0),
                "source": pa.DictionaryArray.from_arrays(
                    (sequence % len(sources)).astype(np.int32), list(sources)
                ),
                "sample_id": pa.array(
                    [sample_ids[s % len(sample_ids)] for s in sequence], pa.string()
                ).dictionary_encode(),
                "role": pa.nulls(T, pa.string()).dictionary_encode(),
                "parent": pa.nulls(T, pa.uint32()),
            },
            schema=tokens_schema(),
        )
        name = shard_name(rank, name_number)
        size = write_shard(folder / "routing" / name, tables)
        size += write_shard(folder / "tokens" / name, [tokens])
        rows = sum(table.num_rows for table in tables)
        paths = [folder / inside / name for inside in ("routing", "tokens")]
        seals = map(seal_of, paths) if sealed else (None, None)
        entries.append(ShardEntry(name, rows, tokens.num_rows, size, *seals))
    for rank in range(n_ranks):
        mine = tuple(e for e in entries if e.name.startswith(f"rank{rank:05d}"))
        Manifest(
            run_id=f"{seed:032x}",
            created="2026-01-01T00:00:00+00:00",
            closed="2026-01-01T00:01:00+00:00",
            model=ModelInfo(
                name="synthetic",
                class_name="SyntheticForCausalLM",
                revision=None,
                layers=tuple(layers),
                n_experts=n_experts,
                top_k=top_k,
                norm_topk_prob=False,
            ),
            routing=Routing(
                options.named.name if options else "native", options, sha256 if options else None
            ),
            token_ids=token_ids,
            versions={"bhlog": "0", "torch": "0", "transformers": "0"},
            totals=Totals(
                rows=sum(e.rows for e in mine),
                tokens=sum(e.tokens for e in mine),
                shards=len(mine),
                forwards=n_sequences,
                nonfinite=nonfinite if rank == 0 else 0,
            ),
            shards=mine,
        ).write(folder, rank)
    return folder


def without_logits(folder: Path) -> Path:
    """Rewrite a run of one rank as one that holds decisions alone."""
    manifest = Manifest.from_json((folder / "run.json").read_bytes(), "run.json")
    entries = []
    for entry in manifest.shards:
        path = folder / "routing" / entry.name
        with pq.ParquetFile(path) as shard:
            groups = [shard.read_row_group(i).drop(["logits"]) for i in range(shard.num_row_groups)]
        size = write_shard(path, groups) + (folder / "tokens" / entry.name).stat().st_size
        entries.append(replace(entry, bytes=size))
    replace(manifest, shards=tuple(entries), logits=False).write(folder)
    return folder


def with_many_shards(run: Path, n: int = 1000) -> Path:
    """The run, of one shard, with that shard listed n times."""
    manifest = Manifest.from_json((run / "run.json").read_text(), "run.json")
    (entry,) = manifest.shards
    names = [shard_name(0, number) for number in range(n)]
    for folder in ("routing", "tokens"):
        for name in names[1:]:
            os.link(run / folder / entry.name, run / folder / name)
    replace(manifest, shards=tuple(replace(entry, name=name) for name in names)).write(run)
    return run
