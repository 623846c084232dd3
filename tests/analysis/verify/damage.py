"""Ways to damage a run, and what verification then finds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.analysis.run import open_log
from bhlog.analysis.verify.verification import verify
from bhlog.capture.contract.files import write_shard
from bhlog.capture.contract.manifest import Manifest
from bhlog.capture.contract.rule import BhOptions
from bhlog.capture.contract.schema import shard_name
from tests.synthetic import normal_kde, write_run

LAYERS, E = (1, 4), 8
LAST = shard_name(0, 2)


def small_run(folder: Path) -> Path:
    """Three pairs of two sequences of five tokens, routed by BH."""
    return write_run(
        folder,
        layers=LAYERS,
        n_experts=E,
        n_sequences=6,
        length=5,
        n_shards=3,
        options=BhOptions(alpha=0.3, max_k=4),
        kde=normal_kde(LAYERS),
    )


def errors(run):
    return [(f.check, f.where, f.detail) for f in verify(open_log(run)) if f.status == "error"]


def only_error(run):
    found = errors(run)
    assert len(found) == 1, found
    return found[0]


def warnings(run):
    return [(f.where, f.detail) for f in verify(open_log(run)) if f.status == "warning"]


def details(run):
    return {f.check: f.detail for f in verify(open_log(run))}


def edit_manifest(run, **changes):
    manifest = Manifest.from_json((run / "run.json").read_bytes(), "run.json")
    replace(manifest, **changes).write(run)


def reopen(run):
    """Make the run look as if its capture had been killed."""
    edit_manifest(run, closed=None, shards=(), totals=type(open_log(run).manifest.totals)())


def edit_shard(run, change, *, folder="routing", name=LAST, keep_manifest=False):
    """Rewrite a shard with change(table) in its place, and its size in the manifest."""
    path = run / folder / name
    table = change(pq.read_table(path))
    groups = [table]
    if folder == "routing" and "layer" in table.column_names:
        layers = np.asarray(table["layer"])
        groups = [table.filter(pa.array(layers == layer)) for layer in np.unique(layers)]
    write_shard(path, groups)
    if not keep_manifest:
        entries = tuple(
            replace(s, bytes=sum((run / f / s.name).stat().st_size for f in ("routing", "tokens")))
            for s in open_log(run).manifest.shards
        )
        edit_manifest(run, shards=entries)


def with_column(name, values):
    def change(table):
        at = table.column_names.index(name)
        field = table.schema.field(name)
        new = values(table[name]) if callable(values) else values
        return table.set_column(at, field, pa.chunked_array([pa.array(new, type=field.type)]))

    return change


def edited(change_list):
    """Values of a column as a Python list, changed in place."""

    def values(column):
        items = column.to_pylist()
        change_list(items)
        return items

    return values
