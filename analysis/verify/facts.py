"""Facts: what a run is and what it holds, counted from its files."""

import shlex
from typing import Any

from bhlog.analysis.log import Log
from bhlog.capture.contract.errors import CorruptShard


def facts_of(log: Log) -> dict[str, Any]:
    """Facts of a run by name, in the order to show them.

    Rows, tokens, bytes and sources are counted from the sealed shards, whether the run is closed or
    not; files that cannot be read are counted as such. What only a closed run knows is None before.
    """
    manifest, model = log.manifest, log.manifest.model
    facts: dict[str, Any] = {
        "run": log.path,
        "run_id": manifest.run_id,
        **{
            name: manifest.options[name]
            for name in ("engine", "weights")
            if name in manifest.options
        },
        "created": manifest.created,
        "closed": manifest.closed,
        "error": manifest.error,
        "model": model.name,
        "class": model.class_name,
        "revision": model.revision,
        "dtype": model.dtype,
        "layers": list(model.layers),
        "experts": model.n_experts,
        "top_k": model.top_k,
        "norm_topk_prob": model.norm_topk_prob,
        "scoring": model.scoring,
        "scale": model.scale,
        "routing": manifest.routing.kind,
        **_options(log),
        "null_model": _null_model(log),
        **_counts(log),
    }
    totals = manifest.totals if manifest.closed else None
    for name in ("forwards", "sampled_out", "dropped", "rejected", "nonfinite"):
        facts[name] = None if totals is None else getattr(totals, name)
    return facts | {
        "sample_every": manifest.sample_every,
        "token_ids": manifest.token_ids,
        "versions": manifest.versions,
        **_origin(log),
    }


def _origin(log: Log) -> dict[str, Any]:
    origin = log.manifest.origin
    if origin is None:
        return {}
    return {
        "command": shlex.join(origin.command) or None,
        "commit": origin.commit,
        "texts": origin.texts,
        "tokenizer": origin.tokenizer,
    }


def _options(log: Log) -> dict[str, Any]:
    options = log.manifest.routing.options
    if options is None:
        return {}
    min_k, max_k = options.bounds(log.n_experts)
    implementation = log.manifest.options.get("experts_implementation")
    return {
        **options.to_json(),
        "alpha": options.tested_alpha,
        "policy": str(options.named),
        "min_k": min_k,
        "max_k": max_k,
        "experts_implementation": implementation,
    }


def _null_model(log: Log) -> str | None:
    if log.kde is None:
        return None
    kind = "pooled over experts" if log.kde.pooled else "a curve per expert"
    return f"{len(log.kde)} layers, {kind}"


def _counts(log: Log) -> dict[str, Any]:
    import pyarrow.compute as pc  # takes long to import, and every open run knows its facts

    rows = tokens = unreadable = n_bytes = 0
    sources: dict[str, int] = {}
    sizes = log.tree()
    for name in log.shards:
        try:
            rows += log.open_shard("routing", name).metadata.num_rows
            n_bytes += sizes[f"routing/{name}"]
        except CorruptShard:
            unreadable += 1
    for name in log.token_shards:
        try:
            source = log.read_tokens(name, ["source"])["source"]
        except CorruptShard:
            unreadable += 1
            continue
        tokens += len(source)
        n_bytes += sizes[f"tokens/{name}"]
        for pair in pc.value_counts(source.cast("string")).to_pylist():
            if pair["values"] is not None:
                sources[pair["values"]] = sources.get(pair["values"], 0) + pair["counts"]
    return {
        "rows": rows,
        "tokens": tokens,
        "sources": dict(sorted(sources.items(), key=lambda item: (-item[1], item[0]))),
        "shards": len(log.shards),
        "unreadable_files": unreadable,
        "missing_files": len(log.missing),
        "bytes": n_bytes,
        "bytes_per_row": round(n_bytes / rows, 1) if rows else None,
    }
