"""Functions for SQL: the decision rule, p-values and softmax, a column at a time over Arrow.

| function | gives |
|---|---|
| bh_count(logits, layer, alpha[, min_k, max_k, run]) | n_selected: experts the rule chooses |
| bh_experts(logits, layer, alpha[, min_k, max_k, run]) | which ones, by falling logit |
| p_values(logits, layer[, run]) | a p-value per expert |
| p_value(logit, layer[, expert, run]) | the p-value of one logit |
| softmax(logits[, temperature]) | a weight per expert, float32 |
| router_entropy(logits) | entropy of the softmax, in nats |
| top_probability(logits) | the largest weight of the softmax |
| n_shared(experts, others) | how many experts two selections share |

min_k and max_k are 1 and the number of experts unless given. run tells which run's null model
counts, and is needed only where runs with different ones are open. NULL in, NULL out; a row without
a finite logit, on which the rule cannot decide, is NULL too.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from duckdb.func import FunctionNullHandling, PythonUDFType
from numpy.typing import NDArray

from analysis.log import Log
from capture.contract.bh import (
    BhOptions,
    Decisions,
    count_rejected,
    decide,
    decide_by_expert,
    finite_keys,
    no_finite_logit,
    softmax_weights,
)
from capture.contract.errors import InvalidOption, KdeMismatch
from capture.contract.kde import KdeModel

FUNCTIONS = (
    "bh_count",
    "bh_experts",
    "p_values",
    "p_value",
    "softmax",
    "router_entropy",
    "top_probability",
    "n_shared",
)

# Optional arguments are DuckDB's: functions in Python have a fixed number of them.
_MACROS = """
CREATE MACRO bh_count(logits, layer, alpha, min_k := 1, max_k := NULL, run := NULL) AS _bh_count(
    logits::FLOAT[], run, layer::INTEGER, alpha::DOUBLE, min_k::INTEGER, max_k::INTEGER
);
CREATE MACRO bh_experts(logits, layer, alpha, min_k := 1, max_k := NULL, run := NULL) AS
_bh_experts(
    logits::FLOAT[], run, layer::INTEGER, alpha::DOUBLE, min_k::INTEGER, max_k::INTEGER
);
CREATE MACRO p_values(logits, layer, run := NULL) AS
_p_values(logits::FLOAT[], run, layer::INTEGER);
CREATE MACRO p_value(logit, layer, expert := NULL, run := NULL) AS
_p_value(logit::FLOAT, run, layer::INTEGER, expert::INTEGER);
CREATE MACRO softmax(logits, temperature := 1.0) AS
_softmax(logits::FLOAT[], temperature::DOUBLE);
CREATE MACRO router_entropy(logits) AS _router_entropy(logits::FLOAT[]);
CREATE MACRO top_probability(logits) AS _top_probability(logits::FLOAT[]);
CREATE MACRO n_shared(experts, others) AS _n_shared(experts::USMALLINT[], others::USMALLINT[]);
"""


class Nulls:
    """The null models that functions take p-values from, read when first needed.

    Attributes:
        runs: the open runs by name.
        given: one null model in place of the runs' own, or None.
    """

    def __init__(self, runs: Mapping[str, Log], given: KdeModel | None = None) -> None:
        self.runs = runs
        self.given = given
        self._thresholds: dict[tuple[Any, ...], NDArray[np.float32]] = {}

    def of(self, run: str | None) -> KdeModel:
        """The null model of a run, or for None the one that all open runs share.

        Raises:
            KdeMismatch: there is none, or the runs have different ones.
        """
        if self.given is not None:
            return self.given
        if run is None:
            return self._shared
        kde = self.runs[run].kde if run in self.runs else None
        if kde is None:
            raise KdeMismatch(
                f"run '{run}' has no null model; fit one with bhlog kde fit RUN --out FILE and "
                "give it with --kde FILE"
                if run in self.runs
                else f"no run '{run}' is open; runs: {', '.join(self.runs)}"
            )
        return kde

    def has(self, run: str) -> bool:
        """Whether there is a null model for a run."""
        return self.given is not None or (run in self.runs and self.runs[run].kde is not None)

    def thresholds(
        self, run: str | None, layer: int, alpha: float, n_experts: int
    ) -> NDArray[np.float32]:
        """Thresholds of a layer at alpha, kept; see LayerNull.thresholds.

        Raises:
            KdeMismatch: no null model for that layer and number of experts.
        """
        key = (run, layer, alpha, n_experts)
        if key not in self._thresholds:
            kde = self.of(run)
            kde.require((layer,), n_experts)
            self._thresholds[key] = kde[layer].thresholds(alpha, n_experts)
        return self._thresholds[key]

    @cached_property
    def _shared(self) -> KdeModel:
        models = {
            hashlib.sha256(log.kde.to_bytes()).hexdigest(): log.kde
            for log in self.runs.values()
            if log.kde is not None
        }
        if len(models) == 1:
            return next(iter(models.values()))
        raise KdeMismatch(
            "the open runs have different null models: name the run, as in "
            "bh_count(logits, layer, 0.05, run := run)"
            if models
            else "no open run has a null model; fit one with bhlog kde fit RUN --out FILE and give "
            "it with --kde FILE"
        )


def register_functions(connection: duckdb.DuckDBPyConnection, nulls: Nulls) -> None:
    """Make the functions of this module known to a connection."""
    rule = ["FLOAT[]", "VARCHAR", "INTEGER", "DOUBLE", "INTEGER", "INTEGER"]
    functions: list[tuple[Callable[..., pa.Array], list[Any], str]] = [
        (_bh_count, rule, "INTEGER"),
        (_bh_experts, rule, "USMALLINT[]"),
        (_p_values, ["FLOAT[]", "VARCHAR", "INTEGER"], "DOUBLE[]"),
        (_p_value, ["FLOAT", "VARCHAR", "INTEGER", "INTEGER"], "DOUBLE"),
        (_softmax, ["FLOAT[]", "DOUBLE"], "FLOAT[]"),
        (_router_entropy, ["FLOAT[]"], "DOUBLE"),
        (_top_probability, ["FLOAT[]"], "DOUBLE"),
        (_n_shared, ["USMALLINT[]", "USMALLINT[]"], "INTEGER"),
    ]
    for function, parameters, result in functions:
        connection.create_function(
            function.__name__,
            _over_arrow(function, nulls),
            parameters,
            result,
            type=PythonUDFType.ARROW,
            null_handling=FunctionNullHandling.SPECIAL,
            side_effects=False,
        )
    connection.execute(_MACROS)


def _over_arrow(function: Callable[..., pa.Array], nulls: Nulls) -> Callable[..., pa.Array]:
    def over_arrow(*columns: pa.ChunkedArray) -> pa.Array:
        return function(nulls, *(column.combine_chunks() for column in columns))

    # DuckDB counts the parameters by the signature: those of the function without nulls.
    own = inspect.signature(function)
    over_arrow.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=list(own.parameters.values())[1:]
    )
    return over_arrow


class _Rule(NamedTuple):
    """What a row is decided by."""

    run: str | None
    layer: int
    alpha: float
    min_k: int
    max_k: int | None

    def bounds(self, n_experts: int) -> tuple[int, int]:
        options = BhOptions(self.alpha, min_k=self.min_k, max_k=self.max_k)
        return options.bounds(n_experts)


def _bh_count(
    nulls: Nulls,
    logits: pa.ListArray,
    run: pa.Array,
    layer: pa.Array,
    alpha: pa.Array,
    min_k: pa.Array,
    max_k: pa.Array,
) -> pa.Array:
    n_selected = np.zeros(len(logits), dtype=np.int32)
    decided = np.zeros(len(logits), dtype=np.bool_)
    for key, rows, x in _groups(logits, run, layer, alpha, min_k, max_k):
        if None in key[1:4]:
            continue
        decided[rows] = ~no_finite_logit(x)
        n_selected[rows] = _n_selected(nulls, _Rule(*key), x)
    return pa.array(n_selected, mask=~decided)


def _n_selected(nulls: Nulls, rule: _Rule, logits: NDArray[np.float32]) -> NDArray[np.uint16]:
    """(T,) n_selected of _decisions, without ordering the experts, which takes most of the time."""
    E = logits.shape[1]
    low, high = rule.bounds(E)
    thresholds = nulls.thresholds(rule.run, rule.layer, rule.alpha, E)
    if thresholds.ndim == 2:
        return _decisions(nulls, rule, logits).n_selected
    keys = finite_keys(logits)
    falling = np.sort(keys, axis=1)[:, ::-1]
    n_rejected = count_rejected(falling, thresholds)
    return np.clip(n_rejected, low, high)


def _bh_experts(
    nulls: Nulls,
    logits: pa.ListArray,
    run: pa.Array,
    layer: pa.Array,
    alpha: pa.Array,
    min_k: pa.Array,
    max_k: pa.Array,
) -> pa.Array:
    lists = _Lists(logits, np.uint16)
    for key, rows, x in _groups(logits, run, layer, alpha, min_k, max_k):
        if None in key[1:4]:
            continue
        decisions = _decisions(nulls, _Rule(*key), x)
        lists.put(rows, decisions.order, decisions.n_selected, ~no_finite_logit(x))
    return lists.to_arrow()


def _decisions(nulls: Nulls, rule: _Rule, logits: NDArray[np.float32]) -> Decisions:
    E = logits.shape[1]
    low, high = rule.bounds(E)
    thresholds = nulls.thresholds(rule.run, rule.layer, rule.alpha, E)
    if thresholds.ndim == 1:
        return decide(logits, thresholds, min_k=low, max_k=high)
    p = nulls.of(rule.run)[rule.layer].p_value(logits)
    return decide_by_expert(logits, thresholds, p, min_k=low, max_k=high)


def _p_values(nulls: Nulls, logits: pa.ListArray, run: pa.Array, layer: pa.Array) -> pa.Array:
    lists = _Lists(logits, np.float64)
    for (name, i), rows, x in _groups(logits, run, layer):
        if i is not None:
            lists.put(rows, nulls.of(name).p_value(i, x), x.shape[1])
    return lists.to_arrow()


def _p_value(
    nulls: Nulls, logit: pa.Array, run: pa.Array, layer: pa.Array, expert: pa.Array
) -> pa.Array:
    p = np.full(len(logit), np.nan)
    known = np.zeros(len(logit), dtype=np.bool_)
    values = logit.to_numpy(zero_copy_only=False)
    for (name, i), rows in _keys(len(logit), run, layer):
        if i is None or (name is not None and not nulls.has(name)):
            continue
        kde = nulls.of(name)
        kde.require((i,))
        known[rows] = True
        if kde[i].pooled:
            p[rows] = kde[i].curves[0].p_value(values[rows])
            continue
        for (e,), of_expert in _keys(len(logit), expert):
            both = np.intersect1d(np.arange(len(logit))[rows], np.arange(len(logit))[of_expert])
            if e is None or not 0 <= e < len(kde[i].curves):
                raise KdeMismatch(
                    f"layer {i} has a null per expert: p_value(logit, layer, expert) with expert "
                    f"from 0 to {len(kde[i].curves) - 1}, got {e}"
                )
            p[both] = kde[i].curves[e].p_value(values[both])
    missing = logit.is_null().to_numpy(zero_copy_only=False)
    return pa.array(p, mask=~known | missing)


def _softmax(_: Nulls, logits: pa.ListArray, temperature: pa.Array) -> pa.Array:
    lists = _Lists(logits, np.float32)
    for (t,), rows, x in _groups(logits, temperature):
        if t is None:
            continue
        if not (np.isfinite(t) and t > 0):
            raise InvalidOption(f"temperature must be above 0, got {t}")
        T, E = x.shape
        every = np.broadcast_to(np.arange(E, dtype=np.uint16), (T, E))
        all_chosen = Decisions(every, np.full(T, E, np.uint16), np.zeros(T, np.uint16))
        lists.put(rows, softmax_weights(x, all_chosen, temperature=t), E)
    return lists.to_arrow()


def _router_entropy(_: Nulls, logits: pa.ListArray) -> pa.Array:
    entropy = np.full(len(logits), np.nan)
    for _key, rows, x in _groups(logits):
        below, unnormalized = _exponentials(x)
        total = unnormalized.sum(axis=1, dtype=np.float64)
        # H = ln Z - sum(p * (x - max)); exp has made a logit this far below 0
        below = np.maximum(below, np.float32(-200), out=below)
        moment = np.einsum("te,te->t", unnormalized, below, dtype=np.float64)
        entropy[rows] = np.log(total) - moment / total
    return pa.array(entropy, from_pandas=True)


def _top_probability(_: Nulls, logits: pa.ListArray) -> pa.Array:
    top = np.full(len(logits), np.nan)
    for _key, rows, x in _groups(logits):
        top[rows] = 1 / _exponentials(x)[1].sum(axis=1, dtype=np.float64)
    return pa.array(top, from_pandas=True)


def _exponentials(logits: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(T, E) float32 x - max(x) and its exponential; NaN in rows without a finite logit."""
    keys = finite_keys(logits)
    top = keys.max(axis=1, keepdims=True)
    below = keys - np.where(np.isfinite(top), top, np.float32(np.nan))
    return below, np.exp(below)


def _n_shared(_: Nulls, experts: pa.ListArray, others: pa.ListArray) -> pa.Array:
    row, expert = _elements(experts)
    other_row, other = _elements(others)
    width = 1 + max(expert.max(initial=0), other.max(initial=0))
    chosen = np.zeros(len(experts) * width, dtype=np.bool_)
    chosen[row * width + expert] = True
    shared = chosen[other_row * width + other]
    n = np.bincount(other_row[shared], minlength=len(experts))
    missing = pc.or_(experts.is_null(), others.is_null())
    return pa.array(n.astype(np.int32), mask=missing.to_numpy(zero_copy_only=False))


def _elements(lists: pa.ListArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and value of each element of a list column."""
    rows = lists.value_parent_indices().to_numpy(zero_copy_only=False)
    return rows.astype(np.int64), lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)


class _Lists:
    """A list column in the making: rows are put in any order, those never put are NULL."""

    def __init__(self, logits: pa.ListArray, dtype: type[np.generic]) -> None:
        self._sizes = np.zeros(len(logits), dtype=np.int64)
        self._put = np.zeros(len(logits), dtype=np.bool_)
        self._values = np.zeros((len(logits), 0), dtype=dtype)

    def put(
        self,
        rows: Any,
        values: NDArray[Any],
        sizes: int | NDArray[Any],
        known: bool | NDArray[np.bool_] = True,
    ) -> None:
        """Set rows to the first `sizes` of (T, K) values, or to NULL where they are not known."""
        width = values.shape[1]
        if width > self._values.shape[1]:
            wider = np.zeros((len(self._sizes), width), dtype=self._values.dtype)
            wider[:, : self._values.shape[1]] = self._values
            self._values = wider
        self._values[rows, :width] = values
        self._sizes[rows] = sizes
        self._put[rows] = known

    def to_arrow(self) -> pa.ListArray:
        width = self._values.shape[1]
        inside = np.arange(width) < self._sizes[:, None]
        values = self._values.ravel() if inside.all() else self._values[inside]
        offsets = np.concatenate([[0], np.cumsum(self._sizes)]).astype(np.int32)
        return pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(values), mask=pa.array(~self._put)
        )


def _groups(logits: pa.ListArray, *keys: pa.Array) -> Iterator[tuple[Any, Any, NDArray[Any]]]:
    """(key, rows, (T, E) float32 logits) of each distinct key and number of experts.

    Rows whose logits are NULL or empty are in no group.
    """
    lengths = logits.value_lengths()
    offsets = logits.offsets.to_numpy()
    flat = logits.values.to_numpy(zero_copy_only=False)
    for (E, *key), rows in _keys(len(logits), lengths, *keys):
        if E:
            starts = offsets[:-1][rows]
            if isinstance(rows, slice):
                x = flat[starts[0] : starts[0] + len(starts) * E].reshape(len(starts), E)
            else:
                x = flat[starts[:, None] + np.arange(E)]
            yield tuple(key), rows, x


def _keys(n: int, *columns: pa.Array) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(key, rows) of each distinct combination of values; rows is a slice when there is but one."""
    if not n:
        return
    encoded = [column.dictionary_encode(null_encoding="encode") for column in columns]
    values = [column.dictionary.to_pylist() for column in encoded]
    if all(len(v) == 1 for v in values):
        yield tuple(v[0] for v in values), slice(None)
        return
    code = np.zeros(n, dtype=np.int64)
    for column, v in zip(encoded, values, strict=True):
        code = code * len(v) + column.indices.to_numpy(zero_copy_only=False)
    distinct, group = np.unique(code, return_inverse=True)
    for g in range(len(distinct)):
        rows = np.flatnonzero(group == g)
        yield tuple(c[int(rows[0])].as_py() for c in encoded), rows
