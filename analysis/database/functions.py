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
| token_text(token_id) | what a token id stands for: token_texts.py |

min_k and max_k are those of the run unless given; of a native run 1 and the number of experts. run
tells which run's null model and bounds count, and is needed only where runs with different ones are
open. NULL in, NULL out; a row without a finite logit, on which the rule cannot decide, is NULL too.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from duckdb.func import FunctionNullHandling, PythonUDFType
from numpy.typing import NDArray

from bhlog.analysis.database.failures import Failures
from bhlog.analysis.database.lists import ListColumn, key_groups, list_elements, logit_groups
from bhlog.analysis.database.run_nulls import Nulls
from bhlog.analysis.kernels.softmax import find_certainty
from bhlog.analysis.replay.rows import Rows
from bhlog.capture.contract.errors import InvalidOption, KdeMismatch
from bhlog.capture.contract.rule import (
    BhOptions,
    Decisions,
    no_finite_logit,
    softmax_weights,
)

FUNCTIONS = (
    "bh_count",
    "bh_experts",
    "p_values",
    "p_value",
    "softmax",
    "router_entropy",
    "top_probability",
    "n_shared",
    "token_text",
)

_MOST_EXPERTS = 65_535  # n_selected is uint16
_DENSE_EXPERTS = 4096

# Optional arguments are DuckDB's: functions in Python have a fixed number of them.
_MACROS = """
CREATE MACRO bh_count(logits, layer, alpha, min_k := NULL, max_k := NULL, run := NULL) AS _bh_count(
    logits::FLOAT[], run, layer::INTEGER, alpha::DOUBLE, min_k::INTEGER, max_k::INTEGER
);
CREATE MACRO bh_experts(logits, layer, alpha, min_k := NULL, max_k := NULL, run := NULL) AS
_bh_experts(
    logits::FLOAT[], run, layer::INTEGER, alpha::DOUBLE, min_k::INTEGER, max_k::INTEGER
);
CREATE MACRO p_values(logits, layer, run := NULL) AS
_p_values(logits::FLOAT[], run, layer::INTEGER);
CREATE MACRO p_value(logit, layer, expert := NULL, run := NULL) AS
_p_value(logit::FLOAT, run, layer::INTEGER, expert::INTEGER);
CREATE MACRO softmax(logits, temperature := 1.0) AS
_softmax(logits::FLOAT[], temperature::DOUBLE);
CREATE MACRO router_entropy(logits) AS _certainty(logits::FLOAT[]).entropy;
CREATE MACRO top_probability(logits) AS _certainty(logits::FLOAT[]).top_probability;
CREATE MACRO n_shared(experts, others) AS _n_shared(experts::USMALLINT[], others::USMALLINT[]);
"""


def register_functions(
    connection: duckdb.DuckDBPyConnection, nulls: Nulls, failures: Failures
) -> None:
    """Make the functions of this module known to a connection; failures keeps their errors."""
    rule = ["FLOAT[]", "VARCHAR", "INTEGER", "DOUBLE", "INTEGER", "INTEGER"]
    functions: list[tuple[Callable[..., pa.Array], list[Any], str]] = [
        (_bh_count, rule, "INTEGER"),
        (_bh_experts, rule, "USMALLINT[]"),
        (_p_values, ["FLOAT[]", "VARCHAR", "INTEGER"], "DOUBLE[]"),
        (_p_value, ["FLOAT", "VARCHAR", "INTEGER", "INTEGER"], "DOUBLE"),
        (_softmax, ["FLOAT[]", "DOUBLE"], "FLOAT[]"),
        (_certainty, ["FLOAT[]"], "STRUCT(entropy DOUBLE, top_probability DOUBLE)"),
        (_n_shared, ["USMALLINT[]", "USMALLINT[]"], "INTEGER"),
    ]
    for function, parameters, result in functions:
        connection.create_function(
            function.__name__,
            _over_arrow(function, nulls, failures),
            parameters,
            result,
            type=PythonUDFType.ARROW,
            null_handling=FunctionNullHandling.SPECIAL,
            side_effects=False,
        )
    connection.execute(_MACROS)


def _over_arrow(
    function: Callable[..., pa.Array], nulls: Nulls, failures: Failures
) -> Callable[..., pa.Array]:
    def over_arrow(*columns: pa.ChunkedArray) -> pa.Array:
        with failures.kept():
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
    min_k: int | None
    max_k: int | None

    def bounds(self, nulls: Nulls, n_experts: int) -> tuple[int, int]:
        """Fewest and most experts: those given, in place of the run's.

        Raises:
            InvalidOption: more experts than a column of the log can name.
        """
        if n_experts > _MOST_EXPERTS:
            raise InvalidOption(
                f"{n_experts:,} logits in a row; the rule takes at most {_MOST_EXPERTS:,} experts"
            )
        low, high = self.min_k, self.max_k
        if low is None or high is None:
            run_low, run_high = nulls.bounds(self.run)
            low = run_low if low is None else low
            high = run_high if high is None else high
        return BhOptions(self.alpha, min_k=low, max_k=high).bounds(n_experts)


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
    for key, rows, x in logit_groups(logits, run, layer, alpha, min_k, max_k):
        if None in key[1:3]:
            continue
        decided[rows] = ~no_finite_logit(x)
        n_selected[rows] = _n_selected(nulls, _Rule(*key), x)
    return pa.array(n_selected, mask=~decided)


def _n_selected(nulls: Nulls, rule: _Rule, logits: NDArray[np.float32]) -> NDArray[np.integer]:
    """(T,) n_selected of _decisions, without ordering the experts, which takes most of the time."""
    E = logits.shape[1]
    low, high = rule.bounds(nulls, E)
    thresholds = nulls.thresholds(rule.run, rule.layer, rule.alpha, E)
    if thresholds.ndim == 2:
        return _decisions(nulls, rule, logits).n_selected
    null = nulls.of(rule.run)[rule.layer]
    return Rows(logits, null).step_up(thresholds, low, high)[1]


def _bh_experts(
    nulls: Nulls,
    logits: pa.ListArray,
    run: pa.Array,
    layer: pa.Array,
    alpha: pa.Array,
    min_k: pa.Array,
    max_k: pa.Array,
) -> pa.Array:
    lists = ListColumn(logits, np.uint16)
    for key, rows, x in logit_groups(logits, run, layer, alpha, min_k, max_k):
        if None in key[1:3]:
            continue
        decisions = _decisions(nulls, _Rule(*key), x)
        lists.put(rows, decisions.order, decisions.n_selected, ~no_finite_logit(x))
    return lists.to_arrow()


def _decisions(nulls: Nulls, rule: _Rule, logits: NDArray[np.float32]) -> Decisions:
    E = logits.shape[1]
    low, high = rule.bounds(nulls, E)
    thresholds = nulls.thresholds(rule.run, rule.layer, rule.alpha, E)
    return nulls.of(rule.run)[rule.layer].decide(logits, thresholds, min_k=low, max_k=high)


def _p_values(nulls: Nulls, logits: pa.ListArray, run: pa.Array, layer: pa.Array) -> pa.Array:
    lists = ListColumn(logits, np.float64)
    for (name, i), rows, x in logit_groups(logits, run, layer):
        if i is not None:
            lists.put(rows, nulls.of(name).p_value(i, x), x.shape[1])
    return lists.to_arrow()


def _p_value(
    nulls: Nulls, logit: pa.Array, run: pa.Array, layer: pa.Array, expert: pa.Array
) -> pa.Array:
    p = np.full(len(logit), np.nan)
    known = np.zeros(len(logit), dtype=np.bool_)
    values = logit.to_numpy(zero_copy_only=False)
    for (name, i), rows in key_groups(len(logit), run, layer):
        if i is None or (name is not None and not nulls.has(name)):
            continue
        kde = nulls.of(name)
        kde.require((i,))
        known[rows] = True
        kde[i].tested(values[rows])  # a lone logit has no median
        if kde[i].pooled:
            p[rows] = kde[i].curves[0].p_value(values[rows])
            continue
        for (e,), of_expert in key_groups(len(logit), expert):
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
    lists = ListColumn(logits, np.float32)
    for (t,), rows, x in logit_groups(logits, temperature):
        if t is None:
            continue
        _check_temperature(t, x)
        T, E = x.shape
        every = np.broadcast_to(np.arange(E, dtype=np.int32), (T, E))
        n, none = np.full(T, E, np.int32), np.zeros(T, np.int32)
        all_chosen = Decisions(every, n, none)  # type: ignore[arg-type]  # of any number
        lists.put(rows, softmax_weights(x, all_chosen, temperature=t), E)
    return lists.to_arrow()


def _check_temperature(temperature: float, logits: NDArray[np.float32]) -> None:
    """Check that logits / temperature are float32 numbers."""
    largest = float(np.finfo(np.float32).max)
    with np.errstate(under="ignore"):
        zero = temperature <= 0 or (temperature <= largest and not np.float32(temperature))
    if zero or not temperature <= largest:  # NaN as well
        raise InvalidOption(
            f"temperature must be above 0 and finite, as a float32, got {temperature}"
        )
    steepest = float(np.abs(logits, where=np.isfinite(logits), out=np.zeros_like(logits)).max())
    if steepest / float(np.float32(temperature)) > largest:
        raise InvalidOption(
            f"temperature {temperature} is too small for a logit of size {steepest:.4g}: "
            "their quotient is no float32"
        )


def _certainty(_: Nulls, logits: pa.ListArray) -> pa.StructArray:
    """Entropy and largest weight of the softmax: one pass for a query that asks for both."""
    entropy, top = np.full((2, len(logits)), np.nan)
    for _key, rows, x in logit_groups(logits):
        found = np.empty((2, len(x)))
        find_certainty(x, *found)
        entropy[rows], top[rows] = found
    columns = [pa.array(values, from_pandas=True) for values in (entropy, top)]
    return pa.StructArray.from_arrays(columns, ["entropy", "top_probability"])


def _n_shared(_: Nulls, experts: pa.ListArray, others: pa.ListArray) -> pa.Array:
    row, expert = list_elements(experts)
    other_row, other = list_elements(others)
    width = 1 + max(expert.max(initial=0), other.max(initial=0))
    chosen, wanted = row * width + expert, other_row * width + other
    if width <= _DENSE_EXPERTS:
        is_chosen = np.zeros(len(experts) * width, dtype=np.bool_)
        is_chosen[chosen] = True
        shared = is_chosen[wanted]
    else:  # memory of what there is, not of what there could be
        shared = np.isin(wanted, chosen)
    n = np.bincount(other_row[shared], minlength=len(experts))
    missing = pc.or_(experts.is_null(), others.is_null())
    return pa.array(n.astype(np.int32), mask=missing.to_numpy(zero_copy_only=False))
