"""The manifests of opened runs as a table, a row a run."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from bhlog.analysis.log import Log
from bhlog.capture.contract.errors import CorruptManifest
from bhlog.capture.contract.manifest import Totals

RUNS = pa.schema(
    [
        ("run", pa.string()),
        ("path", pa.string()),
        ("run_id", pa.string()),
        ("created", pa.string()),
        ("closed", pa.string()),
        ("model", pa.string()),
        ("class_name", pa.string()),
        ("revision", pa.string()),
        ("dtype", pa.string()),
        ("layers", pa.list_(pa.uint16())),
        ("n_experts", pa.uint16()),
        ("top_k", pa.uint16()),
        ("norm_topk_prob", pa.bool_()),
        ("scoring", pa.string()),
        ("routing", pa.string()),
        ("policy", pa.string()),
        ("alpha", pa.float64()),
        ("min_k", pa.uint16()),
        ("max_k", pa.uint16()),
        ("temperature", pa.float64()),
        ("renormalize", pa.string()),
        ("p_values", pa.string()),
        ("kde_sha256", pa.string()),
        ("sample_every", pa.uint32()),
        ("token_ids", pa.bool_()),
        *((name, pa.int64()) for name in asdict(Totals())),
        ("error", pa.string()),
        ("versions", pa.map_(pa.string(), pa.string())),
    ]
)


def runs_table(runs: Mapping[str, Log]) -> pa.Table:
    """A row per run: its manifest, flattened.

    Raises:
        CorruptManifest: a field is not of its kind.
    """
    tables = [RUNS.empty_table()]
    for name, log in runs.items():
        try:
            tables.append(pa.Table.from_pylist([_run_row(name, log)], RUNS))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise CorruptManifest(
                f"{log.path}: a field of its manifest is not of its kind ({reason})"
            ) from error
    return pa.concat_tables(tables)


def _run_row(name: str, log: Log) -> dict[str, Any]:
    manifest = log.manifest
    options = manifest.routing.options
    chosen = asdict(options) if options else {}
    if options:
        chosen["alpha"], chosen["policy"] = options.tested_alpha, str(options.named)
        chosen["renormalize"] = str(options.renormalize).lower()
    row = {
        **asdict(manifest),
        **asdict(manifest.model),
        **asdict(manifest.totals),
        **chosen,
        "run": name,
        "path": log.path,
        "model": manifest.model.name,
        "routing": manifest.routing.kind,
        "kde_sha256": manifest.routing.kde_sha256,
        "versions": list(manifest.versions.items()),
    }
    return {column: row.get(column) for column in RUNS.names}
