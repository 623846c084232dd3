"""Replays beside a log: whether their parts are those that were written."""

from collections.abc import Iterator

import pyarrow as pa

from bhlog.analysis.log import Log
from bhlog.analysis.replay.listed import LIST_NAME
from bhlog.analysis.replay.parts import SCHEMA
from bhlog.capture.contract.errors import CorruptShard, one_line


def replay_problems(log: Log) -> Iterator[tuple[str, str, str]]:
    """(status, path, detail) of what is wrong with a run's replays, or is not known of them."""
    sizes = log.tree()
    for folder in log.replay_folders:
        try:
            parts = log.replay_parts(folder)
        except CorruptShard as error:
            yield "error", folder, str(error)
            continue
        found = {path for path in sizes if path.rpartition("/")[0] == folder}
        if parts is None:
            detail = f"no {LIST_NAME}: of an earlier bhlog, or not whole; not checked"
            yield "warning", folder, detail
            continue
        for path in sorted(found - {f"{folder}/{name}" for name in (*parts, LIST_NAME)}):
            yield "error", path, f"not in {LIST_NAME}"
        for name in sorted(set(log.shards) - set(parts)):
            yield "error", f"{folder}/{name}", f"a shard of the run that {LIST_NAME} does not list"
        for name in parts:
            problem = _part_problem(log, f"{folder}/{name}")
            if problem is not None:
                yield "error", f"{folder}/{name}", problem


def _part_problem(log: Log, path: str) -> str | None:
    """Read a part through; what is wrong with it."""
    try:
        with log.open_file(path) as file:
            part = log.open_parquet(path, file, SCHEMA)
            for _ in part.iter_batches(1 << 16, use_threads=False):
                pass
    except CorruptShard as error:
        return str(error)
    except (pa.ArrowException, OSError) as error:
        return f"cannot be read ({one_line(str(error).splitlines()[0])}); make the replay again"
    return None
