"""Comparison: what several policies, or BH at several settings, would have chosen, in one pass."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa

from bhlog.analysis.fold import WHOLE, Scope, fold
from bhlog.analysis.kernels.tally import BY_SEQUENCE
from bhlog.analysis.log import Log, layer_of
from bhlog.analysis.noise import COLUMNS, NAMES, Noise, last_hash, noise_frame, noise_row
from bhlog.analysis.replay.decide import Decider, decider_of
from bhlog.analysis.replay.empirical import missing_rows
from bhlog.analysis.replay.match import match_experts, no_rows
from bhlog.analysis.replay.policy import Policy
from bhlog.analysis.replay.registry import parse_policy
from bhlog.analysis.replay.rows import Rows
from bhlog.analysis.replay.settings import bounds_of
from bhlog.analysis.replay.summary import LayerSummary, differences, summary_frame
from bhlog.analysis.replay.touched import FORWARD, TouchedExperts, mean_distinct, stretches
from bhlog.analysis.sequences import SequenceSums
from bhlog.capture.contract.errors import InvalidOption
from bhlog.capture.contract.named import Bh
from bhlog.capture.contract.null.model import KdeModel
from bhlog.capture.contract.rule import OPEN, BhOptions, Bounds

_OF_TESTS = ("none_rejected", "none_rejected_se")


def replay(
    log: Log,
    settings: Sequence[BhOptions],
    *,
    kde: KdeModel | None = None,
    scope: Scope = WHOLE,
) -> pl.DataFrame:
    """Summaries of a log replayed at several settings, in one pass: the policies bh:ALPHA.

    Args:
        settings: see settings_of.
        kde: null model; None takes the run's own.
        scope: which rows.

    Returns:
        One row per setting and layer, and one per setting over all layers (layer null): alpha,
        min_k, max_k, and the columns of bhlog.analysis.replay.summary.

    Raises:
        InvalidOption, KdeMismatch: see Decider; or no setting, or no row matches.
    """
    decider = decider_of(log, settings, kde, scope)
    total = _summaries(log, decider, scope, tuple(options.temperature for options in settings))
    if not total.layers:
        raise InvalidOption(f"{log.path}: no rows to replay{scope.words}")
    labels = [_alpha_of(options).alias("alpha") for options in settings]
    return pl.concat(total.frames(labels, native_logged=_is_native(log)))


def _alpha_of(options: BhOptions) -> pl.Expr:
    """The alpha of each layer's row; over layers with alphas of their own there is none."""
    named = options.named
    if not isinstance(named, Bh) or not named.by_layer:
        return pl.lit(options.alpha)
    return pl.col("layer").replace_strict(
        dict(named.by_layer), default=None, return_dtype=pl.Float64
    )


def compare(
    log: Log,
    policies: Sequence[Policy | str],
    *,
    kde: KdeModel | None = None,
    experts: float | None = None,
    bounds: Bounds = OPEN,
    scope: Scope = WHOLE,
) -> pl.DataFrame:
    """Summaries of a log under several policies, in one pass.

    Args:
        policies: or their texts, such as "bh:0.3".
        kde: null model; None takes the run's own. Only policies that test p-values need one.
        experts: mean experts per token to bring every policy to first; see
            bhlog.analysis.replay.match.match_experts. Texts may then leave the value out: "bh".
        bounds: of policies that have none of their own; where open, as in the run.
        scope: which rows.

    Returns:
        One row per policy and layer, and one per policy over all layers (layer null): policy (its
        text), min_k, max_k, and the columns of replay.summary; none_rejected is null for
        policies that test nothing. Last X_difference and X_difference_se of mean_experts,
        probability_kept and native_recall: less the first policy's, row by row, with the standard
        error of that, clustered by sequence.

    Raises:
        InvalidOption: no policy, a text or bound that is wrong, or no rows.
        KdeMismatch: a policy needs p-values and the run has no null model that serves.
    """
    wanted = [
        parse_policy(p, open_value=experts is not None) if isinstance(p, str) else p
        for p in policies
    ]
    if not wanted:
        raise InvalidOption("name at least one policy, such as bh:0.3")
    if experts is not None:
        wanted = match_experts(log, wanted, experts, kde=kde, bounds=bounds, scope=scope)
    decider = Decider(log, wanted, kde, bounds=bounds_of(log, bounds), scope=scope)
    total = _summaries(log, decider, scope, (1.0,) * len(wanted))
    if not total.layers:
        raise InvalidOption(no_rows(log, scope))
    labels = [pl.lit(str(policy)).alias("policy") for policy in wanted]
    frames = total.frames(labels, native_logged=_is_native(log), paired=True)
    return pl.concat(
        frame
        if policy.tests
        else frame.with_columns(pl.lit(None, pl.Float64).alias(name) for name in _OF_TESTS)
        for policy, frame in zip(wanted, frames, strict=True)
    )


def _summaries(
    log: Log, decider: Decider, scope: Scope, temperatures: tuple[float, ...]
) -> "Summaries":
    whole = missing_rows(log, scope) is None
    noise = partial(Noise, log.n_experts, last_hash(log, scope.where))
    make = partial(Summaries, decider, temperatures, log.manifest.model.top_k, noise, whole=whole)
    columns = (*dict.fromkeys([*decider.columns, *COLUMNS, *FORWARD]),)
    return fold(log, make, columns, scope, whole_groups=decider.whole_groups)


def _is_native(log: Log) -> bool:
    return log.manifest.routing.options is None


class Summaries:
    """A LayerSummary per layer and policy.

    Args:
        decider: what decides.
        temperatures: of the softmax, by policy.
        top_k: experts of the native choice.
        noise: makes what samples rows for noise; empirical p-values, which rank a batch, have none.
        whole: whether the rows are whole forwards, whose experts can be told.
    """

    def __init__(
        self,
        decider: Decider,
        temperatures: Sequence[float],
        top_k: int,
        noise: Callable[[], Noise],
        *,
        whole: bool = False,
    ) -> None:
        self.decider, self.temperatures, self.top_k = decider, temperatures, top_k
        self.whole = whole
        self.touched: dict[int, TouchedExperts] = {}
        self.layers: dict[int, list[LayerSummary]] = {}
        self.sequences: dict[int, SequenceSums] = {}  # a table for each policy
        self.noise = noise()

    def update(self, batch: pa.RecordBatch) -> None:
        E, policies = batch.column("logits").type.list_size, self.decider.policies
        layer = layer_of(batch)
        parts = self.layers.setdefault(layer, [LayerSummary(E) for _ in policies])
        sequences = self.sequences.setdefault(layer, SequenceSums(len(parts), BY_SEQUENCE))
        if not self.decider.empirical:
            self.noise.update(batch)
        slots, start = sequences.slots(batch), 0
        forwards, numbers = stretches(batch) if self.whole else (slots[:0], slots[:0])
        touched = np.zeros((len(policies), len(numbers), -(-E // 64) * 64), dtype=np.bool_)
        for rows in self.decider.rows(batch):
            block = slice(start, start + len(rows))
            start += len(rows)
            for i, (policy, temperature) in enumerate(
                zip(policies, self.temperatures, strict=True)
            ):
                parts[i].add(
                    policy.decide(rows),
                    top_k=self.top_k,
                    temperature=temperature,
                    bounds=policy.bounds(E),
                    slots=slots[block],
                    by_sequence=sequences.sums[i],
                    forwards=forwards[block],
                    touched=touched[i],
                )
        if self.whole:
            self.touched.setdefault(layer, TouchedExperts(len(policies))).add(numbers, touched)

    def merge(self, other: Self) -> None:
        for layer, parts in other.layers.items():
            if layer not in self.layers:
                self.layers[layer] = parts
            else:
                for mine, theirs in zip(self.layers[layer], parts, strict=True):
                    mine.merge(theirs)
        self.noise.merge(other.noise)
        for layer, experts in other.touched.items():
            self.touched.setdefault(layer, TouchedExperts(len(self.temperatures))).merge(experts)
        for layer, sums in other.sequences.items():
            self.sequences.setdefault(layer, SequenceSums(len(sums.sums), BY_SEQUENCE)).merge(sums)

    def frames(
        self, labels: Sequence[pl.Expr], *, native_logged: bool = False, paired: bool = False
    ) -> list[pl.DataFrame]:
        """The table of each policy: its label, min_k, max_k, and the columns of summary_frame.

        Args:
            paired: whether differences from the first policy are there too.
        """
        frames = []
        every = SequenceSums(len(self.temperatures), BY_SEQUENCE)
        shuffled: dict[int, Rows] = {}
        for layer in sorted(self.sequences):
            every.merge(self.sequences[layer])
            if layer in self.noise.layers:
                sample = self.noise.layers[layer].shuffled(layer)
                shuffled[layer] = self.decider.rows_of(sample, layer)
        unknown = [[None] * (len(self.layers) + 1)] * len(labels)
        distinct = mean_distinct(self.touched) if self.touched else unknown
        for i, (policy, label) in enumerate(zip(self.decider.policies, labels, strict=True)):
            low, high = policy.bounds(self.decider.n_experts)
            parts = {layer: summaries[i] for layer, summaries in self.layers.items()}
            by_layer = {layer: sums.table(i) for layer, sums in self.sequences.items()}
            frame = summary_frame(
                parts,
                by_layer,
                every.table(i),
                min_k=low,
                max_k=high,
                top_k=self.top_k,
                native_logged=native_logged,
            )
            noise = noise_frame(
                [
                    noise_row(policy.decide(shuffled[layer]).n_selected)
                    if layer in shuffled and not policy.pools
                    else dict.fromkeys(NAMES)
                    for layer in sorted(parts)
                ],
                [parts[layer].rows for layer in sorted(parts)],
            )
            at = frame.columns.index("min_experts")
            frame = frame.hstack(noise).select(*frame.columns[:at], *NAMES, *frame.columns[at:])
            frame = frame.with_columns(pl.Series("distinct_experts", distinct[i], pl.Float64))
            if paired:
                pairs = [
                    (by_layer[layer], self.sequences[layer].table(0)) for layer in sorted(by_layer)
                ]
                rows = [
                    differences(mine, first, native_logged=native_logged)
                    for mine, first in [*pairs, (every.table(i), every.table(0))]
                ]
                table = pl.DataFrame(rows, schema=dict.fromkeys(rows[0], pl.Float64))
                frame = frame.hstack(table)
            frame = frame.select(pl.exclude("histogram"), "histogram")
            bounds = pl.lit(low).alias("min_k"), pl.lit(high).alias("max_k")
            frames.append(frame.select(label, *bounds, pl.all()))
        return frames
