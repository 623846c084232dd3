"""What users run on the world's files, and what a slow, plain reader makes of them.

An answer is made of tuples, numbers and texts; numbers are compared to nine digits.
"""

import contextlib
import io
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bhlog.analysis.cli import main
from bhlog.analysis.database.connection import connect
from bhlog.analysis.nulls import load_null
from bhlog.analysis.run import open_log
from bhlog.analysis.sweep.profile import Profile
from bhlog.analysis.verify.kept_file import verify_file
from bhlog.capture.contract.errors import Corrupt, RouterLogError
from bhlog.capture.contract.null.fit import refit
from tests.fuzz.traces import PATHS, PLAIN, E, K, imported
from tests.fuzz.world import LAYERS, MAX_K, REPLAY

ALPHA = 0.3
TOKENS = ("rank", "sequence", "position", "nll", "source", "parent")


@dataclass(frozen=True)
class Reader:
    """What users run.

    Attributes:
        ask: gives the answer, from the world's folder.
        plain: gives the right one, if it can be told without the product.
        weight: how often it is asked, relative to others.
    """

    ask: Callable[[Path], Any]
    plain: Callable[[Path], Any] | None = None
    weight: int = 4


class Missed(Exception):
    """verify found no error in files that a reader calls corrupt."""


def canonical(answer: Any) -> Any:
    """The answer with floats as text of nine digits: NaN is NaN."""
    if isinstance(answer, dict):
        return tuple((canonical(k), canonical(v)) for k, v in answer.items())
    if isinstance(answer, list | tuple):
        return tuple(map(canonical, answer))
    if isinstance(answer, float):
        return f"{answer + 0.0:.9g}"
    return answer


def replay(root: Path) -> Any:
    run = open_log(root / "run")
    frame = run.replay(ALPHA, kde=None, min_k=1, max_k=MAX_K, temperature=1.0, threads=1)
    return frame.select("layer", "rows", "mean_experts").rows()[:-1]


def sweep(root: Path) -> Any:
    profile = open_log(root / "run").sweep(alphas=[0.01, ALPHA], threads=1)
    return _means(profile)


def _means(profile: Profile) -> Any:
    return [
        (layer, profile.rows(layer), profile.mean_experts(ALPHA, min_k=1, max_k=MAX_K, layer=layer))
        for layer in profile.layers
        if profile.rows(layer)
    ]


def tokens(root: Path) -> Any:
    return _rows(open_log(root / "run").tokens(TOKENS))


def asked(query: str) -> Callable[[Path], Any]:
    """The rows of a query, as bhlog sql reads them."""

    def ask(root: Path) -> Any:
        with connect(open_log(root / "run")) as database:
            batches = database.batches(query)[1]
            return [row for batch in batches for row in _rows(pa.Table.from_batches([batch]))]

    return ask


sql = asked(
    "SELECT layer, sequence, position, logits, experts, n_selected, rank FROM routing ORDER BY ALL"
)
sql_where = asked(  # row groups are skipped by their statistics
    "SELECT layer, sequence, position FROM routing "
    "WHERE layer = 2 AND position < 3 AND sequence > 0 ORDER BY ALL"
)
sql_tokens = asked(f"SELECT {', '.join(TOKENS)} FROM tokens")
sql_replays = asked(
    "SELECT layer, sequence, position, experts, n_selected FROM replays ORDER BY ALL"
)


def verify(root: Path) -> Any:
    """Its errors, raised as one; where it finds none, readers must not find the run corrupt."""
    found = open_log(root / "run").verify()
    bad = found.filter(found["status"] == "error")
    if len(bad):
        raise Corrupt("; ".join(bad["detail"]))
    for ask in (replay, sweep, tokens):
        try:
            ask(root)
        except Corrupt as error:
            raise Missed(f"verify found nothing, but {ask.__name__}: {error}") from error
        except RouterLogError:
            pass
    found, right = canonical(sql_where(root)), canonical(plain_where(root))
    if found != right:
        raise Missed(f"verify found nothing, but SQL answers {found}, not {right}")
    return "ok"


def verify_replayed(root: Path) -> Any:
    found = open_log(root / "run").verify(replay=True)
    bad = found.filter(found["status"] == "error")
    if len(bad):
        raise Corrupt("; ".join(bad["detail"]))
    return "ok"


def others(root: Path) -> Any:
    """Verbs whose answers are not told plainly: they must not fail otherwise."""
    run = open_log(root / "run")
    run.compare(["bh:0.3", "topk:2", "topp:0.5"], threads=1)
    run.check(threads=1)
    run.fit(threads=1)
    return run.replay(0.1, where="nll > 0 AND phase = 'prefill'", threads=1).height


def command(*words: str) -> Callable[[Path], Any]:
    """A command's output; its error, which is a line, as one."""

    def ask(root: Path) -> Any:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([word.replace("ROOT", str(root)) for word in words])
            except SystemExit as end:
                code = int(end.code or 0)
        if code:
            raise Corrupt(err.getvalue().strip("\n") or "findings")
        return "said"

    ask.__name__ = " ".join(words[:2])
    return ask


def _routing(root: Path, names: Sequence[str]) -> pa.Table:
    return _read(sorted((root / "run/routing").iterdir()), names)


def _read(paths: list[Path], names: Sequence[str]) -> pa.Table:
    tables = [
        pq.ParquetFile(path).read(columns=list(names), use_threads=False).select(names)
        for path in paths
        if path.is_file() and path.name.startswith("rank")
    ]
    tables = [table.replace_schema_metadata() for table in tables]
    return pa.concat_tables([table.cast(tables[0].schema) for table in tables])


def _rows(table: pa.Table) -> list[tuple[Any, ...]]:
    columns = (table[name].to_pylist() for name in table.column_names)
    return list(zip(*columns, strict=True))


def plain_rows(root: Path) -> Any:
    names = ["layer", "sequence", "position", "logits", "experts", "n_selected", "rank"]
    return sorted(_rows(_routing(root, names)), key=_as_duckdb)


def _as_duckdb(row: Any) -> Any:
    """A key that sorts as DuckDB does: NaN is the largest number."""
    if isinstance(row, list | tuple):
        return [_as_duckdb(item) for item in row]
    return (math.isnan(row), 0.0 if math.isnan(row) else row)


def plain_where(root: Path) -> Any:
    rows = _rows(_routing(root, ["layer", "sequence", "position"]))
    return sorted(row for row in rows if row[0] == 2 and row[1] > 0 and row[2] < 3)


def plain_tokens(root: Path) -> Any:
    return _rows(_read(sorted((root / "run/tokens").iterdir()), TOKENS))


def plain_replays(root: Path) -> Any:
    names = ["layer", "sequence", "position", "experts", "n_selected"]
    return sorted(_rows(_read(sorted((root / REPLAY).glob("*.parquet")), names)))


def plain_means(root: Path, null: Path | None = None) -> Any:
    """(layer, rows, mean n_selected) by the rule as it is written."""
    curves = _curves(null or root / "run/kde.parquet")
    counts: dict[int, list[int]] = {}
    for layer, row in _rows(_routing(root, ["layer", "logits"])):
        finite = sorted(-x for x in row if math.isfinite(x))
        if not finite:
            continue
        p = [_p_value(curves[layer], -x) for x in finite]
        passing = [k for k, value in enumerate(p, 1) if value <= k * ALPHA / len(row)]
        counts.setdefault(layer, []).append(min(max(passing, default=0), MAX_K))
    return [(i, len(c), sum(max(1, n) for n in c) / len(c)) for i, c in sorted(counts.items())]


def _curves(path: Path) -> dict[int, tuple[float, float, list[float]]]:
    table = pq.ParquetFile(path).read(use_threads=False)
    return {
        row["layer"]: (row["x0"], row["dx"], row["tail"])
        for row in table.select(["layer", "x0", "dx", "tail"]).to_pylist()
        if row["tail"] is not None
    }


def _p_value(curve: tuple[float, float, list[float]], x: float) -> float:
    x0, dx, tail = curve
    u = (x - x0) / dx
    if u < 0 or u > len(tail) - 1:
        return float(u < 0)
    cell = min(int(u), len(tail) - 2)
    return tail[cell] + (u - cell) * (tail[cell + 1] - tail[cell])


def null_replay(root: Path) -> Any:
    frame = open_log(root / "run").replay(
        ALPHA, kde=root / "null.parquet", min_k=1, max_k=MAX_K, temperature=1.0, threads=1
    )
    return frame.select("layer", "rows", "mean_experts").rows()[:-1]


def null_load(root: Path) -> Any:
    model = load_null(root / "null.parquet")
    return [(layer, c.x0, c.dx, c.tail.tolist()) for layer, c in model.curves]


def plain_null(root: Path) -> Any:
    return [(layer, *curve) for layer, curve in sorted(_curves(root / "null.parquet").items())]


def null_refit(root: Path) -> Any:
    return len(refit(load_null(root / "null.parquet")))


def checked(name: str) -> Callable[[Path], Any]:
    def verify_kept(root: Path) -> Any:
        bad = [f.detail for f in verify_file(root / name) if f.status == "error"]
        if bad:
            raise Corrupt("; ".join(bad))
        return "ok"

    return verify_kept


def profile(root: Path) -> Any:
    return _means(Profile.load(root / "profile.parquet"))


def profile_others(root: Path) -> Any:
    found = Profile.load(root / "profile.parquet")
    found.alpha_for(2, max_k=MAX_K)
    found.alphas_for(2, max_k=MAX_K)
    return found.frame([0.1, ALPHA], max_k=MAX_K).height


def plain_profile(root: Path) -> Any:
    means = []
    for row in pq.ParquetFile(root / "profile.parquet").read(use_threads=False).to_pylist():
        width, n = len(row["alphas"]) + 1, 0
        seen = sum(alpha <= ALPHA for alpha in row["alphas"])
        ranks = [row["counts"][i : i + width] for i in range(0, len(row["counts"]), width)]
        total = sum(ranks[0])
        # a row whose critical alpha of rank k is at most ALPHA rejects at least k
        n = sum(sum(rank[:seen]) for rank in ranks[1:MAX_K]) + total
        if total:
            means.append((row["layer"], total, n / total))
    return means


def pickles(root: Path) -> Any:
    model = load_null(root / "pickles")
    return [(layer, c.x0, c.dx, c.tail.tolist()) for layer, c in model.curves]


class _Arrays(pickle._Unpickler):
    """Python's own reader of pickles, the one in Python, which knows numpy's arrays alone."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" == "_codecs.encode" or (
            module.startswith("numpy")
            and name in ("_reconstruct", "ndarray", "dtype", "_frombuffer")
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def plain_pickles(root: Path) -> Any:
    found = []
    for layer in LAYERS:
        data = (root / f"pickles/distribution_model_layer_{layer}.pkl").read_bytes()
        arrays = _Arrays(io.BytesIO(data)).load()
        x, cdf = (arrays[key].astype(np.float64) for key in ("x", "cdf"))
        tail = 1.0 - np.clip(np.maximum.accumulate(cdf), 0.0, 1.0)
        found.append((layer, float(x[0]), float((x[-1] - x[0]) / (len(x) - 1)), tail.tolist()))
    return found


def imported_by_command(format: str) -> Callable[[Path], Any]:
    told = {"numpy": ("--top-k", str(K)), "vllm": ("--n-experts", str(E))}
    told["sglang"] = (*told["numpy"], *told["vllm"])
    words = ("import", format, f"ROOT/{PATHS[format]}", "--out", "ROOT/imported")
    return command(*words, *told.get(format, ()))


RUN = {
    "verify": Reader(verify),
    "verify_replayed": Reader(verify_replayed, weight=1),
    "replay": Reader(replay, plain_means),
    "sweep": Reader(sweep, plain_means),
    "tokens": Reader(tokens, plain_tokens),
    "sql": Reader(sql, plain_rows, 1),
    "sql_tokens": Reader(sql_tokens, plain_tokens, 1),
    "others": Reader(others, weight=1),
    "command_info": Reader(command("info", "ROOT/run"), weight=1),
    "command_verify": Reader(command("verify", "ROOT/run"), weight=1),
    "command_sweep": Reader(command("sweep", "ROOT/run", "--experts", "2"), weight=1),
}
REPLAYS = {
    "sql_replays": Reader(sql_replays, plain_replays, 1),
    "verify": Reader(verify),
}
NULL = {
    "null_load": Reader(null_load, plain_null),
    "null_replay": Reader(null_replay, lambda root: plain_means(root, root / "null.parquet")),
    "null_refit": Reader(null_refit, weight=1),
    "null_verify": Reader(checked("null.parquet")),
    "command_verify": Reader(command("verify", "ROOT/null.parquet"), weight=1),
    "command_kde": Reader(command("kde", "show", "ROOT/null.parquet"), weight=1),
}
PROFILES = {
    "profile": Reader(profile, plain_profile),
    "profile_others": Reader(profile_others),
    "profile_verify": Reader(checked("profile.parquet")),
    "command_verify": Reader(command("verify", "ROOT/profile.parquet"), weight=1),
}
PICKLES = {
    "pickles": Reader(pickles, plain_pickles),
    "command_import": Reader(
        command("kde", "import", "ROOT/pickles", "--out", "ROOT/imported.parquet"), weight=1
    ),
}
READERS = {
    **dict.fromkeys(("routing", "tokens", "manifest"), RUN),
    "folder": RUN | {"sql_replays": REPLAYS["sql_replays"]},
    **{
        format: {
            "imported": Reader(imported(format), PLAIN[format]),
            "command_import": Reader(imported_by_command(format), weight=1),
        }
        for format in PATHS
    },
    **{"replay": REPLAYS, "null": NULL, "profile": PROFILES, "pickle": PICKLES},
}
