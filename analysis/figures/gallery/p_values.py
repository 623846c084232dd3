"""P-values of a sample of rows, and what the step-up rule makes of them."""

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from numpy.typing import NDArray

from bhlog.analysis.figures.axes import (
    bound_lines,
    layer_colorbar,
    layer_norm,
    level_lines,
    native_line,
    whole_numbers,
)
from bhlog.analysis.figures.registry import Numbers, figure, tidy
from bhlog.analysis.figures.run_data import RunData
from bhlog.analysis.figures.style import BLACK, GREY, MAIN, ORDERED, REFERENCE, SMALLEST_P
from bhlog.capture.contract.rule import critical_values

NEEDS = "a null model, or empirical p-values"
STEP_UP_QUANTILES = (0.1, 0.5, 0.9, 0.3, 0.7, 0.99)  # of n_rejected, for the sample tokens
MOST_POINTS = 40_000  # of the scatter of logits against p-values
BINS = 50


def p_value_density(p: NDArray[np.float64]) -> pl.DataFrame:
    """Density of p-values in even bins: columns low, high, density. NaN is left out."""
    density, edges = np.histogram(p[np.isfinite(p)], bins=BINS, range=(0, 1), density=True)
    return tidy(low=edges[:-1], high=edges[1:], density=density)


def sampled_p_values(run: RunData) -> Numbers:
    """Density of the sample's p-values."""
    p = np.concatenate([sample.p.ravel() for sample in run.samples])
    title = f"P-values of {np.isfinite(p).sum():,} sample logits"
    return Numbers(title, run.about, p_value_density(p))


@figure(
    "p_values",
    shows="p-values against the uniform distribution",
    needs=NEEDS,
    data=sampled_p_values,
)
def plot_p_value_histogram(axes: Axes, frame: pl.DataFrame) -> Axes:
    """Histogram of p-values against the uniform density that a right null model gives.

    Args:
        frame: low and high (edges of the bins), density.
    """
    edges = [*frame["low"], frame["high"][-1]]
    axes.stairs(frame["density"], edges, fill=True, color=MAIN, label="p-values")
    axes.axhline(1, color=REFERENCE, linestyle="--", linewidth=2, label="uniform")
    axes.set(xlabel="p-value", ylabel="density", xlim=(0, 1), ylim=(0, None))
    axes.legend()
    return axes


def step_up_ranks(
    p: NDArray[np.float64], alpha: float, *, n_rejected: int, n_selected: int, token: str = ""
) -> pl.DataFrame:
    """The step-up rule on one row, a row for each rank.

    Args:
        p: (E,), p-values of the row; NaN ranks last, as 1.
        alpha: BH level.
        n_rejected, n_selected: what was decided, before and after the bounds.
        token: which row it is.
    """
    ranks = np.arange(1, len(p) + 1)
    return tidy(
        token=token,
        rank=ranks,
        p=np.sort(np.where(np.isfinite(p), p, 1.0)),
        threshold=critical_values(alpha, len(p)),
        selected=ranks <= n_selected,
        n_rejected=n_rejected,
        n_selected=n_selected,
    )


def sample_tokens(run: RunData) -> Numbers:
    """Tokens with few, middling and many rejections, of layers from the first to the last."""
    places = np.linspace(0, len(run.samples) - 1, len(STEP_UP_QUANTILES)).round().astype(int)
    parts: list[pl.DataFrame] = []
    for place, quantile in zip(places, STEP_UP_QUANTILES, strict=True):
        sample = run.samples[place]
        order = np.argsort(sample.n_rejected, kind="stable")
        row = int(order[int(quantile * (len(order) - 1))])
        where = f"layer {sample.layer}, sequence {sample.sequence[row]}"
        ranks = step_up_ranks(
            sample.p[row],
            run.options.alpha,
            n_rejected=int(sample.n_rejected[row]),
            n_selected=int(sample.n_selected[row]),
            token=f"{where}, position {sample.position[row]}",
        )
        parts.append(ranks.with_columns(panel=pl.lit(len(parts))))
    title = "BH step-up on sample tokens" + (", replayed" if run.replayed else "")
    return Numbers(title, run.about, pl.concat(parts), {"replayed": run.replayed})


@figure(
    "step_up",
    shows="the BH step-up rule on sample tokens",
    needs=NEEDS,
    data=sample_tokens,
    size=(8, 8.6),
    panel="panel",
    columns=2,
)
def plot_step_up(axes: Axes, frame: pl.DataFrame, *, replayed: bool = False) -> Axes:
    """The step-up rule on one row: sorted p-values, the line k * alpha / E, and the cut.

    Shows as many ranks as it takes to see the cut and the choice, at least 12; those whose p-value
    is above the axis are marked at its upper edge.

    Args:
        frame: of one row; see step_up_ranks.
        replayed: whether the row was routed otherwise, so that nothing was selected by this rule.
    """
    ranks, p = frame["rank"].to_numpy(), frame["p"].to_numpy()
    line, chosen = frame["threshold"].to_numpy(), frame["selected"].to_numpy()
    n_rejected, n_selected = frame["n_rejected"][0], frame["n_selected"][0]
    axes.plot(ranks, line, color=REFERENCE, label=r"$k\,\alpha/E$")
    axes.scatter(ranks[chosen], p[chosen], s=18, color=MAIN, zorder=3, label="selected")
    axes.scatter(
        ranks[~chosen],
        p[~chosen],
        s=18,
        facecolors="white",
        edgecolors=GREY,
        zorder=3,
        label="not selected",
    )
    axes.axvline(n_rejected + 0.5, color=BLACK, linestyle="--", label="cut: last rank that passes")
    shown = min(len(ranks), max(12, round(1.6 * max(n_rejected, n_selected))))
    top = 1.05 * max(line[shown - 1], min(p[shown - 1], 2.5 * line[shown - 1]))
    axes.set(xlim=(0, shown + 0.7), ylim=(-0.03 * top, top), xlabel="rank k", ylabel="p-value")
    above = ranks[p > top]
    edge = np.full(len(above), 0.97 * top)
    axes.scatter(above, edge, s=18, marker="^", color=GREY, zorder=3, label="p above the axis")
    if p[shown - 1] > top:
        axes.set_xlabel(f"rank k (p up to {p[shown - 1]:.2g})")
    whole_numbers(axes, "x")
    if replayed:
        title = f"would reject {n_rejected}, select {n_selected}"
    else:
        title = f"n_rejected {n_rejected}, n_selected {n_selected}"
    token = frame["token"][0]
    axes.set_title(f"{token}\n{title}" if token else title, fontsize="small")
    return axes


def sampled_logits(run: RunData) -> Numbers:
    """Logits and p-values of some rows of each layer."""
    most = max(1, MOST_POINTS // (run.log.n_experts * len(run.samples)))
    parts = []
    for sample in run.samples:
        rows = slice(None, None, -(-len(sample.p) // most))
        parts.append(tidy(layer=sample.layer, logit=sample.logits[rows], p=sample.p[rows]))
    frame = pl.concat(parts)
    n_rows = len(frame) // run.log.n_experts
    facts = {"alpha": run.options.alpha, "n_experts": run.log.n_experts}
    return Numbers(f"Logits against p-values, {n_rows:,} sample rows", run.about, frame, facts)


@figure("logits_p_values", shows="logits against p-values", needs=NEEDS, data=sampled_logits)
def plot_logits_against_p_values(
    axes: Axes, frame: pl.DataFrame, *, alpha: float | None = None, n_experts: int | None = None
) -> Axes:
    """Logits against their p-values; each layer has a null model, and so a curve, of its own.

    P-values below SMALLEST_P are drawn at the lower edge.

    Args:
        frame: layer, logit, p; non-finite values are left out.
        alpha, n_experts: mark what the smallest and the largest p-value of a row must reach; None
            marks none.
    """
    layers, logits, p = (frame[name].to_numpy() for name in ("layer", "logit", "p"))
    finite = np.flatnonzero(np.isfinite(logits) & np.isfinite(p))
    mixed = np.random.default_rng(0).permutation(finite)  # so that no layer covers the others
    norm = layer_norm(layers)
    axes.scatter(
        logits[mixed],
        np.maximum(p[mixed], SMALLEST_P),
        c=layers[mixed],
        s=3,
        cmap=ORDERED,
        norm=norm,
        linewidths=0,
        rasterized=True,  # one picture in SVG and PDF, in place of thousands of marks
    )
    axes.set_yscale("log")
    axes.set(xlabel="router logit", ylabel=f"p-value (at least {SMALLEST_P:g})")
    axes.set_ylim(SMALLEST_P / 2, 2)
    level_lines(axes, alpha, n_experts)
    if alpha is not None:
        axes.legend(loc="lower left")
    layer_colorbar(axes, norm)
    return axes


def passing_ranks(run: RunData) -> Numbers:
    """Share of the sample's rows in which a rank passes, and in which it is rejected."""
    E, alpha = run.log.n_experts, run.options.alpha
    sorted_p = np.concatenate([sample.sorted_p for sample in run.samples])
    n_rejected = np.concatenate([sample.n_rejected for sample in run.samples])
    rejected = np.bincount(n_rejected, minlength=E + 1)[::-1].cumsum()[::-1][1:] / len(n_rejected)
    passes = (sorted_p <= critical_values(alpha, E)).mean(axis=0)
    frame = tidy(rank=np.arange(1, E + 1), passes=passes, rejected=rejected)
    facts = {"min_k": run.bounds[0] or None, "max_k": run.most_k, "top_k": run.top_k}
    return Numbers(f"How often a rank passes at alpha {alpha:g}", run.about, frame, facts)


@figure(
    "passing_rate",
    shows="passing rate of the BH threshold by rank",
    needs=NEEDS,
    data=passing_ranks,
)
def plot_passing_rate(
    axes: Axes,
    frame: pl.DataFrame,
    *,
    min_k: int | None = None,
    max_k: int | None = None,
    top_k: int | None = None,
) -> Axes:
    """How often rank k passes its own threshold, and how often the step-up rule rejects it.

    The rule rejects a rank that fails its own threshold when a later rank passes. Ranks that next
    to no row rejects are cut off.

    Args:
        frame: rank from 1 to E; passes, share of rows with p_(k) <= k * alpha / E; rejected, share
            of rows with n_rejected >= k.
        min_k, max_k: bounds on n_selected; None draws none.
        top_k: experts per token under native routing; None draws none.
    """
    ranks, rejected = frame["rank"].to_numpy(), frame["rejected"].to_numpy()
    marker = "." if len(ranks) <= 64 else ""
    axes.plot(ranks, 100 * rejected, color=MAIN, marker=marker, label="rejected: n_rejected ≥ k")
    axes.plot(
        ranks,
        100 * frame["passes"].to_numpy(),
        color=REFERENCE,
        marker=marker,
        linestyle="--",
        label=r"passes: p of rank k $\leq k\,\alpha/E$",
    )
    bound_lines(axes, min_k, max_k)
    native_line(axes, top_k, upright=True)
    frequent = int(np.max(ranks, where=rejected >= 0.005, initial=1))
    shown = min(len(ranks), max(12, round(1.2 * max(frequent, max_k or 0, top_k or 0))))
    axes.set(xlabel="rank k", ylabel="% of sample rows", xlim=(0, shown + 0.7), ylim=(0, 102))
    whole_numbers(axes, "x")
    axes.legend()
    return axes
