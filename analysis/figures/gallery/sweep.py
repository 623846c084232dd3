"""Experts at other alphas."""

from dataclasses import replace

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from numpy.typing import NDArray

from bhlog.analysis.figures.about import bound_words
from bhlog.analysis.figures.axes import layer_colorbar, layer_norm, native_line
from bhlog.analysis.figures.registry import Numbers, figure, tidy
from bhlog.analysis.figures.run_data import RunData
from bhlog.analysis.figures.style import BLACK, ORDERED, REFERENCE
from bhlog.analysis.replay.comparison import replay
from bhlog.analysis.sweep.profiling import profile_log
from bhlog.capture.contract.errors import InvalidOption

# even in the logarithm where few experts pass, then in steps of 0.03
SWEEP_ALPHAS = (
    *np.geomspace(1e-4, 0.09, 25).round(6).tolist(),
    *(i / 100 for i in range(12, 100, 3)),
)

MOST_LINEAR = 20  # between fewest and most experts; beyond, their axis is logarithmic


def swept(run: RunData) -> Numbers:
    """Replayed mean experts at SWEEP_ALPHAS, of each layer and over all (layer null); of the last
    with each expert's logits shuffled too, as noise."""
    if not run.load.rows.all():
        raise InvalidOption(f"{run.log.path}: no rows of some layers to replay")
    layers, (mean, noise) = run.log.layers, _means(run)
    each = tidy(layer=np.array(layers)[:, None], alpha=SWEEP_ALPHAS, mean_experts=mean)
    overall = pl.DataFrame(
        {"alpha": SWEEP_ALPHAS, "mean_experts": mean.mean(axis=0), "noise": noise},
        schema_overrides={"noise": pl.Float64},
    )
    frame = pl.concat([each, overall], how="diagonal")
    level = "all alphas" if run.alpha is None else f"alpha {run.alpha:g} marked"
    about = (*run.source, level, bound_words(*run.bounds, run.log.n_experts))
    facts = {"alpha": run.alpha, "top_k": run.top_k}
    return Numbers("Experts per token at other alphas (replayed)", about, frame, facts)


def _means(run: RunData) -> tuple[NDArray[np.float64], list[float | None]]:
    """(L, A) replayed mean experts of each layer at SWEEP_ALPHAS, over all rows; (A,) of noise."""
    log, (low, high) = run.log, run.bounds
    null = run.kde or log.kde
    if run.options.p_values == "kde" and null is not None and null.pooled:
        profile = profile_log(log, run.kde, alphas=SWEEP_ALPHAS)
        swept = profile.frame(SWEEP_ALPHAS, min_k=low, max_k=high)
        means = np.stack([swept[f"layer_{layer}"].to_numpy() for layer in log.layers])
        return means, swept["noise"].to_list()
    settings = [replace(run.options, alpha=alpha) for alpha in SWEEP_ALPHAS]
    frame = replay(log, settings, kde=run.kde).sort("layer", "alpha", nulls_last=True)
    means = frame.drop_nulls("layer")["mean_experts"].to_numpy()
    noise = frame.filter(pl.col("layer").is_null())["noise_experts"].to_list()
    return means.reshape(len(log.layers), len(SWEEP_ALPHAS)), noise


@figure(
    "sweep",
    shows="replayed experts per token against alpha",
    needs="a null model, or empirical p-values",
    data=swept,
)
def plot_sweep(
    axes: Axes, frame: pl.DataFrame, *, alpha: float | None = None, top_k: int | None = None
) -> Axes:
    """Mean experts per token against alpha: each layer, and all.

    Args:
        frame: layer (null: over all), alpha rising, mean_experts, and of the last noise, the mean
            of shuffled logits, null where it is not known.
        alpha: marked; None marks none.
        top_k: experts per token under native routing; None draws none.
    """
    each = frame.drop_nulls("layer")
    norm = layer_norm(each["layer"].to_numpy())
    shade = ScalarMappable(norm, ORDERED)
    for (layer,), line in each.group_by("layer", maintain_order=True):
        axes.plot(line["alpha"], line["mean_experts"], color=shade.to_rgba(layer), linewidth=1)
    overall = frame.filter(pl.col("layer").is_null())
    axes.plot(
        overall["alpha"], overall["mean_experts"], color=BLACK, linewidth=2.5, label="all layers"
    )
    noise = overall.drop_nulls("noise")
    if noise.height:
        axes.plot(noise["alpha"], noise["noise"], color=REFERENCE, linestyle=":", label="noise")
    if alpha is not None:
        axes.axvline(alpha, color=REFERENCE, linestyle="--", label=f"alpha {alpha:g}")
    native_line(axes, top_k, upright=False)
    axes.set_xscale("log")
    axes.set(xlabel="alpha", ylabel="experts per token", xlim=(overall["alpha"][0], 1))
    mean = each["mean_experts"].to_numpy()
    if mean.min() > 0 and mean.max() > MOST_LINEAR * mean.min():
        axes.set_yscale("log")  # without max_k, nearly all experts pass at last
    else:
        axes.set_ylim(0, None)
    layer_colorbar(axes, norm)
    axes.legend()
    return axes
